"""What every solver of a transport gives, and what a recorded one gives again: `Transport`.

Solved apart, solved with a structure that all layers share, fitted, or read back from transport.safetensors: whoever
fuses asks the same three things. Which layers have a feature, and what it costs to carry it between them
(`FeatureLayers`); which source layers feed a target layer of a projection, with which weights (`LayerMap`); and how
the neurons of one feature are carried between two layers (`FeatureMap`), which is large, so that it is built when it is
asked for, and let go when its layer is done.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from torch import Tensor

from tmerge.models import feature_key
from tmerge.transport.agreement import WeightAgreement
from tmerge.transport.maps import Scale, phi_in, phi_out
from tmerge.transport.statistics import Statistics

__all__ = ["FeatureLayers", "FeatureMap", "LayerMap", "Problems", "Transport"]


@dataclass(frozen=True)
class FeatureLayers:
    """The layers of one feature key.

    Attributes:
        target_layers: The L target layers that have the feature.
        source_layers: The M source layers that have it.
        cost: (L, M) of carrying it, float64: ``<C, Q>`` (Eq. 10) of plans solved apart, `nearest_cost` of a structure.
        plan: (L, M) float64 P, of sum 1 (Eq. 11-12); of a structure 1/L at each target layer's pair.
    """

    target_layers: tuple[int, ...]
    source_layers: tuple[int, ...]
    cost: Tensor
    plan: Tensor


@dataclass(frozen=True)
class LayerMap:
    """Which source layers feed each target layer of one projection.

    Attributes:
        target_layers: The L target layers that have the projection.
        source_layers: The M source layers that have it.
        effective: (L, M) sqrt(P_pre P_post), Eq. 13; of a structure the layers' plan itself.
        kept: (L, k) columns of M, strongest first.
        weights: (L, k) their effective weights.
    """

    target_layers: tuple[int, ...]
    source_layers: tuple[int, ...]
    effective: Tensor
    kept: Tensor
    weights: Tensor

    def sources(self, layer: int) -> list[int]:
        """The source layers that feed a target layer, strongest first."""
        return [self.source_layers[column] for column in self.kept[self.target_layers.index(layer)].tolist()]

    def weights_of(self, layer: int) -> Tensor:
        """(k,) the effective weights of `sources`."""
        return self.weights[self.target_layers.index(layer)]


@dataclass(frozen=True)
class FeatureMap:
    """How one feature's neurons are carried between a target layer and a source layer.

    Attributes:
        key: The feature.
        target_layer: The target's layer number.
        source_layer: The source's.
        plan: (n, n') float32 Q; sparse of a correspondence, and then it holds what survives and nothing else.
        survives: (n, n') bool, the entries among the largest of their row and of their column; None: all of them.
        partial: Whether it is a correspondence: entries have signs, and a neuron may have no counterpart.
        potentials: (n,) and (n',) of a plan that was iterated.
        fitted: (n, n') Phi_out and (n', n) Phi_in where they are not read off the plan.
    """

    key: str
    target_layer: int
    source_layer: int
    plan: Tensor
    survives: Tensor | None
    partial: bool = False
    potentials: tuple[Tensor, Tensor] | None = None
    fitted: tuple[Tensor, Tensor] | None = None

    def phi_out(self, scale: Scale) -> Tensor:
        """(n, n') each target output as an average of source outputs, in the features' own units."""
        if self.fitted is not None:
            return self.fitted[0]
        return phi_out(self.plan, scale=scale, mask=self.survives, partial=self.partial)

    def phi_in(self, scale: Scale) -> Tensor:
        """(n', n) each source input as an average of target inputs, in the features' own units."""
        if self.fitted is not None:
            return self.fitted[1]
        return phi_in(self.plan, scale=scale, mask=self.survives, partial=self.partial)


@dataclass(frozen=True)
class Problems:
    """How the problems of a transport were solved.

    Attributes:
        problems: Their number.
        median_iterations: Sinkhorn sweeps; 0 where a problem was solved exactly.
        max_iterations: Of any.
        worst_marginal_violation: The largest relative one.
        converged: How many met their marginals.
        in_place: Share of the target's neurons that are matched with the source's of the same number, where one
            correspondence of models of one shape was solved; else None.
    """

    problems: int
    median_iterations: int
    max_iterations: int
    worst_marginal_violation: float
    converged: int
    in_place: float | None = None

    def to_dict(self) -> dict[str, int | float | dict[str, int] | None]:
        """As the report holds it."""
        return {
            "problems": self.problems,
            "iterations": {"median": self.median_iterations, "max": self.max_iterations},
            "worst_marginal_violation": self.worst_marginal_violation,
            "converged": self.converged,
            "in_place": self.in_place,
        }


Wanted = Sequence[tuple[str, int]]
Build = Callable[[int, Wanted], dict[tuple[str, int], FeatureMap]]
"""(target layer, (feature key, source layer) of each) -> the maps by the latter; called from threads."""


@dataclass(frozen=True)
class Transport:
    """A transport from a source to a target.

    Attributes:
        structure: ``none`` where every feature was solved by itself, ``shared`` where layers share one correspondence.
        layers: Feature key -> its layers, in the order in which they were solved.
        layer_maps: Projection -> its layer map, in the recipe's order.
        build: Makes feature maps.
        matched: Whether neurons have counterparts or none, so that an empty row of a map says: nothing is known of it.
        measure: Reads the features' statistics, or has them.
        eta: Feature key -> the eta of its layer plan that was in use; empty where none was solved.
        layer_plans_converged: Whether all of them met their marginals.
        pairs: Target layer -> source layer, where layers are paired; None where each feature chooses its own.
        problems: How it was solved; None of a recorded one, whose report has it.
        agreement: What the two models' weights say of its layers; None where they were not asked.
        recorded: The tensors of the record that it was read from, without selected neurons; None of a solved one.
    """

    structure: str
    layers: Mapping[str, FeatureLayers]
    layer_maps: Mapping[str, LayerMap]
    build: Build
    matched: bool
    measure: Callable[[], Statistics]
    eta: Mapping[str, float]
    layer_plans_converged: bool
    pairs: Mapping[int, int] | None = None
    problems: Problems | None = None
    agreement: WeightAgreement | None = None
    recorded: Mapping[str, Tensor] | None = None

    @cached_property
    def statistics(self) -> Statistics:
        """Of the target's and of the source's features, over the calibration set."""
        return self.measure()

    @property
    def target_layers(self) -> list[int]:
        """Target layers that anything is carried to, ascending."""
        return sorted({layer for layer_map in self.layer_maps.values() for layer in layer_map.target_layers})

    def projections_of(self, layer: int) -> list[str]:
        """The projections of a target layer that are carried."""
        return [name for name, layer_map in self.layer_maps.items() if layer in layer_map.target_layers]

    def feature_maps(self, layer: int) -> dict[tuple[str, int], FeatureMap]:
        """All maps that carry to a target layer, by feature key and source layer. Dense ones are large: let them go."""
        wanted: dict[tuple[str, int], None] = {}
        for projection in self.projections_of(layer):
            for source_layer in self.layer_maps[projection].sources(layer):
                for side in ("pre", "post"):
                    wanted[feature_key(projection, side), source_layer] = None
        return self.build(layer, list(wanted))

    def feature_map(self, layer: int, key: str, source_layer: int) -> FeatureMap:
        """One feature's map from a source layer to a target layer."""
        return self.build(layer, [(key, source_layer)])[key, source_layer]
