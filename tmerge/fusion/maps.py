"""What maps are multiplied by, and with: units, and weights.

A map with a few entries a row is held as such: a one-to-one correspondence carries a weight by moving its rows. These
functions take dense maps as well, so that whoever carries weights need not know which kind a map is; from the left both
multiply as they are, ``mapping @ weight``.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from tmerge.transport import FeatureStatistics

__all__ = ["after", "scaled", "unit_factors", "unmatched"]

Units = Literal["none", "layer", "feature"]


def unit_factors(target: FeatureStatistics, source: FeatureStatistics, units: Units) -> tuple[Tensor, Tensor]:
    """How source units become target units on one side: ``target feature = a * average of (b * source feature)``.

    Args:
        target: Of the target's n neurons.
        source: Of the source's n' neurons.
        units: ``none``: both one. ``layer``: a is the ratio of root mean squares, b one. ``feature``: a the
            target's deviations, b one over the source's; a source neuron that never varies carries nothing, so its
            factor is zero rather than infinite. Near-dead source neurons still blow up: see METHOD on `units`.

    Returns:
        a (n,) and b (n',). Phi_out takes diag(a) Phi diag(b); Phi_in runs the other way and takes their inverses'
        counterpart, which is `unit_factors(source, target, units)`.
    """
    a = torch.ones_like(target.deviation)
    b = torch.ones_like(source.deviation)
    if units == "layer":
        rms = source.root_mean_square
        a = a * (target.root_mean_square / rms if rms > 0 else 1.0)
    elif units == "feature":
        a = target.deviation
        b = torch.where(source.deviation > 0, 1.0 / source.deviation, torch.zeros_like(source.deviation))
    return a, b


def scaled(mapping: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """diag(a) mapping diag(b), for a (n,) and b (m,)."""
    if not mapping.is_sparse:
        return a.unsqueeze(1) * mapping * b
    mapping = mapping.coalesce()
    rows, columns = mapping.indices()
    return torch.sparse_coo_tensor(
        mapping.indices(), a[rows] * mapping.values() * b[columns], mapping.shape, check_invariants=False
    ).coalesce()


def after(weight: Tensor, mapping: Tensor) -> Tensor:
    """``weight @ mapping``: of a weight (k, m), what a map (m, n) makes of its inputs; dense."""
    # Sparse matrices multiply from the left only.
    return (mapping.t() @ weight.t()).t().contiguous() if mapping.is_sparse else weight @ mapping


def unmatched(mapping: Tensor, dim: int) -> Tensor:
    """Which rows (dim 0) or columns (dim 1) of a map hold nothing; bool."""
    if not mapping.is_sparse:
        return (mapping == 0).all(1 - dim)
    mapping = mapping.coalesce()
    alone = torch.ones(mapping.shape[dim], dtype=torch.bool)
    alone[mapping.indices()[dim][mapping.values() != 0]] = False
    return alone
