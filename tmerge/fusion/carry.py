"""Carrying a whole source over: from solved plans to transported neurons, layer by layer.

For each target layer this reads the kept source layers' plans, turns them into maps, and transports every fused
projection's selected neurons. A plan exists in full only while its layer is worked on; what later pictures and
later fusions need of it goes into the run's `TransportRecord`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import torch
from torch import Tensor

from tmerge.fusion.coupling import Coupling
from tmerge.fusion.maps import FeatureStatistics, phi_in, phi_out, unit_factors
from tmerge.fusion.merge import TransportedNeurons, layer_weights, read_neurons, transport_neurons
from tmerge.fusion.record import mass_of_top, sparsify
from tmerge.fusion.selection import COLUMN_PROJECTIONS, neuron_side, select_neurons
from tmerge.models import Architecture, feature_key
from tmerge.recipe import FusionSettings, TransportSettings
from tmerge.transport import FeaturePlans, feature_plan, mutual_top, one_thread_each, standardise

__all__ = ["Carried", "carry"]

Read = Callable[[int, str], Tensor]
_Maps = dict[tuple[str, int, bool], Tensor]


@dataclass
class Carried:
    """What `carry` gives.

    Attributes:
        transported: One item per fused layer and projection, by layer.
        permuted: The same through plans whose target neurons are shuffled; empty unless asked for.
        norm_ratios: projection -> one number per fused layer: transported over own norm of the selected neurons.
        biases: projection -> what became of its bias, in words.
        tensors: For the run's record: pairs, potentials, sparse plans, mass curves, selected neurons.
    """

    transported: list[TransportedNeurons] = field(default_factory=list)
    permuted: list[TransportedNeurons] = field(default_factory=list)
    norm_ratios: dict[str, list[float]] = field(default_factory=dict)
    biases: dict[str, str] = field(default_factory=dict)
    tensors: dict[str, Tensor] = field(default_factory=dict)


@dataclass
class _Plan:
    """One kept layer pair of one feature key, while its target layer is worked on."""

    key: str
    row: int
    column: int
    plan: Tensor
    mask: Tensor
    mass: Tensor


class _Carrier:
    """What the layers share."""

    def __init__(
        self,
        target: Architecture,
        source: Architecture,
        source_base: Architecture | None,
        plans: Mapping[str, FeaturePlans],
        couplings: Mapping[str, Coupling],
        features: tuple[Read, Read],
        statistics: tuple[Mapping[tuple[int, str], FeatureStatistics], Mapping[tuple[int, str], FeatureStatistics]],
        settings: tuple[FusionSettings, TransportSettings],
        shuffle: Callable[[int, str, int], Tensor] | None,
    ) -> None:
        self.target, self.source, self.source_base = target, source, source_base
        self.plans, self.couplings, self.features = plans, couplings, features
        self.statistics = statistics
        self.fusion, self.transport = settings
        self.shuffle = shuffle

    def layer(self, layer: int) -> tuple[list[_Plan], list[TransportedNeurons], list[TransportedNeurons]]:
        """Everything of one target layer."""
        read = self._read_plans(layer)
        maps: _Maps = {}
        transported, permuted = [], []
        for projection, coupling in self.couplings.items():
            if layer not in coupling.target_layers:
                continue
            transported.append(self._projection(layer, projection, coupling, read, maps, shuffled=False))
            if self.shuffle is not None:
                permuted.append(self._projection(layer, projection, coupling, read, maps, shuffled=True))
        return list(read.values()), transported, permuted

    def _read_plans(self, layer: int) -> dict[tuple[str, int], _Plan]:
        """The plans of every kept source layer, by feature key and source layer."""
        wanted: dict[tuple[str, int], None] = {}
        for projection, coupling in self.couplings.items():
            if layer in coupling.target_layers:
                for column in coupling.kept[coupling.target_layers.index(layer)].tolist():
                    for side in ("pre", "post"):
                        wanted[feature_key(projection, side), coupling.source_layers[column]] = None
        standard: dict[str, Tensor] = {}
        read = {}
        for key, other in wanted:
            solved = self.plans[key]
            row, column = solved.target_layers.index(layer), solved.source_layers.index(other)
            if key not in standard:
                standard[key] = standardise(self.features[0](layer, key), solved.f.dtype)
            theirs = standardise(self.features[1](other, key), solved.f.dtype)
            plan = feature_plan(standard[key], theirs, solved.f[row, column], solved.g[row, column], solved.epsilon)
            plan = plan.float()
            mask = mutual_top(plan, self.transport.entries_kept)
            read[key, other] = _Plan(key, row, column, plan, mask, mass_of_top(plan))
        return read

    def _projection(
        self,
        layer: int,
        projection: str,
        coupling: Coupling,
        read: Mapping[tuple[str, int], _Plan],
        maps: _Maps,
        *,
        shuffled: bool,
    ) -> TransportedNeurons:
        view = self.target.layers[layer][projection]
        pre, post = feature_key(projection, "pre"), feature_key(projection, "post")
        score = self.statistics[0][layer, feature_key(projection, neuron_side(projection))].magnitude
        neurons = select_neurons(score, self.fusion.top_k)
        row = coupling.target_layers.index(layer)
        weights = layer_weights(coupling.weights[row], len(coupling.target_layers), self.fusion.scale)
        weight: Tensor | None = None
        bias: Tensor | None = None
        for column, share in zip(coupling.kept[row].tolist(), weights.tolist(), strict=True):
            other = coupling.source_layers[column]
            out_map = self._map(layer, other, post, read[post, other], maps, outwards=True, shuffled=shuffled)
            in_map = self._map(layer, other, pre, read[pre, other], maps, outwards=False, shuffled=shuffled)
            theirs, their_bias = self._source_weight(other, projection)
            carried, carried_bias = transport_neurons(theirs, their_bias, out_map, in_map, projection, neurons)
            weight = share * carried if weight is None else weight + share * carried
            if carried_bias is not None:
                bias = share * carried_bias if bias is None else bias + share * carried_bias
        assert weight is not None  # a target layer in a coupling has at least one source layer
        if self.bias_fate(projection, neurons.shape[0] == score.shape[0]) != "fused":
            bias = None
        if self.fusion.scale == "row-norm":
            own = read_neurons(view, neurons).cpu()
            across = 0 if projection in COLUMN_PROJECTIONS else 1
            norm = torch.linalg.vector_norm(weight, dim=across)
            factor = torch.linalg.vector_norm(own, dim=across) / norm.clamp_min(torch.finfo(torch.float32).tiny)
            weight = weight * (factor if across == 0 else factor.unsqueeze(1))
            if bias is not None and across == 1:
                bias = bias * factor
        return TransportedNeurons(layer, projection, neurons, weight, bias, self.fusion.what == "task-vector")

    def _map(
        self, layer: int, other: int, key: str, read: _Plan, maps: _Maps, *, outwards: bool, shuffled: bool
    ) -> Tensor:
        """Phi_out or Phi_in of a pair; q, k and v ask for the same one, so it is kept while the layer is worked on."""
        built = maps.get((key, other, outwards))
        if built is None:
            build = phi_out if outwards else phi_in
            built = build(read.plan, scale=self.fusion.scale, kept=self.transport.entries_kept, mask=read.mask)
            if self.fusion.units != "none":
                mine, theirs = self.statistics[0][layer, key], self.statistics[1][other, key]
                a, b = unit_factors(*((mine, theirs) if outwards else (theirs, mine)), self.fusion.units)
                built = a.unsqueeze(1) * built * b
            maps[key, other, outwards] = built
        if shuffled and self.shuffle is not None:
            order = self.shuffle(layer, key, read.plan.shape[0])
            return built[order] if outwards else built[:, order]
        return built

    def _source_weight(self, layer: int, projection: str) -> tuple[Tensor, Tensor | None]:
        """What is transported of a source layer: its weight, or what it learned since the base."""
        view = self.source.layers[layer][projection]
        weight, bias = view.weight().float().cpu(), view.bias()
        bias = None if bias is None else bias.float().cpu()
        if self.source_base is not None:
            base = self.source_base.layers[layer][projection]
            weight = weight - base.weight().float().cpu()
            base_bias = base.bias()
            if bias is not None and base_bias is not None:
                bias = bias - base_bias.float().cpu()
        return weight, bias

    def bias_fate(self, projection: str, all_neurons: bool) -> str:
        """What happens to a projection's bias: ``fused``, or why not."""
        coupling = self.couplings[projection]
        mine = self.target.layers[coupling.target_layers[0]][projection].has_bias
        theirs = self.source.layers[coupling.source_layers[0]][projection].has_bias
        if not mine and not theirs:
            return "none"
        if not self.fusion.biases:
            return "left alone: fusion.biases is off"
        if not mine:
            return "left alone: the target has none to write the source's into"
        if not theirs:
            return "left alone: the source has none"
        if projection in COLUMN_PROJECTIONS and not all_neurons:
            # The bias belongs to the outputs; the neurons chosen here are inputs.
            return "left alone: it is fused only when all neurons are selected"
        return "fused"


