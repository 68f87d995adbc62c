"""Fusing the source's projections into the target's (Eq. 14).

    W <- W + alpha * mask * (sum_m w[l, m] * Phi_out W_B^(m) Phi_in - W)

over the selected neurons (the mask), with w the kept layer weights. For a task vector, what is transported is the
difference W_B - W_B0 that fine-tuning made, and it is added: W <- W + alpha * mask * sum_m w[l, m] * transported.
`transport_neurons` computes what alpha multiplies, for the selected neurons alone; `fused_neurons` applies it.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import overload

import torch
from torch import Tensor

from tmerge.fusion.maps import after
from tmerge.fusion.selection import COLUMN_PROJECTIONS
from tmerge.models import Projection, group_of
from tmerge.transport.maps import Scale

__all__ = [
    "CPU",
    "Alpha",
    "NeuronSequence",
    "TransportedNeurons",
    "alpha_of",
    "fuse",
    "fused_neurons",
    "layer_weights",
    "places_of",
    "read_neurons",
    "transport_neurons",
]

CPU = torch.device("cpu")

Alpha = float | Mapping[str, float]
"""Fusion strength: one for all projections, or one for each (projections that it does not name are left alone); what
else a task vector changes goes by the name ``stream``."""


def alpha_of(alpha: Alpha, projection: str) -> float:
    """The strength that a projection is fused with."""
    return alpha.get(group_of(projection), 0.0) if isinstance(alpha, Mapping) else alpha


@dataclass(frozen=True)
class TransportedNeurons:
    """What the source has to say about the selected neurons of one target projection.

    Attributes:
        layer: Target layer.
        projection: Its name, or of what else a task vector changes; the layer behind the last holds what
            belongs to none.
        neurons: (k,) selected rows (q k v gate up) or columns (o down).
        weight: (k, in) transported rows, or (out, k) transported columns, float32.
        bias: (k,) for rows, (out,) for columns; None where it is not fused.
        is_difference: Whether this is a task vector to be added, not a weight to move towards.
    """

    layer: int
    projection: str
    neurons: Tensor
    weight: Tensor
    bias: Tensor | None
    is_difference: bool = False


class NeuronSequence(Sequence[TransportedNeurons]):
    """Transported neurons that are made or read when they are asked for, one item at a time; `_item` gives one."""

    @overload
    def __getitem__(self, index: int) -> TransportedNeurons: ...
    @overload
    def __getitem__(self, index: slice) -> list[TransportedNeurons]: ...
    def __getitem__(self, index: int | slice) -> TransportedNeurons | list[TransportedNeurons]:
        if isinstance(index, slice):
            return [self[number] for number in range(*index.indices(len(self)))]
        return self._item(index)

    def places(self) -> list[tuple[int, str]]:
        """Layer and projection of each item, in order; no item is made where they are known without."""
        return [(item.layer, item.projection) for item in self]

    @abstractmethod
    def _item(self, index: int) -> TransportedNeurons: ...


def places_of(transported: Sequence[TransportedNeurons]) -> list[tuple[int, str]]:
    """As `NeuronSequence.places`, of any sequence."""
    if isinstance(transported, NeuronSequence):
        return transported.places()
    return [(item.layer, item.projection) for item in transported]


def layer_weights(kept: Tensor, layers: int, scale: Scale) -> Tensor:
    """Weights of the kept source layers of one target layer.

    Args:
        kept: (k,) entries sqrt(P_pre * P_post) of the target layer's row.
        layers: L, the number of target layers.
        scale: ``literal`` multiplies by L, as the official code does. Otherwise they are renormalised to sum to
            one, so that the transported weight is an average over source layers.

    Returns:
        (k,).
    """
    return kept * layers if scale == "literal" else kept / kept.sum()


def transport_neurons(
    weight: Tensor,
    bias: Tensor | None,
    out_map: Tensor,
    in_map: Tensor,
    projection: str,
    neurons: Tensor,
    device: torch.device = CPU,
) -> tuple[Tensor, Tensor | None]:
    """The selected rows or columns of Phi_out W_B Phi_in, and of Phi_out b_B (Theorem 4.1).

    Args:
        weight: (out', in') of the source projection.
        bias: (out',) or None.
        out_map: (out, out') Phi_out, dense or sparse.
        in_map: (in', in) Phi_in, dense or sparse.
        projection: Decides whether `neurons` are rows or columns.
        neurons: (k,) int64.
        device: Where dense maps are multiplied. Sparse ones move neurons, which is done where these are.

    Returns:
        (k, in) and (k,), or for o and down (out, k) and (out,); float32, on the CPU.
    """
    by_columns = projection in COLUMN_PROJECTIONS
    if by_columns:
        in_map = in_map.index_select(1, neurons)
    else:
        out_map = out_map.index_select(0, neurons)
    if not (out_map.is_sparse or in_map.is_sparse):
        weight, out_map, in_map = (factor.to(device) for factor in (weight, out_map, in_map))
        bias = None if bias is None else bias.to(device)
    # Of columns the thin factor first: (out', in') (in', k), then (out, out') (out', k).
    carried = out_map @ after(weight, in_map) if by_columns else after(out_map @ weight, in_map)
    return carried.cpu(), None if bias is None else (out_map @ bias).cpu()


def read_neurons(projection: Projection, neurons: Tensor) -> Tensor:
    """The target's own selected rows (k, in) or columns (out, k), float32."""
    weight = projection.weight()
    own = weight[:, neurons] if projection.name in COLUMN_PROJECTIONS else weight[neurons]
    return own.to(torch.float32)


def fused_neurons(own: Tensor, transported: Tensor, alpha: float, *, is_difference: bool = False) -> Tensor:
    """Eq. 14 on the selected neurons: own + alpha * (transported - own), or own + alpha * task vector."""
    return own + alpha * (transported if is_difference else transported - own)


def fuse(
    layers: Sequence[dict[str, Projection]],
    transported: Sequence[TransportedNeurons],
    alpha: Alpha,
    *,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Write the fused neurons into the target's own memory.

    Everything else keeps its bytes: rows and columns that were not selected, embeddings, norms and the head; where
    alpha is 0 nothing is written at all.

    Args:
        layers: The target's projections, `Architecture.views`.
        transported: For every fused layer and projection.
        alpha: Fusion strength, or one for each projection.
        progress: Called with (done, all).
    """
    for done, transported_neurons in enumerate(transported, start=1):
        strength = alpha_of(alpha, transported_neurons.projection)
        if strength == 0:
            continue
        view = layers[transported_neurons.layer][transported_neurons.projection]
        neurons = transported_neurons.neurons
        own = read_neurons(view, neurons)
        # What was transported stays on the CPU; the target may not.
        carried = transported_neurons.weight.to(own.device)
        fused = fused_neurons(own, carried, strength, is_difference=transported_neurons.is_difference)
        by_columns = transported_neurons.projection in COLUMN_PROJECTIONS
        own_bias = view.bias()
        bias = None
        if transported_neurons.bias is not None and own_bias is not None:
            selected_bias = own_bias.to(torch.float32)
            selected_bias = selected_bias if by_columns else selected_bias[neurons]
            bias = fused_neurons(
                selected_bias,
                transported_neurons.bias.to(selected_bias.device),
                strength,
                is_difference=transported_neurons.is_difference,
            )
        if by_columns:
            view.write(fused, columns=neurons)
            if bias is not None:
                view.write(bias=bias)
        else:
            view.write(fused, bias=bias, rows=neurons)
        if progress is not None:
            progress(done, len(transported))
