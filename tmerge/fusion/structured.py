"""What the fusion reads of a `Structure`: its correspondences as plans, its pairs of layers as couplings.

One source layer feeds each target layer, with all of the weight. The layer plan that the record keeps is that pairing,
with uniform mass over the target's layers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tmerge.errors import UnsupportedModelError
from tmerge.fusion.coupling import Coupling
from tmerge.fusion.pairs import PlanPair, PlanParts
from tmerge.fusion.record import mass_of_top
from tmerge.fusion.sparse import sparse_plan
from tmerge.models import feature_key
from tmerge.transport import Structure, mutual_top

__all__ = ["PairedLayers", "StructuredPairs", "paired_couplings", "paired_layers"]


@dataclass(frozen=True)
class PairedLayers:
    """The layers of one feature key and how they are paired, as the record keeps them.

    Attributes:
        target_layers: The L target layers that have the feature.
        source_layers: The M source layers that have it.
        cost: (L, M) of the layers, `nearest_cost`.
        plan: (L, M) float64: 1/L at each target layer's pair.
    """

    target_layers: tuple[int, ...]
    source_layers: tuple[int, ...]
    cost: Tensor
    plan: Tensor


def paired_layers(structure: Structure) -> dict[str, PairedLayers]:
    """By feature key, in the order of the structure's."""
    paired = {}
    for key, (rows, columns) in structure.layers.items():
        plan = torch.zeros(len(rows), len(columns), dtype=torch.float64)
        for row, layer in enumerate(rows):
            if structure.pairs[layer] in columns:
                plan[row, columns.index(structure.pairs[layer])] = 1.0 / len(rows)
        paired[key] = PairedLayers(rows, columns, structure.cost[key], plan)
    return paired


def paired_couplings(projections: Sequence[str], paired: Mapping[str, PairedLayers]) -> dict[str, Coupling]:
    """Every projection's coupling: the one source layer that each target layer is paired with.

    Raises:
        UnsupportedModelError: A layer's pair lacks a projection that the layer has.
    """
    couplings = {}
    for projection in projections:
        layers = paired[feature_key(projection, "post")]
        if bool((layers.plan.sum(1) == 0).any()):
            layer = layers.target_layers[int((layers.plan.sum(1) == 0).nonzero()[0])]
            raise UnsupportedModelError(
                f"layer {layer} of the target is paired with a source layer that has no {projection}; leave it out of "
                "fusion.projections, or set transport.structure: none"
            )
        kept = layers.plan.argmax(1, keepdim=True)
        weights = layers.plan.gather(1, kept)
        couplings[projection] = Coupling(layers.target_layers, layers.source_layers, layers.plan.clone(), kept, weights)
    return couplings


class StructuredPairs:
    """A structure's correspondences as the plans of paired layers (`tmerge.fusion.pairs.Pairs`).

    Args:
        structure: What was solved.
        paired: Of `paired_layers`.
        kept: Entries that survive per row and per column.
    """

    def __init__(self, structure: Structure, paired: Mapping[str, PairedLayers], kept: int) -> None:
        self._structure, self._paired, self._kept = structure, paired, kept
        self._parts = PlanParts()

    def of_layer(self, layer: int, wanted: Sequence[tuple[str, int]]) -> dict[tuple[str, int], PlanPair]:
        """As `Pairs.of_layer`."""
        read = {}
        for key, other in wanted:
            layers = self._paired[key]
            row, column = layers.target_layers.index(layer), layers.source_layers.index(other)
            found = self._structure.of(layer, key)
            plan, mask = sparse_plan(found, self._kept), None
            if plan is None:
                plan = found.dense() / found.shape[0]
                mask = (plan != 0) & mutual_top(plan.abs(), self._kept)
            read[key, other] = PlanPair(key, row, column, plan, mask, mass_of_top(plan), partial=True)
        return read

    def keep(self, used: Sequence[PlanPair]) -> None:
        """As `Pairs.keep`."""
        for key in self._paired:
            group = [pair for pair in used if pair.key == key]
            if group:
                self._parts.add(key, group, {})

    def tensors(self) -> dict[str, Tensor]:
        """As `Pairs.tensors`."""
        return self._parts.tensors()
