"""One projection of one target layer: map -> transport -> keep what has no counterpart -> rescale -> bias."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from tmerge.fusion.affine import difference_bias, mean_keeping_bias
from tmerge.fusion.low_rank import of_rank
from tmerge.fusion.maps import unmatched
from tmerge.fusion.merge import TransportedNeurons, layer_weights, read_neurons, transport_neurons
from tmerge.fusion.phis import Phis
from tmerge.fusion.selection import COLUMN_PROJECTIONS, neuron_side, select_neurons
from tmerge.models import Architecture, HeadLayout, Projection, feature_key, give_back_memory
from tmerge.models.device import is_out_of_memory
from tmerge.recipe import CarriedSettings, TaskVector
from tmerge.transport import Transport

__all__ = ["Carrier", "goal_factor", "score_factor"]

_FUSED = "fused"

WeightAndBias = tuple[Tensor, Tensor | None]


def score_factor(projection: str, own: HeadLayout | None, read: HeadLayout | None) -> float:
    """What q and k are multiplied by, so that scores are what they were between wider or narrower heads.

    A score is ``scaling * sum_i q_i k_i``. Of heads of D' dimensions min(D, D') are carried, so the sum has that
    share of its terms, and the scaling is another: each of q and k makes up for the root of both.

    Args:
        projection: Its name; 1 for all but q and k.
        own: The target's heads; 1 where they, the source's or a scaling are not known, and where the target norms what
            the projection gives, so that its size is of no account.
        read: The source's. Where it norms what the projection gives, and the target does not, this is of what its norm
            gives.
    """
    if projection not in ("q", "k") or own is None or read is None or projection in own.normed:
        return 1.0
    if own.scaling is None or read.scaling is None:
        return 1.0
    carried = min(own.head_dim, read.head_dim) / read.head_dim
    return float((read.scaling / own.scaling / carried) ** 0.5)


def goal_factor(projection: str, layers: tuple[int, int], target: Architecture, source: Architecture) -> float:
    """What the source's outputs are multiplied by to be the target's goals; of o and down, which are the stream's, 1.

    Args:
        projection: Its name.
        layers: Of the target and of the source.
        target: The model that is fitted.
        source: The model that is read.
    """
    if projection in COLUMN_PROJECTIONS:
        return 1.0  # how a block adds them is measured (`tmerge.fusion.addition`)
    score = score_factor(projection, target.attention[layers[0]], source.attention[layers[1]])
    return score * target.multipliers.output_ratio(projection, source.multipliers)


@dataclass(frozen=True)
class _Feed:
    """One source layer that feeds a target layer.

    Attributes:
        layer: Its number.
        share: Its weight among those that feed the layer.
        out_map: (out, out') Phi_out.
        in_map: (in', in) Phi_in.
    """

    layer: int
    share: float
    out_map: Tensor
    in_map: Tensor


@dataclass(frozen=True)
class Carrier:
    """What the projections of all layers have in common.

    Attributes:
        target: Read for norms and shapes; nothing is written here.
        source: Its weights are what is transported.
        source_base: For task vectors: the source before its fine-tuning.
        transport: Which layers feed which.
        fusion: The recipe's section.
        device: Where weights meet dense maps: those that have no room there do it on the processor.
        note: Told of that.
    """

    target: Architecture
    source: Architecture
    source_base: Architecture | None
    transport: Transport
    fusion: CarriedSettings
    device: torch.device
    note: Callable[[str], None] | None = None

    def carried(self, layer: int, projection: str, phis: Phis) -> TransportedNeurons:
        """What the source has to say about the selected neurons of one projection.

        Args:
            layer: Of the target.
            projection: Its name.
            phis: The layer's maps.
        """
        view = self.target.layers[layer][projection]
        neurons = self._neurons(layer, projection)
        feeds = self._feeds(layer, projection, phis)
        weight, bias = self._transported(layer, projection, neurons, feeds)
        own = read_neurons(view, neurons).cpu()
        if self.bias_fate(view, neurons) != _FUSED:
            bias = None
        if self.transport.matched and self.source_base is None:
            weight, bias = _with_unmatched_kept(view, neurons, own, (weight, bias), feeds)
        if self.fusion.scale == "row-norm":
            weight, bias = _with_norms_of(own, projection, (weight, bias))
        if isinstance(self.fusion, TaskVector) and self.fusion.rank is not None:
            weight = of_rank(weight, self.fusion.rank)
        if self.fusion.affine and self.bias_fate(view, neurons) == _FUSED:
            bias = self._affine_bias(layer, view, neurons, own, (weight, bias))
        return TransportedNeurons(layer, projection, neurons, weight, bias, isinstance(self.fusion, TaskVector))

    def _neurons(self, layer: int, projection: str) -> Tensor:
        """Selected by s_j of A.5. MLP neurons that travel as units are chosen as units: by what they give to ``down``.

        They do where the structure is shared.
        """
        scores, unit = self.transport.statistics.target, (layer, feature_key("down", "pre"))
        feature = layer, feature_key(projection, neuron_side(projection))
        if self.transport.structure == "shared" and projection in ("gate", "up") and unit in scores:
            feature = unit
        return select_neurons(scores[feature].magnitude, self.fusion.top_k)

    def _feeds(self, layer: int, projection: str, phis: Phis) -> list[_Feed]:
        """The maps from every source layer that feeds the projection."""
        layer_map = self.transport.layer_maps[projection]
        shares = layer_weights(layer_map.weights_of(layer), len(layer_map.target_layers), self.fusion.scale).tolist()
        pre, post = feature_key(projection, "pre"), feature_key(projection, "post")
        return [
            _Feed(source_layer, share, phis.out(post, source_layer), phis.into(pre, source_layer))
            for source_layer, share in zip(layer_map.sources(layer), shares, strict=True)
        ]

    def _transported(self, layer: int, projection: str, neurons: Tensor, feeds: list[_Feed]) -> WeightAndBias:
        """``sum_m w[l, m] * Phi_out W_B Phi_in`` of the selected neurons, and of their biases ``Phi_out b_B``."""
        weight: Tensor | None = None
        bias: Tensor | None = None
        for feed in feeds:
            read, read_bias = self._source_weight(feed.layer, projection)
            maps = feed.out_map, feed.in_map
            carried, carried_bias = self._through(maps, (read, read_bias), projection, neurons)
            factor, bias_factor = self._factors(layer, feed.layer, projection)
            if factor != 1.0:
                carried = factor * carried
            if bias_factor != 1.0 and carried_bias is not None:
                carried_bias = bias_factor * carried_bias
            weight = feed.share * carried if weight is None else weight + feed.share * carried
            if carried_bias is not None:
                bias = feed.share * carried_bias if bias is None else bias + feed.share * carried_bias
        assert weight is not None  # at least one source layer feeds a target layer
        return weight, bias

    def _through(
        self, maps: tuple[Tensor, Tensor], read: WeightAndBias, projection: str, neurons: Tensor
    ) -> WeightAndBias:
        """A source layer's weight and bias through its maps."""
        try:
            return transport_neurons(*read, *maps, projection, neurons, self.device)
        except (MemoryError, RuntimeError) as error:
            if self.device.type == "cpu" or not is_out_of_memory(error):
                raise
        # Here the error no longer keeps what had no room.
        give_back_memory()
        if self.note is not None:
            self.note(f"{self.device} has no room for some weights and their maps: carried on the processor")
        return transport_neurons(*read, *maps, projection, neurons, torch.device("cpu"))

    def _factors(self, layer: int, source_layer: int, projection: str) -> tuple[float, float]:
        """What a carried weight, and a carried bias, are multiplied by."""
        # With units inputs and outputs are brought to the size that they have in the target, whatever its factors.
        if self.fusion.scale == "literal" or self.fusion.units != "none":
            return 1.0, 1.0
        own, read, score = self.target.multipliers, self.source.multipliers, 1.0
        if self.transport.matched:
            score = score_factor(projection, self.target.attention[layer], self.source.attention[source_layer])
        return score * own.weight_ratio(projection, read), score * own.output_ratio(projection, read)

    def _source_weight(self, layer: int, projection: str) -> WeightAndBias:
        """What is transported of a source layer: its weight and bias, or what they learned since the base."""
        view = self.source.layers[layer][projection]
        weight, bias = view.weight().float().cpu(), view.bias()
        bias = None if bias is None else bias.float().cpu()
        if self.source_base is None:
            return weight, bias
        base = self.source_base.layers[layer][projection]
        weight = weight - base.weight().float().cpu()
        base_bias = base.bias()
        if bias is not None and base_bias is not None:
            bias = bias - base_bias.float().cpu()
        if self.fusion.affine:
            mean = self.transport.statistics.source[layer, feature_key(projection, "pre")].mean
            bias = difference_bias(bias, weight, mean)
        return weight, bias

    def _affine_bias(
        self, layer: int, view: Projection, neurons: Tensor, own: Tensor, carried: WeightAndBias
    ) -> Tensor:
        """b~ of affine maps, from the transported neurons, what Phi_out made of the bias, and mu_A of all inputs."""
        weight, bias = carried
        mean = self.transport.statistics.target[layer, feature_key(view.name, "pre")].mean
        mean = mean[neurons] if view.name in COLUMN_PROJECTIONS else mean
        if self.source_base is not None:
            assert bias is not None  # `difference_bias` gave Phi_out something to carry
            return bias - weight @ mean
        own_bias = _own_bias(view, neurons)
        assert own_bias is not None  # `bias_fate` sees to it
        return mean_keeping_bias(own, own_bias, weight, mean)

    def bias_fate(self, view: Projection, neurons: Tensor) -> str:
        """What happens to a target projection's bias where these neurons are selected: ``fused``, or why not."""
        first_source = self.transport.layer_maps[view.name].source_layers[0]
        target_has, source_has = view.has_bias, self.source.layers[first_source][view.name].has_bias
        if not target_has and not source_has:
            return "none" if not self.fusion.affine else "left alone: the target has none for an affine map's"
        if not self.fusion.biases:
            return "left alone: fusion.biases is off"
        if not target_has:
            return "left alone: the target has none to write the source's into"
        if not source_has and not self.fusion.affine:
            return "left alone: the source has none"
        if view.name in COLUMN_PROJECTIONS and len(neurons) < view.in_features:
            # The bias belongs to the outputs; the neurons chosen here are inputs.
            return "left alone: it is fused only when all neurons are selected"
        return _FUSED


def _own_bias(view: Projection, neurons: Tensor) -> Tensor | None:
    """The target's bias: of the selected rows, or of all outputs where columns are selected; float32."""
    bias = view.bias()
    if bias is None:
        return None
    return bias.float().cpu() if view.name in COLUMN_PROJECTIONS else bias.float().cpu()[neurons]


def _with_unmatched_kept(
    view: Projection, neurons: Tensor, own: Tensor, carried: WeightAndBias, feeds: list[_Feed]
) -> WeightAndBias:
    """The target's own where an output or an input has no counterpart in any source layer that feeds it.

    Nothing is said of a weight there, which is not to say zero.
    """
    weight, bias = carried
    outputs = torch.stack([unmatched(feed.out_map, 0) for feed in feeds]).all(0)
    inputs = torch.stack([unmatched(feed.in_map, 1) for feed in feeds]).all(0)
    if view.name in COLUMN_PROJECTIONS:
        inputs = inputs[neurons]
    else:
        outputs = outputs[neurons]
    weight = torch.where(outputs.unsqueeze(1) | inputs, own, weight)
    own_bias = _own_bias(view, neurons)
    if bias is not None and own_bias is not None:
        bias = torch.where(outputs, own_bias, bias)
    return weight, bias


def _with_norms_of(own: Tensor, projection: str, carried: WeightAndBias) -> WeightAndBias:
    """Every neuron at the norm of the target's own; a row's bias along with it."""
    weight, bias = carried
    across = 0 if projection in COLUMN_PROJECTIONS else 1
    norm = torch.linalg.vector_norm(weight, dim=across)
    factor = torch.linalg.vector_norm(own, dim=across) / norm.clamp_min(torch.finfo(torch.float32).tiny)
    if across == 0:
        return weight * factor, bias
    return weight * factor.unsqueeze(1), None if bias is None else bias * factor
