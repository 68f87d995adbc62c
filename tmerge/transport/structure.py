"""One correspondence for a whole model: transport that respects how a transformer is built (the paper's future work).

Solved apart, the plans of a projection's two sides know nothing of each other, or of the next layer's. But all layers
read and write one residual stream, q and k meet in a product, and an MLP neuron is one unit seen by gate, up and down.
So: layers are paired in order (`tmerge.transport.order`); then one correspondence of the residual stream is solved from
the correlations of all pairs' stream features together, one of each pair's heads (`tmerge.transport.heads`) and one of
each pair's MLP neurons. Each is a problem of Eq. 7-9 whose cost is a mean over features that must agree.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Protocol

import torch
from safetensors.torch import load_file, safe_open
from torch import Tensor

from tmerge.documents import parse_json
from tmerge.errors import NoSharedStructureError
from tmerge.models import PROJECTIONS, SIDES, feature_key
from tmerge.processes import ALONE, Processes
from tmerge.store import write_tensors
from tmerge.transport.agreement import add_cosines
from tmerge.transport.cost import standardise
from tmerge.transport.heads import match_heads
from tmerge.transport.matching import Correspondence, couple
from tmerge.transport.order import in_order, layer_features, nearest_cost, sampled
from tmerge.transport.sides import Side

__all__ = ["STREAM_KEYS", "Structure", "pair_layers", "solve_structure"]

STREAM_KEYS = ("qkv.pre", "mlp.pre", "o.post", "down.post")
"""Features whose neurons are those of the residual stream: what is read from it and what is written to it."""
_HEAD_KEYS = ("q.post", "k.post", "v.post", "o.pre")
_MLP_KEYS = ("gate.post", "up.post", "down.pre")


@dataclass(frozen=True)
class Structure:
    """What `solve_structure` finds.

    Attributes:
        pairs: target layer -> source layer.
        cost: Feature key -> (L, M) `nearest_cost` of the layers that have it.
        layers: Feature key -> (its target layers, its source layers).
        stream: The residual stream's correspondence, one for all layers.
        inner: (target layer, feature key) -> the correspondence with its pair's, of heads and MLP neurons.
    """

    pairs: dict[int, int]
    cost: dict[str, Tensor]
    layers: dict[str, tuple[tuple[int, ...], tuple[int, ...]]]
    stream: Correspondence
    inner: dict[tuple[int, str], Correspondence]

    def of(self, layer: int, key: str) -> Correspondence:
        """The correspondence of a target layer's feature."""
        return self.stream if key in STREAM_KEYS else self.inner[layer, key]

    @property
    def in_place(self) -> float | None:
        """The share of the target's neurons that are matched with the source's of the same number.

        None where the two models are not of one shape, or their layers not paired one by one.
        """
        shapes = {correspondence.shape for correspondence in self.problems}
        others = {layer for _, sources in self.layers.values() for layer in sources}
        if any(own != other for own, other in shapes) or others != self.pairs.keys():
            return None
        if any(layer != source for layer, source in self.pairs.items()):
            return None
        neurons = sum(correspondence.shape[0] for correspondence in self.problems)
        return sum(correspondence.in_place for correspondence in self.problems) / neurons

    @property
    def problems(self) -> list[Correspondence]:
        """All of them, the stream's once."""
        return [self.stream, *self.inner.values()]

    def save(self, path: Path) -> None:
        """Write to a temporary name, then rename."""
        tensors = {f"cost/{key}": cost.contiguous() for key, cost in self.cost.items()}
        correspondences = {"stream": self.stream} | {
            f"{layer}/{key}": correspondence for (layer, key), correspondence in self.inner.items()
        }
        facts = {}
        for name, correspondence in correspondences.items():
            # A layer's MLP features share one: each is written by itself.
            tensors |= {
                f"{name}/{field}": getattr(correspondence, field).clone() for field in ("rows", "columns", "values")
            }
            facts[name] = [*correspondence.shape, correspondence.iterations, correspondence.marginal_error]
        noted = {"pairs": list(self.pairs.items()), "layers": self.layers, "found": facts}
        write_tensors(path, tensors, {"structure": json.dumps(noted)})

    @classmethod
    def load(cls, path: Path) -> Structure:
        """Read what `save` wrote."""
        with safe_open(path, "pt") as stored:
            noted = parse_json(stored.metadata()["structure"])
        tensors = load_file(path)
        correspondences = {}
        for name, (n, m, sweeps, error) in noted["found"].items():
            rows, columns, values = (tensors[f"{name}/{field}"] for field in ("rows", "columns", "values"))
            correspondences[name] = Correspondence(rows, columns, values, (n, m), sweeps, error)
        stream = correspondences.pop("stream")
        inner = {
            (int(name.partition("/")[0]), name.partition("/")[2]): correspondence
            for name, correspondence in correspondences.items()
        }
        return cls(
            dict(map(tuple, noted["pairs"])),
            {key: tensors[f"cost/{key}"] for key in noted["layers"]},
            {key: (tuple(rows), tuple(columns)) for key, (rows, columns) in noted["layers"].items()},
            stream,
            inner,
        )


