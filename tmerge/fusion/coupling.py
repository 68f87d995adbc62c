"""From layer costs to which source layers feed which target layers (Eq. 11-13), for every fused projection."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from tmerge.fusion.maps import FeatureStatistics
from tmerge.models import feature_key
from tmerge.recipe import TransportSettings
from tmerge.transport import FeaturePlans, LayerPlan, couple_layers, solve_layers

__all__ = ["Coupling", "coupling_tensors", "couplings", "layer_plans"]


class _Costs(Protocol):
    @property
    def target_layers(self) -> tuple[int, ...]: ...
    @property
    def source_layers(self) -> tuple[int, ...]: ...
    @property
    def cost(self) -> Tensor: ...


class _Plan(Protocol):
    @property
    def plan(self) -> Tensor: ...


@dataclass(frozen=True)
class Coupling:
    """Which source layers feed each target layer of one projection.

    Attributes:
        target_layers: The L target layers that have the projection.
        source_layers: The M source layers that have it.
        effective: (L, M) sqrt(P_pre P_post).
        kept: (L, k) columns of M, strongest first.
        weights: (L, k) their effective weights.
    """

    target_layers: tuple[int, ...]
    source_layers: tuple[int, ...]
    effective: Tensor
    kept: Tensor
    weights: Tensor


def layer_plans(plans: Mapping[str, FeaturePlans], settings: TransportSettings) -> dict[str, LayerPlan]:
    """The layer plan P of every feature key, as the recipe asks for it."""
    return {
        key: solve_layers(
            solved.cost,
            settings.eta,
            scaling=settings.layer_cost,
            marginals=settings.layer_marginals,
            max_iterations=settings.layer_max_iterations,
            tolerance=settings.layer_tolerance,
        )
        for key, solved in plans.items()
    }


def couplings(
    projections: Sequence[str], plans: Mapping[str, FeaturePlans], layers: Mapping[str, LayerPlan], kept: int
) -> dict[str, Coupling]:
    """Every projection's coupling, from the layer plans of its two sides.

    Args:
        projections: Their names.
        plans: feature key -> its solved plans; they name the layers.
        layers: feature key -> its layer plan.
        kept: Source layers kept per target layer.
    """
    result = {}
    for projection in projections:
        pre, post = feature_key(projection, "pre"), feature_key(projection, "post")
        entering = _restricted(layers[pre], plans[pre], plans[post])
        effective, indices, weights = couple_layers(entering, layers[post], kept)
        result[projection] = Coupling(plans[post].target_layers, plans[post].source_layers, effective, indices, weights)
    return result


def _restricted(layer_plan: LayerPlan, pre: FeaturePlans, post: FeaturePlans) -> LayerPlan:
    """The pre side's plan over the layers that have the post side too, of sum 1 again.

    They differ where some layers have a q but reuse the keys and values of others: what enters is there in all of
    them, k and v are not.
    """
    if (pre.target_layers, pre.source_layers) == (post.target_layers, post.source_layers):
        return layer_plan
    rows = [pre.target_layers.index(layer) for layer in post.target_layers]
    columns = [pre.source_layers.index(layer) for layer in post.source_layers]
    plan = layer_plan.plan[rows][:, columns]
    return replace(layer_plan, plan=plan / plan.sum())


def coupling_tensors(
    plans: Mapping[str, _Costs],
    layers: Mapping[str, _Plan],
    coupled: Mapping[str, Coupling],
    statistics: Mapping[str, Mapping[tuple[int, str], FeatureStatistics]],
) -> dict[str, Tensor]:
    """What a run's record keeps of layers: costs, plans, couplings and feature statistics.

    Args:
        plans: feature key -> its layers and their costs.
        layers: feature key -> its layer plan.
        coupled: projection -> its coupling.
        statistics: ``target`` and ``source`` -> (layer, feature key) -> statistics.
    """
    tensors: dict[str, Any] = {}
    for key, solved in plans.items():
        tensors[f"cost.{key}"] = solved.cost
        tensors[f"layer_plan.{key}"] = layers[key].plan
        for role, numbers in (("target", solved.target_layers), ("source", solved.source_layers)):
            tensors[f"layers.{role}.{key}"] = torch.tensor(numbers, dtype=torch.int32)
            for field in ("mean", "deviation", "magnitude"):
                rows = [getattr(statistics[role][layer, key], field) for layer in numbers]
                tensors[f"statistics.{role}.{key}.{field}"] = torch.stack(rows)
    for projection, coupling in coupled.items():
        tensors[f"effective.{projection}"] = coupling.effective
        tensors[f"kept.{projection}.layers"] = coupling.kept.to(torch.int32)
        tensors[f"kept.{projection}.weights"] = coupling.weights
    return tensors
