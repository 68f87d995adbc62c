"""Carrying a whole source over: from solved plans to transported neurons, layer by layer.

For each target layer this reads the kept source layers' plans, turns them into maps, and transports every fused
projection's selected neurons. A plan exists in full only while its layer is worked on; what later pictures and
later fusions need of it goes into the run's `TransportRecord`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from tmerge.fusion.affine import difference_bias, mean_keeping_bias
from tmerge.fusion.coupling import Coupling
from tmerge.fusion.maps import phi_in, phi_out, unit_factors
from tmerge.fusion.merge import TransportedNeurons, layer_weights, read_neurons, transport_neurons
from tmerge.fusion.pairs import Pairs, PlanPair, Statistics
from tmerge.fusion.selection import COLUMN_PROJECTIONS, neuron_side, select_neurons
from tmerge.fusion.sparse import scaled, unmatched
from tmerge.fusion.stream import carry_stream
from tmerge.models import STREAM, Architecture, Projection, feature_key
from tmerge.recipe import FusionSettings, TransportSettings
from tmerge.transport import in_turn, one_thread_each

__all__ = ["Carried", "carry"]

_Maps = dict[tuple[str, int, bool], Tensor]


@dataclass
class Carried:
    """What `carry` gives.

    Attributes:
        transported: One item per fused layer and projection, by layer.
        permuted: The same through plans whose target neurons are shuffled; empty unless asked for.
        norm_ratios: projection -> one number per fused layer: transported over own norm of the selected neurons; None
            where the target's own are all zero.
        biases: projection -> what became of its bias, in words.
        tensors: For the run's record: pairs, potentials, sparse plans, mass curves, selected neurons.
    """

    transported: list[TransportedNeurons] = field(default_factory=list)
    permuted: list[TransportedNeurons] = field(default_factory=list)
    norm_ratios: dict[str, list[float | None]] = field(default_factory=dict)
    biases: dict[str, str] = field(default_factory=dict)
    tensors: dict[str, Tensor] = field(default_factory=dict)


class _Carrier:
    """What the layers share."""

    def __init__(
        self,
        target: Architecture,
        source: Architecture,
        source_base: Architecture | None,
        pairs: Pairs,
        couplings: Mapping[str, Coupling],
        statistics: Statistics,
        settings: tuple[FusionSettings, TransportSettings],
        shuffle: Callable[[int, str, int], Tensor] | None,
    ) -> None:
        self.target, self.source, self.source_base = target, source, source_base
        self.pairs, self.couplings, self.statistics = pairs, couplings, statistics
        self.fusion, self.transport = settings
        self.shuffle = shuffle

    def layer(self, layer: int) -> tuple[list[PlanPair], list[TransportedNeurons], list[TransportedNeurons]]:
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

    def _read_plans(self, layer: int) -> dict[tuple[str, int], PlanPair]:
        """The plans of every kept source layer, by feature key and source layer."""
        wanted: dict[tuple[str, int], None] = {}
        for projection, coupling in self.couplings.items():
            if layer in coupling.target_layers:
                for column in coupling.kept[coupling.target_layers.index(layer)].tolist():
                    for side in ("pre", "post"):
                        wanted[feature_key(projection, side), coupling.source_layers[column]] = None
        return self.pairs.of_layer(layer, list(wanted))

    def _projection(
        self,
        layer: int,
        projection: str,
        coupling: Coupling,
        read: Mapping[tuple[str, int], PlanPair],
        maps: _Maps,
        *,
        shuffled: bool,
    ) -> TransportedNeurons:
        view = self.target.layers[layer][projection]
        pre, post = feature_key(projection, "pre"), feature_key(projection, "post")
        score = self._scores(layer, projection, as_units=next(iter(read.values())).partial)
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
            if self.fusion.affine and self.source_base is not None:
                their_bias = difference_bias(their_bias, theirs, self.statistics[1][other, pre].mean)
            carried, carried_bias = transport_neurons(theirs, their_bias, out_map, in_map, projection, neurons)
            factor = self._score_factor(projection, layer, other, read[post, other])
            if factor != 1.0:
                carried, carried_bias = factor * carried, None if carried_bias is None else factor * carried_bias
            weight = share * carried if weight is None else weight + share * carried
            if carried_bias is not None:
                bias = share * carried_bias if bias is None else bias + share * carried_bias
        assert weight is not None  # a target layer in a coupling has at least one source layer
        own = read_neurons(view, neurons).cpu()
        fused = self.bias_fate(projection, neurons.shape[0] == score.shape[0]) == "fused"
        if not fused:
            bias = None
        if self.source_base is None and read[post, other].partial and read[post, other].maps is None:
            alone = unmatched(out_map, 0), unmatched(in_map, 1)
            weight, bias = self._keep_unmatched(view, neurons, own, (weight, bias), alone)
        if self.fusion.scale == "row-norm":
            across = 0 if projection in COLUMN_PROJECTIONS else 1
            norm = torch.linalg.vector_norm(weight, dim=across)
            factor = torch.linalg.vector_norm(own, dim=across) / norm.clamp_min(torch.finfo(torch.float32).tiny)
            weight = weight * (factor if across == 0 else factor.unsqueeze(1))
            if bias is not None and across == 1:
                bias = bias * factor
        if self.fusion.affine and fused:
            mean = self.statistics[0][layer, pre].mean
            bias = self._affine_bias(view, neurons, own, weight, bias, mean)
        return TransportedNeurons(layer, projection, neurons, weight, bias, self.fusion.what == "task-vector")

    def _score_factor(self, projection: str, layer: int, other: int, read: PlanPair) -> float:
        """What q and k are multiplied by, so that scores are what they were between wider or narrower heads.

        A score is ``scaling * sum_i q_i k_i``. Of heads of D' dimensions min(D, D') are carried, so the sum has that
        share of its terms, and the scaling is another: each of q and k makes up for the root of both.
        """
        if projection not in ("q", "k") or not read.partial or read.maps is not None:
            return 1.0
        mine, theirs = self.target.attention[layer], self.source.attention[other]
        if mine is None or theirs is None or mine.scaling is None or theirs.scaling is None:
            return 1.0
        carried = min(mine.head_dim, theirs.head_dim) / theirs.head_dim
        return float((theirs.scaling / mine.scaling / carried) ** 0.5)

    def _scores(self, layer: int, projection: str, *, as_units: bool) -> Tensor:
        """s_j of A.5. MLP neurons that travel as units are chosen as units: by what they give to ``down``."""
        unit = layer, feature_key("down", "pre")
        if not as_units or projection not in ("gate", "up") or unit not in self.statistics[0]:
            return self.statistics[0][layer, feature_key(projection, neuron_side(projection))].magnitude
        return self.statistics[0][unit].magnitude

    def _affine_bias(
        self,
        view: Projection,
        neurons: Tensor,
        own: Tensor,
        weight: Tensor,
        carried: Tensor | None,
        mean: Tensor,
    ) -> Tensor:
        """b~ of affine maps, from the transported neurons, what Phi_out made of the bias, and mu_A of all inputs."""
        mean = mean[neurons] if view.name in COLUMN_PROJECTIONS else mean
        if self.source_base is not None:
            assert carried is not None  # `difference_bias` gave Phi_out something to carry
            return carried - weight @ mean
        bias = _own_bias(view, neurons)
        assert bias is not None  # `bias_fate` sees to it
        return mean_keeping_bias(own, bias, weight, mean)

    def _map(
        self, layer: int, other: int, key: str, read: PlanPair, maps: _Maps, *, outwards: bool, shuffled: bool
    ) -> Tensor:
        """Phi_out or Phi_in of a pair; q, k and v ask for the same one, so it is kept while the layer is worked on."""
        built = maps.get((key, other, outwards))
        if built is None:
            built = self.plain_map(read, outwards=outwards)
            if self.fusion.units != "none":
                mine, theirs = self.statistics[0][layer, key], self.statistics[1][other, key]
                a, b = unit_factors(*((mine, theirs) if outwards else (theirs, mine)), self.fusion.units)
                built = scaled(built, a, b)
            maps[key, other, outwards] = built
        if shuffled and self.shuffle is not None:
            order = self.shuffle(layer, key, read.plan.shape[0])
            return built.index_select(0 if outwards else 1, order)
        return built

    def _keep_unmatched(
        self,
        view: Projection,
        neurons: Tensor,
        own: Tensor,
        carried: tuple[Tensor, Tensor | None],
        alone: tuple[Tensor, Tensor],
    ) -> tuple[Tensor, Tensor | None]:
        """Where an output or an input has no counterpart, nothing is said of a weight, which is not to say zero."""
        weight, bias = carried
        outputs, inputs = alone
        if view.name in COLUMN_PROJECTIONS:
            inputs = inputs[neurons]
        else:
            outputs = outputs[neurons]
        weight = torch.where(outputs.unsqueeze(1) | inputs, own, weight)
        own_bias = _own_bias(view, neurons)
        if bias is not None and own_bias is not None:
            bias = torch.where(outputs, own_bias, bias)
        return weight, bias

    def plain_map(self, read: PlanPair, *, outwards: bool) -> Tensor:
        """Phi_out or Phi_in of a pair, in the features' own units."""
        if read.maps is not None:
            return read.maps[0 if outwards else 1]
        build = phi_out if outwards else phi_in
        kept = self.transport.entries_kept
        return build(read.plan, scale=self.fusion.scale, kept=kept, mask=read.mask, partial=read.partial)

    def stream(self, vocabulary: Tensor | None, *, shuffled: bool) -> list[TransportedNeurons]:
        """The task vector of what else lies on the residual stream, which one correspondence carries everywhere."""
        assert self.source_base is not None  # the recipe sees to it
        others: dict[int, int] = {}
        for coupling in self.couplings.values():
            for row, layer in enumerate(coupling.target_layers):
                others.setdefault(layer, coupling.source_layers[int(coupling.kept[row, 0])])
        projection = next(iter(self.couplings))
        key = feature_key(projection, "post" if projection in COLUMN_PROJECTIONS else "pre")
        first = self.couplings[projection].target_layers[0]
        read = self.pairs.of_layer(first, [(key, others[first])])[key, others[first]]
        maps = self.plain_map(read, outwards=True), self.plain_map(read, outwards=False)
        if shuffled and self.shuffle is not None:
            order = self.shuffle(-1, STREAM, maps[0].shape[0])
            maps = maps[0].index_select(0, order), maps[1].index_select(1, order)
        return carry_stream(self.target, self.source, self.source_base, others, maps, vocabulary)

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
            return "none" if not self.fusion.affine else "left alone: the target has none for an affine map's"
        if not self.fusion.biases:
            return "left alone: fusion.biases is off"
        if not mine:
            return "left alone: the target has none to write the source's into"
        if not theirs and not self.fusion.affine:
            return "left alone: the source has none"
        if projection in COLUMN_PROJECTIONS and not all_neurons:
            # The bias belongs to the outputs; the neurons chosen here are inputs.
            return "left alone: it is fused only when all neurons are selected"
        return "fused"


