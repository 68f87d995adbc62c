"""Which source layer each target layer is, before one correspondence is solved for all of them.

Two layers are as far apart as their neurons are from the nearest ones of the other side: the cost of semi-relaxed
transport without regularisation, in which every target neuron goes to the source neuron of least cost (Eq. 10 with the
source's marginal free and eps towards 0). It needs no iteration, so every pair of layers can be asked, and some of the
neurons and texts suffice. That layers follow one another in both models then settles what is nearly equal: neighbouring
layers of a residual stream are alike.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from tmerge.transport.cost import standardise

__all__ = ["in_order", "layer_features", "nearest_cost", "sampled"]

# Texts and target neurons that a layer is known by.
_ROWS = 512
_NEURONS = 256


def sampled(features: Tensor, *, neurons: int | None = None) -> Tensor:
    """Standardised columns over evenly spaced rows.

    Args:
        features: (T, n).
        neurons: Take evenly spaced columns, this many at most; all if None.
    """
    rows = features[:: -(-features.shape[0] // _ROWS)]
    if neurons is not None:
        rows = rows[:, :: -(-features.shape[1] // neurons)]
    return standardise(rows)


def nearest_cost(target: Tensor, source: Tensor, *, signed: bool = False) -> float:
    """Mean over the target's neurons of 1 - correlation with the source neuron that is most like it, in [0, 1].

    Args:
        target: (T, n) from `sampled`.
        source: (T, n') likewise, over the same rows.
        signed: Whether a neuron's negative is as like it as the neuron itself.
    """
    # A neuron without a likeness is at cost 1, as one that never varies is.
    likeness = target.T @ source
    return float(1.0 - (likeness.abs() if signed else likeness).amax(1).clamp_min(0.0).mean())


def layer_features(features: Tensor) -> Tensor:
    """What a target layer is known by."""
    return sampled(features, neurons=_NEURONS)


def in_order(similarity: Tensor) -> Tensor:
    """One source layer for every target layer, in order, of largest total similarity (dynamic programme).

    Args:
        similarity: (L, M).

    Returns:
        (L,) int64, strictly increasing where L <= M; else not decreasing, since some source layers must serve twice.
    """
    layers, source_layers = similarity.shape
    exact = similarity.double()
    step = 1 if layers <= source_layers else 0
    best = torch.full((layers, source_layers), -math.inf, dtype=torch.float64)
    came = torch.zeros(layers, source_layers, dtype=torch.int64)
    best[0] = exact[0]
    for layer in range(1, layers):
        reach, where = torch.cummax(best[layer - 1], 0)
        if step:
            best[layer, 1:] = reach[:-1] + exact[layer, 1:]
            came[layer, 1:] = where[:-1]
        else:
            best[layer] = reach + exact[layer]
            came[layer] = where
    chosen = torch.empty(layers, dtype=torch.int64)
    chosen[-1] = best[-1].argmax()
    for layer in range(layers - 1, 0, -1):
        chosen[layer - 1] = came[layer, chosen[layer]]
    return chosen
