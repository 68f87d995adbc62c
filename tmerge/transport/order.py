"""Pairing in order: what layers are, and layers follow one another in both models alike."""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["in_order"]


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