def pair_layers(
    target: Side,
    source: Side,
    keys: Sequence[str],
    *,
    signed: bool = False,
    solved: Callable[[str, int, Tensor], None] | None = None,
    processes: Processes = ALONE,
) -> tuple[dict[int, int], dict[str, Tensor], dict[str, tuple[tuple[int, ...], tuple[int, ...]]]]:
    """Which source layer each target layer is: the pairing in order of least mean cost over the features.

    Args:
        target: The target.
        source: The source.
        keys: Feature keys to compare.
        signed: As for `nearest_cost`.
        solved: Called with (key, target layer, its (M,) costs); may raise to stop.
        processes: Among whom the target's layers are shared out; each calls this and is given all.

    Returns:
        target layer -> source layer; and by key the (L, M) costs, and which layers their rows and columns are.
    """
    target_layers, source_layers = sorted(target.keys), sorted(source.keys)
    total = torch.zeros(len(target_layers), len(source_layers))
    counts = torch.zeros_like(total)
    cost, layers = {}, {}
    for key in keys:
        rows = [layer for layer in target_layers if key in target.keys[layer]]
        columns = [layer for layer in source_layers if key in source.keys[layer]]
        sampled_sources = [sampled(source.read(layer, key)) for layer in columns]
        found: list[list[float]] = []
        for layer in processes.mine(rows):
            sampled_target = layer_features(target.read(layer, key))
            found.append([nearest_cost(sampled_target, of_source, signed=signed) for of_source in sampled_sources])
            if solved is not None:
                solved(key, layer, torch.tensor(found[-1], dtype=torch.float64))
        costs = torch.tensor(processes.of_all(found), dtype=torch.float64).reshape(len(rows), len(columns))
        cost[key], layers[key] = costs, (tuple(rows), tuple(columns))
        entries = (
            torch.tensor([target_layers.index(layer) for layer in rows])[:, None],
            torch.tensor([source_layers.index(layer) for layer in columns]),
        )
        total[entries] += 1.0 - costs.float()
        counts[entries] += 1.0
    # A source layer that lacks a feature of the target's layer cannot feed it: it is taken only where none is left.
    lacking = torch.tensor(
        [
            [any(key in target.keys[a] and key not in source.keys[b] for key in keys) for b in source_layers]
            for a in target_layers
        ]
    )
    chosen = in_order(total / counts.clamp_min(1.0) - 2.0 * lacking)
    pairs = {layer: source_layers[column] for layer, column in zip(target_layers, chosen.tolist(), strict=True)}
    return pairs, cost, layers


def solve_structure(
    target: Side,
    source: Side,
    pairs: Mapping[int, int],
    *,
    epsilon: float | None = None,
    max_iterations: int = 200,
    tolerance: float = 1e-6,
    signed: bool = False,
    progress: Callable[[int, int], None] | None = None,
    processes: Processes = ALONE,
) -> tuple[Correspondence, dict[tuple[int, str], Correspondence]]:
    """The residual stream's correspondence, and each layer pair's of heads and MLP neurons.

    Args:
        target: The target.
        source: The source.
        pairs: target layer -> source layer.
        epsilon: Regularisation of every problem; None matches one to one.
        max_iterations: Of Sinkhorn.
        tolerance: Of Sinkhorn.
        signed: Whether neurons of the stream, of v and of gated MLPs may meet their negative.
        progress: Called with (layers done, all); may raise to stop.
        processes: Among whom the pairs are shared out; each calls this and is given all.

    Raises:
        NoSharedStructureError: What a model reads from its residual stream and what it writes differ in width, or no
            pair of layers does either.
    """
    solve = partial(couple, epsilon=epsilon, max_iterations=max_iterations, tolerance=tolerance)

    def of_stream(similarity: Tensor) -> Correspondence:
        return solve(similarity.abs()).signed(similarity) if signed else solve(similarity)

    mine, total = processes.mine(list(pairs.items())), _Sum()
    for layer, source_layer in mine:
        for key in filter(STREAM_KEYS.__contains__, _common(target, source, layer, source_layer)):
            total.add(_correlation(target.read(layer, key), source.read(source_layer, key)), f"{key} of layer {layer}")
    alike = total.of_all(processes)
    if alike is None:
        raise NoSharedStructureError(
            "no pair of layers reads or writes a residual stream; set transport.structure: none"
        )
    stream = of_stream(alike)

    inner: dict[tuple[int, str], Correspondence] = {}
    of_all_layers, agreement = dict.fromkeys(STREAM_KEYS, stream), _Sum()
    for done, (layer, source_layer) in enumerate(mine, start=1):
        keys = _common(target, source, layer, source_layer)
        compare = _by_weights(target, source, layer, source_layer, keys)

        def similar(
            key: str, layer: int = layer, source_layer: int = source_layer, compare: _ByWeights = compare
        ) -> Tensor:
            correlation = _correlation(target.read(layer, key), source.read(source_layer, key))
            # Where the correlations are: an MLP's similarities are the largest that is held.
            return correlation.div_(2) if compare(correlation, key, matched=of_all_layers) else correlation

        found = _layer(similar, keys, layer, source_layer, target, source, solve, signed)
        inner |= {(layer, key): correspondence for key, correspondence in found.items()}
        for key in filter(STREAM_KEYS.__contains__, keys):
            cosines = torch.zeros_like(alike)
            if compare(cosines, key, matched=found):
                agreement.add(cosines, f"{key} of layer {layer}")
        if progress is not None:
            progress(done, len(mine))
    agreed = agreement.of_all(processes)
    if agreed is not None:
        stream = of_stream((alike + agreed) / 2)
    if processes.count > 1:
        shares = processes.gathered(inner)
        together = {name: correspondence for some in shares for name, correspondence in some.items()}
        inner = dict(sorted(together.items(), key=lambda item: item[0][0]))
    return stream, inner


