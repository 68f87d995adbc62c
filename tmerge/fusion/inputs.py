"""What the fusion reads of a transport, whether this run solved it or another run recorded it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from tmerge.calibration import FeatureStore
from tmerge.fusion.coupling import Coupling, coupling_tensors, couplings, layer_plans
from tmerge.fusion.maps import FeatureStatistics
from tmerge.fusion.pairs import Pairs, RecordedPairs, SolvedPairs, Statistics, recorded_couplings
from tmerge.fusion.record import TransportRecord
from tmerge.fusion.rivals import MappedPairs
from tmerge.fusion.structured import StructuredPairs, paired_couplings, paired_layers
from tmerge.recipe import TransportSettings
from tmerge.transport import FeaturePlans, Structure

__all__ = ["FusionInputs", "layers_with", "recorded_inputs", "solved_inputs", "structured_inputs"]


@dataclass(frozen=True)
class FusionInputs:
    """Everything that `carry` needs beside the weights.

    Attributes:
        pairs: The kept layer pairs' plans.
        couplings: projection -> its layer coupling.
        statistics: Of the target's and the source's features.
        keys: Feature keys, in the order they were solved.
        tensors: For the run's record: layer costs, plans, couplings and statistics.
        facts: ``eta`` in use by feature key, and ``layer_plans_converged``.
    """

    pairs: Pairs
    couplings: dict[str, Coupling]
    statistics: Statistics
    keys: list[str]
    tensors: dict[str, Tensor]
    facts: dict[str, Any]


def solved_inputs(
    plans: Mapping[str, FeaturePlans],
    target: FeatureStore,
    source: FeatureStore,
    projections: Sequence[str],
    settings: TransportSettings,
) -> FusionInputs:
    """From this run's solved feature plans and features."""
    layers = layer_plans(plans, settings)
    coupled = couplings(projections, plans, layers, settings.layers_kept)
    statistics = {"target": _statistics(target, plans), "source": _statistics(source, plans)}
    return FusionInputs(
        _mapped(SolvedPairs(plans, (target.get, source.get), settings.entries_kept), target, source, settings),
        coupled,
        (statistics["target"], statistics["source"]),
        list(plans),
        coupling_tensors(plans, layers, coupled, statistics),
        {
            "eta": {key: plan.eta for key, plan in layers.items()},
            "layer_plans_converged": all(plan.converged for plan in layers.values()),
        },
    )


def structured_inputs(
    structure: Structure,
    target: FeatureStore,
    source: FeatureStore,
    projections: Sequence[str],
    settings: TransportSettings,
) -> FusionInputs:
    """From this run's one correspondence for the whole models."""
    paired = paired_layers(structure)
    coupled = paired_couplings(projections, paired)
    statistics = {"target": _statistics(target, paired), "source": _statistics(source, paired)}
    return FusionInputs(
        _mapped(StructuredPairs(structure, paired, settings.entries_kept), target, source, settings),
        coupled,
        (statistics["target"], statistics["source"]),
        list(paired),
        coupling_tensors(paired, paired, coupled, statistics),
        {"eta": {}, "layer_plans_converged": True},
    )


def _mapped(pairs: Pairs, target: FeatureStore, source: FeatureStore, settings: TransportSettings) -> Pairs:
    """The pairs, or with fitted maps in place of their plans."""
    if settings.map == "plan":
        return pairs
    return MappedPairs(pairs, (target.get, source.get), settings.map, settings.ridge)


def recorded_inputs(record: TransportRecord, transport: Mapping[str, Any], projections: Sequence[str]) -> FusionInputs:
    """From another run's record.

    Args:
        record: Its transport.safetensors.
        transport: The section of its report.
        projections: To be fused.

    Raises:
        PlanError: A projection was not solved.
    """
    pairs = RecordedPairs(record)
    facts = {"eta": transport["eta_used"], "layer_plans_converged": transport["layer_plans_converged"]}
    return FusionInputs(pairs, recorded_couplings(record, projections), pairs.statistics(), record.keys, {}, facts)


def layers_with(store: FeatureStore, key: str) -> tuple[int, ...]:
    """The layers that have a feature."""
    return tuple(layer for layer in store.layers if key in store.keys(layer))


def _statistics(store: FeatureStore, plans: Mapping[str, Any]) -> dict[tuple[int, str], FeatureStatistics]:
    return {
        (layer, key): FeatureStatistics.of(store.get(layer, key)) for key in plans for layer in layers_with(store, key)
    }
