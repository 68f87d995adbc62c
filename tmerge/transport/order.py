"""Which source layer each target layer is, before any neuron is matched: similar representations, in order.

Linear CKA compares two layers' features by their inner products over the texts, so it needs no correspondence of
neurons (Kornblith et al. 2019, arXiv 1905.00414, Eq. 3). Neighbouring layers of a residual stream are alike, and one
layer's best counterpart may be a neighbour's by a hair; that layers follow one another in both models settles it.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from tmerge.transport.cost import standardise

__all__ = ["cka", "gram", "in_order"]


def gram(features: Tensor) -> Tensor:
    """The centred inner products of one layer's features, of norm one.

    Args:
        features: (T, n); T texts or tokens.

    Returns:
        (T, T) float32: X X^T of the standardised columns over its Frobenius norm, its diagonal left out, which holds
        nothing of the likeness of two texts and most of the norm where n is large (the unbiased form of Song et al.
        2012 leaves it out likewise). Zero where nothing varies.
    """
    columns = standardise(features)
    products = columns @ columns.T
    products.fill_diagonal_(0.0)
    norm = torch.linalg.vector_norm(products)
    return products / norm if norm > 0 else products


def cka(target: Tensor, source: Tensor) -> float:
    """Similarity of two layers, at most 1, from their `gram` matrices over the same texts."""
    return float((target * source).sum())


def in_order(similarity: Tensor) -> Tensor:
    """One source layer for every target layer, in order, of largest total similarity (dynamic programme).

    Args:
        similarity: (L, M).

    Returns:
        (L,) int64, strictly increasing where L <= M; else not decreasing, since some source layers must serve twice.
    """
    layers, others = similarity.shape
    exact = similarity.double()
    step = 1 if layers <= others else 0
    best = torch.full((layers, others), -math.inf, dtype=torch.float64)
    came = torch.zeros(layers, others, dtype=torch.int64)
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