def carry(
    target: Architecture,
    source: Architecture,
    plans: Mapping[str, FeaturePlans],
    couplings: Mapping[str, Coupling],
    features: tuple[Read, Read],
    statistics: tuple[Mapping[tuple[int, str], FeatureStatistics], Mapping[tuple[int, str], FeatureStatistics]],
    fusion: FusionSettings,
    transport: TransportSettings,
    *,
    source_base: Architecture | None = None,
    shuffle: Callable[[int, str, int], Tensor] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Carried:
    """Transport every fused projection of every target layer (Eq. 13-14 up to alpha).

    Args:
        target: Read for norms and shapes; nothing is written here.
        source: Its weights are what is transported.
        plans: feature key -> its solved plans.
        couplings: projection -> its layer coupling.
        features: (target, source) readers, (layer, key) -> (T, n).
        statistics: (target, source), by (layer, key).
        fusion: The recipe's section.
        transport: The recipe's section.
        source_base: For task vectors: the source before its fine-tuning.
        shuffle: (layer, key, n) -> a permutation (n,) of the target's neurons, for the `permuted` control.
        progress: Called with (layers done, all); may raise to stop.
    """
    settings = (fusion, transport)
    carrier = _Carrier(target, source, source_base, plans, couplings, features, statistics, settings, shuffle)
    layers = sorted({layer for coupling in couplings.values() for layer in coupling.target_layers})
    carried = Carried(norm_ratios={projection: [] for projection in couplings})
    parts: dict[str, list[Tensor]] = {}
    with one_thread_each() as workers, ThreadPoolExecutor(workers) as pool:
        pending = [pool.submit(carrier.layer, layer) for layer in layers]
        try:
            for done, future in enumerate(pending, start=1):
                used, transported, permuted = future.result()
                carried.transported += transported
                carried.permuted += permuted
                for key in plans:
                    group = [plan for plan in used if plan.key == key]
                    if group:
                        _keep(parts, key, plans[key], group)
                if progress is not None:
                    progress(done, len(layers))
        except BaseException:
            for future in pending:
                future.cancel()
            raise
    carried.tensors = {name: torch.cat(pieces) for name, pieces in parts.items()}
    _finish(carried, carrier, target)
    return carried


def _keep(parts: dict[str, list[Tensor]], key: str, solved: FeaturePlans, group: Sequence[_Plan]) -> None:
    """Add one target layer's plans to the record; the dense plans are let go here."""
    sparse = sparsify([item.plan for item in group], [item.mask for item in group])
    before = parts.get(f"plan.{key}.offsets")
    pieces = {
        f"pairs.{key}": torch.tensor([(item.row, item.column) for item in group], dtype=torch.int32),
        f"f.{key}": torch.stack([solved.f[item.row, item.column] for item in group]),
        f"g.{key}": torch.stack([solved.g[item.row, item.column] for item in group]),
        f"mass.{key}": torch.stack([item.mass for item in group]),
        f"plan.{key}.offsets": sparse.offsets[1:] + before[-1][-1] if before else sparse.offsets,
        f"plan.{key}.columns": sparse.columns,
        f"plan.{key}.values": sparse.values,
    }
    for name, piece in pieces.items():
        parts.setdefault(name, []).append(piece)


def _finish(carried: Carried, carrier: _Carrier, target: Architecture) -> None:
    """Norm ratios, biases and selected neurons, once all layers are there."""
    for item in carried.transported:
        own = torch.linalg.vector_norm(read_neurons(target.layers[item.layer][item.projection], item.neurons))
        ratio = torch.linalg.vector_norm(item.weight.double()) / own.double().cpu()
        carried.norm_ratios[item.projection].append(float(ratio))
    for projection in carrier.couplings:
        items = [item for item in carried.transported if item.projection == projection]
        carried.tensors[f"neurons.{projection}"] = torch.stack([item.neurons for item in items]).to(torch.int32)
        view = target.layers[items[0].layer][projection]
        neurons = view.in_features if projection in COLUMN_PROJECTIONS else view.out_features
        carried.biases[projection] = carrier.bias_fate(projection, len(items[0].neurons) == neurons)
