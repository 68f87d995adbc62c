"""Feature plans Q of every layer pair, the layer plan P over them, and how both are read.

A feature plan is kept as its potentials: Q = exp((f + g - C)/eps) is n + n' numbers, since C is recomputed from
the features whenever a row, a block or the whole of Q is wanted (Eq. 7-9). The layer plan P (L, M) couples the
target's L layers with the source's M by the costs <C, Q> of their features (Eq. 10-12).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from tmerge.models import available_memory, give_back_memory
from tmerge.models.device import is_out_of_memory
from tmerge.processes import ALONE, Processes
from tmerge.store import write_tensors
from tmerge.transport.cost import correlation_cost, standardise
from tmerge.transport.sinkhorn import SinkhornResult, kernel_dtype, plan_from_potentials, sinkhorn
from tmerge.transport.workers import in_turn, one_thread_each

__all__ = [
    "FeaturePlans",
    "LayerPlan",
    "couple_layers",
    "effective_weights",
    "feature_plan",
    "load_plans",
    "keep_layers",
    "mutual_top",
    "save_plans",
    "solve_features",
    "solve_layers",
    "working_dtype",
]

# Standardised source features of one key are held for all layers while they fit in this many bytes.
_HOLD_BYTES = 1 << 30
# Past this the official code raises eta, so that exp(-C/eta) stays away from underflow (Eq. 11).
_LARGE_COST = 1000.0

Read = Callable[[int], Tensor]


def working_dtype(epsilon: float, device: torch.device | None = None) -> torch.dtype:
    """Float32 while its rounding of the cost, about 1e-7, stays below 1e-5 of the plan: 1e-7/eps; else float64.

    On Apple's GPUs float32, as they have no other.
    """
    return torch.float32 if epsilon >= 0.05 or (device is not None and device.type == "mps") else torch.float64


@dataclass(frozen=True)
class FeaturePlans:
    """The feature plans of one feature key over all layer pairs.

    Attributes:
        key: The feature, such as ``q.post`` or ``qkv.pre``.
        epsilon: Their regularisation.
        target_layers: The L target layers that have this feature.
        source_layers: The M source layers that have it.
        f: (L, M, n) row potentials, float32 or float64.
        g: (L, M, n') column potentials.
        cost: (L, M) ``<C, Q>``, Eq. 10, float64.
        iterations: (L, M) int64.
        marginal_error: (L, M) largest relative marginal violation, float64.
        converged: (L, M) bool.
    """

    key: str
    epsilon: float
    target_layers: tuple[int, ...]
    source_layers: tuple[int, ...]
    f: Tensor
    g: Tensor
    cost: Tensor
    iterations: Tensor
    marginal_error: Tensor
    converged: Tensor


@dataclass(frozen=True)
class LayerPlan:
    """A layer plan P and how it was made.

    Attributes:
        plan: (L, M) float64, sum 1.
        eta: The regularisation in use, raised where the cost was large.
        median: What the shifted cost was divided by; 1 where it was taken as it is.
        converged: Whether the marginals were met.
        iterations: Sweeps.
        marginal_error: Largest relative violation.
    """

    plan: Tensor
    eta: float
    median: float
    converged: bool
    iterations: int
    marginal_error: float


def solve_features(
    key: str,
    target: Read,
    source: Read,
    target_layers: Sequence[int],
    source_layers: Sequence[int],
    *,
    epsilon: float,
    max_iterations: int = 200,
    tolerance: float = 1e-6,
    device: torch.device | None = None,
    at_once: int | None = None,
    solved: Callable[[int, Tensor], None] | None = None,
    note: Callable[[str], None] | None = None,
    processes: Processes = ALONE,
) -> FeaturePlans:
    """Solve the feature transport of every layer pair for one feature key (Eq. 7-10).

    Args:
        key: The feature's name, kept in the result.
        target: layer -> (T, n) features.
        source: layer -> (T, n') features.
        target_layers: Layers to read from the target.
        source_layers: Layers to read from the source.
        epsilon: Regularisation.
        max_iterations: Per problem.
        tolerance: Relative marginal violation to stop at.
        device: Where to solve; the CPU if None.
        at_once: Source layers that a target layer meets together. If None one on a CPU, where a problem stays in its
            cache, and on an accelerator as many as there is room for; halved where there is none after all.
        solved: Called with a target layer and its (M,) transport costs as they come in; may raise to stop.
        note: Told that fewer problems are solved at once.
        processes: Among whom the target's layers are shared out; each calls this and is given all plans.

    Returns:
        Potentials and costs of all L x M problems.
    """
    device = device or torch.device("cpu")
    dtype = working_dtype(epsilon, device)
    held_sources: dict[int, Tensor] = {}

    def standard_source(layer: int) -> Tensor:
        if layer in held_sources:
            return held_sources[layer]
        features = standardise(source(layer), dtype).to(device)
        if features.numel() * features.element_size() * len(source_layers) <= _HOLD_BYTES:
            held_sources[layer] = features
        return features

    size = at_once or (1 if device.type == "cpu" else 0)  # 0: not known before the first problem is seen

    def solve_group(standard: Tensor, group: Sequence[int], most: int, memory: list[Tensor]) -> SinkhornResult:
        features = [standard_source(source_layer) for source_layer in group]
        # A problem by itself is two matrices, for which torch has quicker products.
        batch = torch.stack(features) if most > 1 else features[0]
        if not memory:
            shape, kernel_kind = (*batch.shape[:-2], standard.shape[1], batch.shape[-1]), kernel_dtype(dtype, tolerance)
            memory += (batch.new_empty(shape), batch.new_empty(shape, dtype=kernel_kind))
        cost, kernel = (part[: len(group)] if most > 1 else part for part in memory)
        correlation_cost(standard, batch, out=cost)
        return sinkhorn(cost, epsilon, max_iterations=max_iterations, tolerance=tolerance, kernel=kernel)

    def solve_row(layer: int) -> SinkhornResult:
        nonlocal size
        standard = standardise(target(layer), dtype).to(device)
        most = size = size or _room(device, standard, standard_source(source_layers[0]))
        results: list[SinkhornResult] = []
        # One group's memory serves all of a row's: what is small and stays would else lie between the large pieces
        # that go, and the C library keeps those (3 GB more between 16 layers of 2048 neurons and 28 of 3072).
        memory: list[Tensor] = []
        while (done := sum(result.converged.numel() for result in results)) < len(source_layers):
            try:
                results.append(solve_group(standard, source_layers[done : done + most], most, memory))
                continue
            except (MemoryError, RuntimeError) as error:
                if most == 1 or not is_out_of_memory(error):
                    raise
            # Here the error no longer keeps what the group held.
            most = size = most // 2
            memory.clear()
            give_back_memory()
            if note is not None:
                note(f"{device} has no room for so many problems at once: fewer at a time from here on")
        return SinkhornResult.joined(results)

    rows: list[SinkhornResult] = []

    def take(layer: int, row: SinkhornResult) -> None:
        rows.append(row)
        if solved is not None:
            solved(layer, row.transport_cost)

    with one_thread_each(device) as workers:
        in_turn(solve_row, processes.mine(target_layers), workers, take)
    rows = processes.of_all(rows)

    def gather(field: str, kind: torch.dtype) -> Tensor:
        return torch.stack([getattr(row, field) for row in rows]).to(kind)

    return FeaturePlans(
        key=key,
        epsilon=epsilon,
        target_layers=tuple(target_layers),
        source_layers=tuple(source_layers),
        f=gather("f", dtype),
        g=gather("g", dtype),
        cost=gather("transport_cost", torch.float64),
        iterations=gather("iterations", torch.int64),
        marginal_error=gather("marginal_error", torch.float64),
        converged=gather("converged", torch.bool),
    )


def _room(device: torch.device, target: Tensor, source: Tensor) -> int:
    """How many problems a device has room for at once."""
    # A cost, a kernel, and what sums and starts take beside them; and the source layer's rows, stacked with others.
    problem = (4 * target.shape[1] * source.shape[1] + source.numel()) * target.element_size()
    return max(1, available_memory(device) // 2 // problem)


def feature_plan(target: Tensor, source: Tensor, f: Tensor, g: Tensor, epsilon: float) -> Tensor:
    """A whole plan Q from standardised features and the potentials.

    Pass some columns of the features with the matching potentials to read a block of Q alone.

    Args:
        target: (T, n) from `standardise`.
        source: (T, n') from `standardise`.
        f: (n,).
        g: (n',).
        epsilon: As it was solved.

    Returns:
        (n, n') in the potentials' dtype.
    """
    return plan_from_potentials(correlation_cost(target.to(f.dtype), source.to(f.dtype)), f, g, epsilon)


_STORED = ("f", "g", "cost", "iterations", "marginal_error", "converged")


def save_plans(plans: Mapping[str, FeaturePlans], layers: Mapping[str, LayerPlan], path: Path) -> None:
    """Write feature plans, and the layer plan of each, to one safetensors file, under a temporary name first."""
    tensors: dict[str, Tensor] = {}
    for key, solved in plans.items():
        for field in fields(LayerPlan):
            tensors[f"{key}/layers/{field.name}"] = _as_tensor(getattr(layers[key], field.name))
        tensors |= {f"{key}/{field}": getattr(solved, field).contiguous() for field in _STORED}
        tensors[f"{key}/target_layers"] = torch.tensor(solved.target_layers)
        tensors[f"{key}/source_layers"] = torch.tensor(solved.source_layers)
        tensors[f"{key}/epsilon"] = torch.tensor(solved.epsilon, dtype=torch.float64)
    write_tensors(path, tensors)


def load_plans(path: Path, keys: Sequence[str]) -> tuple[dict[str, FeaturePlans], dict[str, LayerPlan]]:
    """Read what `save_plans` wrote, in the order of `keys`."""
    tensors = load_file(path)
    plans = {
        key: FeaturePlans(
            key,
            float(tensors[f"{key}/epsilon"]),
            tuple(tensors[f"{key}/target_layers"].tolist()),
            tuple(tensors[f"{key}/source_layers"].tolist()),
            *(tensors[f"{key}/{field}"] for field in _STORED),
        )
        for key in keys
    }
    layers = {}
    for key in keys:
        stored = {field.name: tensors[f"{key}/layers/{field.name}"] for field in fields(LayerPlan)}
        numbers: dict[str, Any] = {name: value.item() for name, value in stored.items() if name != "plan"}
        layers[key] = LayerPlan(stored["plan"], **numbers)
    return plans, layers


def _as_tensor(value: Tensor | float) -> Tensor:
    """A number as a tensor that gives it back exactly."""
    if isinstance(value, Tensor):
        return value.contiguous()
    return torch.tensor(value, dtype=torch.float64 if isinstance(value, float) else None)


def solve_layers(
    cost: Tensor,
    eta: float,
    *,
    scaling: Literal["median-scaled", "plain"] = "median-scaled",
    marginals: Literal["balanced", "semi-relaxed"] = "balanced",
    max_iterations: int = 1000,
    tolerance: float = 1e-9,
) -> LayerPlan:
    """The layer plan P of a layer cost (Eq. 11-12).

    Args:
        cost: (L, M).
        eta: Regularisation; raised in proportion where the scaled cost passes 1000.
        scaling: ``median-scaled`` takes (C - min C) / median(C - min C), as the official code does and the paper
            does not say; costs lie within a tenth of each other, and ``plain`` gives a nearly flat plan.
        marginals: ``balanced`` fixes both to uniform, so that every source layer must be used. ``semi-relaxed``
            fixes the target's alone: its solution is a softmax of -C/eta along each row.
        max_iterations: Sweeps.
        tolerance: Relative marginal violation.

    Returns:
        P (L, M) in float64 with its diagnostics.
    """
    scaled = cost.to(torch.float64)
    median = 1.0
    if scaling == "median-scaled":
        scaled = scaled - scaled.min()
        median = float(scaled.median())
        if median > 0:
            scaled = scaled / median
        else:
            median = 1.0
    eta = eta * max(1.0, float(scaled.abs().max()) / _LARGE_COST)
    if marginals == "semi-relaxed":
        plan = torch.softmax(-scaled / eta, dim=1) / scaled.shape[0]
        return LayerPlan(plan, eta, median, True, 1, 0.0)
    result = sinkhorn(scaled, eta, max_iterations=max_iterations, tolerance=tolerance)
    plan = plan_from_potentials(scaled, result.f, result.g, eta)
    return LayerPlan(plan, eta, median, bool(result.converged), int(result.iterations), float(result.marginal_error))


def effective_weights(pre: Tensor, post: Tensor) -> Tensor:
    """sqrt(P_pre * P_post), (L, M): a source layer counts where both its inputs and its outputs match (Eq. 13)."""
    return (pre * post).sqrt()


def keep_layers(weights: Tensor, kept: int) -> tuple[Tensor, Tensor]:
    """The strongest source layers of each target layer.

    Args:
        weights: (L, M) effective weights.
        kept: How many to keep; all when there are fewer.

    Returns:
        Indices (L, k) int64 into the source layers, strongest first, and their weights (L, k), not renormalised.
    """
    top = torch.topk(weights, min(kept, weights.shape[1]), dim=1)
    return top.indices, top.values


def couple_layers(pre: LayerPlan, post: LayerPlan, kept: int) -> tuple[Tensor, Tensor, Tensor]:
    """Effective weights (L, M) of a projection with the indices and weights that are kept (Eq. 13)."""
    weights = effective_weights(pre.plan, post.plan)
    return weights, *keep_layers(weights, kept)


def mutual_top(plan: Tensor, kept: int) -> Tensor:
    """Which entries of a plan stay: those among the largest `kept` of their row *and* of their column.

    An entry that ties with the last one kept stays too, so the rule does not depend on the neurons' order.

    Args:
        plan: (n, n') not negative.
        kept: Entries per row and per column.

    Returns:
        (n, n') bool mask.
    """
    n, m = plan.shape
    mask = torch.ones_like(plan, dtype=torch.bool)
    if kept < m:
        mask &= plan >= _kth_largest(plan, kept).unsqueeze(1)
    if kept < n:
        mask &= plan >= _kth_largest(plan.T, kept).unsqueeze(0)
    return mask


def _kth_largest(rows: Tensor, kept: int) -> Tensor:
    """The kept-th largest entry of each row."""
    if rows.device.type != "cpu":
        return torch.topk(rows, kept, dim=1).values[:, -1]
    # NumPy's selection is vectorised, several times as fast here as a sort of the top entries.
    index = rows.shape[1] - kept
    return torch.from_numpy(np.partition(np.ascontiguousarray(rows.numpy()), index, axis=1)[:, index].copy())