class _ByWeights(Protocol):
    """`add_cosines` of a pair of layers; nothing is added where a side has no weights."""

    def __call__(self, similarity: Tensor, key: str, *, matched: Mapping[str, Correspondence]) -> bool: ...


class _Sum:
    """The mean of similarities of the residual stream's neurons, taken one after the other."""

    def __init__(self) -> None:
        self._total: Tensor | None = None
        self._count = 0

    def add(self, similarity: Tensor, of: str) -> None:
        if self._total is not None and self._total.shape != similarity.shape:
            raise NoSharedStructureError(
                f"{of} has {tuple(similarity.shape)} neurons, other features of the residual stream "
                f"{tuple(self._total.shape)}: set transport.structure: none"
            )
        self._total = similarity if self._total is None else self._total.add_(similarity)
        self._count += 1

    def of_all(self, processes: Processes) -> Tensor | None:
        """The mean over what all processes have added; None where there is nothing."""
        if processes.count == 1:
            return None if self._total is None else self._total / self._count
        shares = processes.gathered((self._total, self._count))
        totals = [total for total, _ in shares if total is not None]
        if len({total.shape for total in totals}) > 1:
            raise NoSharedStructureError("the residual stream is of several widths: set transport.structure: none")
        return torch.stack(totals).sum(0) / sum(count for _, count in shares) if totals else None


def _common(target: Side, source: Side, layer: int, source_layer: int) -> list[str]:
    """The feature keys that a pair of layers has in common, in the target's order."""
    return [key for key in target.keys[layer] if key in source.keys[source_layer]]


def _by_weights(target: Side, source: Side, layer: int, source_layer: int, keys: Sequence[str]) -> _ByWeights:
    if target.weights is None or source.weights is None:
        return lambda similarity, key, *, matched: False
    read, read_source = target.weights, source.weights
    projections = [name for name in PROJECTIONS if all(feature_key(name, side) in keys for side in SIDES)]
    return lambda similarity, key, *, matched: add_cosines(
        similarity, key, projections, partial(read, layer), partial(read_source, source_layer), matched
    )


def _layer(
    alike: Callable[[str], Tensor],
    keys: Sequence[str],
    layer: int,
    source_layer: int,
    target: Side,
    source: Side,
    solve: Callable[[Tensor], Correspondence],
    signed: bool,
) -> dict[str, Correspondence]:
    """Everything of a pair of layers that is not the residual stream.

    An MLP's similarities, the widest by far, are made one after the other and summed where they are.
    """
    correspondences: dict[str, Correspondence] = {}
    heads = {key: alike(key) for key in _HEAD_KEYS if key in keys}
    if heads and layer in target.heads and source_layer in source.heads:
        correspondences |= match_heads(heads, target.heads[layer], source.heads[source_layer], solve, signed=signed)
    else:
        correspondences |= {key: solve(values) for key, values in heads.items()}
    neurons = [key for key in keys if key in _MLP_KEYS]
    rest = [key for key in neurons if key != "gate.post"]
    if len(rest) < len(neurons) and signed and rest:
        # Silu(gate) * up: up and down may both change sign, the gate may not.
        together = _summed(alike, rest)
        units = solve(alike("gate.post").add_(together.abs()).div_(len(neurons)))
        correspondences |= {key: units if key == "gate.post" else units.signed(together) for key in neurons}
    elif neurons:
        units = solve(_summed(alike, sorted(neurons, key="gate.post".__ne__)).div_(len(neurons)))
        correspondences |= dict.fromkeys(neurons, units)
    return correspondences


def _summed(alike: Callable[[str], Tensor], keys: Sequence[str]) -> Tensor:
    """The sum of some features' similarities, two of them in memory at a time."""
    summed = alike(keys[0])
    for key in keys[1:]:
        summed.add_(alike(key))
    return summed


def _correlation(target: Tensor, source: Tensor) -> Tensor:
    """(n, n') Pearson correlations."""
    return standardise(target).T @ standardise(source)
