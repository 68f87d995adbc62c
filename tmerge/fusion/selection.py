"""Which neurons are fused (A.5): the k most active of each projection and layer.

A neuron is an output (a row) of q, k, v, gate and up, and an input (a column) of o and down: the same hidden
units, seen from the side where they are computed and from the side where they are read.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["COLUMN_PROJECTIONS", "neuron_count", "neuron_side", "select_neurons"]

COLUMN_PROJECTIONS = frozenset({"o", "down"})


def neuron_side(projection: str) -> str:
    """``pre`` where a projection's neurons are its inputs (o, down), else ``post``."""
    return "pre" if projection in COLUMN_PROJECTIONS else "post"


def neuron_count(top_k: int | float, neurons: int) -> int:
    """How many of `neurons` a setting selects: a count, or a fraction rounded to the nearest, at least one."""
    wanted = round(top_k * neurons) if isinstance(top_k, float) else top_k
    return max(1, min(wanted, neurons))


def select_neurons(score: Tensor, top_k: int | float) -> Tensor:
    """The highest-scoring neurons.

    Args:
        score: (n,) mean |activation| of the target over the calibration set, s_j of A.5.
        top_k: A count, or a fraction of n.

    Returns:
        (k,) int64 indices in ascending order; of equal scores the lower index is taken.
    """
    order = torch.sort(score, descending=True, stable=True).indices
    return torch.sort(order[: neuron_count(top_k, score.shape[0])]).values