def _own_bias(view: Projection, neurons: Tensor) -> Tensor | None:
    """The target's bias: of the selected rows, or of all outputs where columns are selected; float32."""
    bias = view.bias()
    if bias is None:
        return None
    return bias.float().cpu() if view.name in COLUMN_PROJECTIONS else bias.float().cpu()[neurons]


def carry(
    target: Architecture,
    source: Architecture,
    pairs: Pairs,
    couplings: Mapping[str, Coupling],
    statistics: Statistics,
    fusion: FusionSettings,
    transport: TransportSettings,
    *,
    source_base: Architecture | None = None,
    shuffle: Callable[[int, str, int], Tensor] | None = None,
    vocabulary: Tensor | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Carried:
    """Transport every fused projection of every target layer (Eq. 13-14 up to alpha).

    Args:
        target: Read for norms and shapes; nothing is written here.
        source: Its weights are what is transported.
        pairs: Where the kept layer pairs' plans come from.
        couplings: projection -> its layer coupling.
        statistics: (target, source), by (layer, feature key).
        fusion: The recipe's section.
        transport: The recipe's section.
        source_base: For task vectors: the source before its fine-tuning.
        shuffle: (layer, key, n) -> a permutation (n,) of the target's neurons, for the `permuted` control.
        vocabulary: With ``fusion.stream``: (2, V) ids in the target and in the source of tokens that both have.
        progress: Called with (layers done, all); may raise to stop.
    """
    settings = (fusion, transport)
    carrier = _Carrier(target, source, source_base, pairs, couplings, statistics, settings, shuffle)
    layers = sorted({layer for coupling in couplings.values() for layer in coupling.target_layers})
    carried = Carried(norm_ratios={projection: [] for projection in couplings})

    def take(layer: int, found: tuple[list[PlanPair], list[TransportedNeurons], list[TransportedNeurons]]) -> None:
        used, transported, permuted = found
        carried.transported += transported
        carried.permuted += permuted
        pairs.keep(used)
        if progress is not None:
            progress(layers.index(layer) + 1, len(layers))

    with one_thread_each() as workers:
        in_turn(carrier.layer, layers, workers, take)
    carried.tensors = pairs.tensors()
    _finish(carried, carrier, target)
    if fusion.stream:
        carried.transported += carrier.stream(vocabulary, shuffled=False)
        if shuffle is not None:
            carried.permuted += carrier.stream(vocabulary, shuffled=True)
    return carried


def _finish(carried: Carried, carrier: _Carrier, target: Architecture) -> None:
    """Norm ratios, biases and selected neurons, once all layers are there."""
    for item in carried.transported:
        own = torch.linalg.vector_norm(read_neurons(target.layers[item.layer][item.projection], item.neurons))
        ratio = torch.linalg.vector_norm(item.weight.double()) / own.double().cpu()
        # Blocks that were added to a model begin with zeros, and over nothing there is no ratio.
        carried.norm_ratios[item.projection].append(float(ratio) if own else None)
    for projection in carrier.couplings:
        items = [item for item in carried.transported if item.projection == projection]
        carried.tensors[f"neurons.{projection}"] = torch.stack([item.neurons for item in items]).to(torch.int32)
        view = target.layers[items[0].layer][projection]
        neurons = view.in_features if projection in COLUMN_PROJECTIONS else view.out_features
        carried.biases[projection] = carrier.bias_fate(projection, len(items[0].neurons) == neurons)
