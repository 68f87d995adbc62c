"""The plans of kept layer pairs, in full while their target layer is worked on, and how they are had.

They are computed again from features and potentials by the run that solved them (`SolvedPairs`), or read back from
what such a run recorded (`RecordedPairs`): then no feature is needed, and the values are those of 16 bits.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from tmerge.errors import PlanError
from tmerge.fusion.coupling import Coupling
from tmerge.fusion.maps import FeatureStatistics
from tmerge.fusion.record import TransportRecord, mass_of_top, sparsify
from tmerge.models import feature_key
from tmerge.transport import FeaturePlans, feature_plan, mutual_top, standardise

__all__ = ["PlanPair", "PlanParts", "Pairs", "RecordedPairs", "SolvedPairs", "Statistics", "recorded_couplings"]

Read = Callable[[int, str], Tensor]
Statistics = tuple[Mapping[tuple[int, str], FeatureStatistics], Mapping[tuple[int, str], FeatureStatistics]]
"""Of the target and of the source, by (layer, feature key)."""


@dataclass
class PlanPair:
    """The plan of one feature key for one pair of layers.

    Attributes:
        key: The feature.
        row: The target layer's row in L.
        column: The source layer's column in M.
        plan: (n, n') float32; sparse of a correspondence, and then it holds what survives and nothing else.
        mask: (n, n') the entries that survive among the largest of their row and of their column; None: all of them.
        mass: As `mass_of_top`, where the plan is to be recorded.
        partial: Whether it is a correspondence, as `phi_out` takes it.
        maps: (n, n') Phi_out and (n', n) Phi_in where they are not read off the plan.
    """

    key: str
    row: int
    column: int
    plan: Tensor
    mask: Tensor | None
    mass: Tensor | None = None
    partial: bool = False
    maps: tuple[Tensor, Tensor] | None = None


class Pairs(Protocol):
    """Where the plans of kept pairs come from."""

    def of_layer(self, layer: int, wanted: Sequence[tuple[str, int]]) -> dict[tuple[str, int], PlanPair]:
        """The plans of a target layer with some source layers, by (feature key, source layer); called from threads."""
        ...

    def keep(self, used: Sequence[PlanPair]) -> None:
        """Hear that a layer's plans have served; called layer after layer, from one thread."""
        ...

    def tensors(self) -> dict[str, Tensor]:
        """What a run's record keeps of all pairs that have served."""
        ...


class SolvedPairs:
    """Plans from potentials and features.

    Args:
        plans: feature key -> its solved plans.
        features: (target, source) readers, (layer, key) -> (T, n).
        kept: Entries that survive per row and per column.
    """

    def __init__(self, plans: Mapping[str, FeaturePlans], features: tuple[Read, Read], kept: int) -> None:
        self._plans, self._features, self._kept = plans, features, kept
        self._parts = PlanParts()

    def of_layer(self, layer: int, wanted: Sequence[tuple[str, int]]) -> dict[tuple[str, int], PlanPair]:
        """As `Pairs.of_layer`."""
        standard: dict[str, Tensor] = {}
        read = {}
        for key, other in wanted:
            solved = self._plans[key]
            row, column = solved.target_layers.index(layer), solved.source_layers.index(other)
            if key not in standard:
                standard[key] = standardise(self._features[0](layer, key), solved.f.dtype)
            theirs = standardise(self._features[1](other, key), solved.f.dtype)
            plan = feature_plan(standard[key], theirs, solved.f[row, column], solved.g[row, column], solved.epsilon)
            plan = plan.float()
            read[key, other] = PlanPair(key, row, column, plan, mutual_top(plan, self._kept), mass_of_top(plan))
        return read

    def keep(self, used: Sequence[PlanPair]) -> None:
        """Add one target layer's plans to what is recorded; the dense ones can then be let go."""
        for key, solved in self._plans.items():
            group = [pair for pair in used if pair.key == key]
            if group:
                potentials = {
                    name: torch.stack([values[pair.row, pair.column] for pair in group])
                    for name, values in ((f"f.{key}", solved.f), (f"g.{key}", solved.g))
                }
                self._parts.add(key, group, potentials)

    def tensors(self) -> dict[str, Tensor]:
        """As `Pairs.tensors`."""
        return self._parts.tensors()


class PlanParts:
    """Sparse plans for a run's record, gathered layer by layer."""

    def __init__(self) -> None:
        self._parts: dict[str, list[Tensor]] = {}

    def add(self, key: str, group: Sequence[PlanPair], beside: Mapping[str, Tensor]) -> None:
        """One target layer's plans of a feature key, and tensors with a row for each."""
        sparse = sparsify([pair.plan for pair in group], [pair.mask for pair in group])
        before = self._parts.get(f"plan.{key}.offsets")
        entries = before[-1][-1] if before else 0
        pieces = {
            f"pairs.{key}": torch.tensor([(pair.row, pair.column) for pair in group], dtype=torch.int32),
            f"mass.{key}": torch.stack([pair.mass for pair in group if pair.mass is not None]),
            f"plan.{key}.offsets": sparse.offsets[1:] + entries if before else sparse.offsets,
            f"plan.{key}.columns": sparse.columns,
            f"plan.{key}.values": sparse.values,
            f"plan.{key}.beyond": sparse.beyond + entries,
            **beside,
        }
        for name, piece in pieces.items():
            self._parts.setdefault(name, []).append(piece)

    def tensors(self) -> dict[str, Tensor]:
        """All of it, by the record's names."""
        return {name: torch.cat(pieces) for name, pieces in self._parts.items()}


class RecordedPairs:
    """Plans from a run's record."""

    def __init__(self, record: TransportRecord) -> None:
        self._record = record
        self._partial = record.facts.get("structure", "none") != "none"
        self._plans = {key: record.plans(key) for key in record.keys}
        self._places = {key: {pair: index for index, pair in enumerate(record.pairs(key))} for key in record.keys}
        self._layers = {
            (role, key): record.tensors[f"layers.{role}.{key}"].tolist()
            for role in ("target", "source")
            for key in record.keys
        }

    def of_layer(self, layer: int, wanted: Sequence[tuple[str, int]]) -> dict[tuple[str, int], PlanPair]:
        """As `Pairs.of_layer`."""
        read = {}
        mask: Tensor | None
        for key, other in wanted:
            row, column = self._layers["target", key].index(layer), self._layers["source", key].index(other)
            place = self._places[key][row, column]
            plan, mask = (self._plans[key].sparse(place), None) if self._partial else self._plans[key].read(place)
            # As `literal` takes it, entries of n * Q are n times too large.
            read[key, other] = PlanPair(key, row, column, plan / plan.shape[0], mask, partial=self._partial)
        return read

    def keep(self, used: Sequence[PlanPair]) -> None:
        """Nothing: they are recorded already."""

    def tensors(self) -> dict[str, Tensor]:
        """The record's own, without the neurons that its run selected."""
        return {name: tensor for name, tensor in self._record.tensors.items() if not name.startswith("neurons.")}

    def statistics(self) -> Statistics:
        """Of the target's and of the source's features."""
        target, source = (
            {
                (layer, key): FeatureStatistics(
                    *(
                        self._record.tensors[f"statistics.{role}.{key}.{field}"][place]
                        for field in ("mean", "deviation", "magnitude")
                    )
                )
                for key in self._record.keys
                for place, layer in enumerate(self._layers[role, key])
            }
            for role in ("target", "source")
        )
        return target, source


def recorded_couplings(record: TransportRecord, projections: Sequence[str]) -> dict[str, Coupling]:
    """Every projection's layer coupling, as it was recorded.

    Raises:
        PlanError: A projection was not solved.
    """
    missing = [name for name in projections if name not in record.projections]
    if missing:
        raise PlanError(
            f"the plan holds no {', '.join(missing)}, only {', '.join(record.projections)}: choose among these in "
            "fusion.projections, or merge without --plan"
        )
    couplings = {}
    for name in projections:
        post = feature_key(name, "post")
        target, source = (tuple(record.tensors[f"layers.{role}.{post}"].tolist()) for role in ("target", "source"))
        kept = record.tensors[f"kept.{name}.layers"].long()
        effective, weights = record.tensors[f"effective.{name}"], record.tensors[f"kept.{name}.weights"]
        couplings[name] = Coupling(target, source, effective, kept, weights)
    return couplings
