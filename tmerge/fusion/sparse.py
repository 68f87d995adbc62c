"""Maps with a few entries a row, held as such: a one-to-one correspondence carries a weight by moving its rows.

Between an MLP of 14336 neurons and one of 8192, a dense map has 117 million entries of which 8192 are not zero. These
functions take dense maps as well, so that whoever carries weights need not know which kind a map is; from the left both
multiply as they are, ``mapping @ weight``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tmerge.transport import Correspondence

__all__ = ["after", "normalised_rows", "scaled", "sparse_plan", "unmatched"]


def sparse_plan(found: Correspondence, kept: int) -> Tensor | None:
    """A correspondence as a plan Q, (n, n') sparse, or None where `kept` would leave some of its entries out.

    Args:
        found: Its values are n * Q.
        kept: Entries that survive per row and per column (`mutual_top`).
    """
    n, m = found.shape
    most = max(int(torch.bincount(index, minlength=1).max()) for index in (found.rows, found.columns))
    if most > kept:
        return None
    return torch.sparse_coo_tensor(
        torch.stack([found.rows, found.columns]), found.values / n, (n, m), check_invariants=False
    ).coalesce()


def after(weight: Tensor, mapping: Tensor) -> Tensor:
    """``weight @ mapping``: of a weight (k, m), what a map (m, n) makes of its inputs; dense."""
    # Sparse matrices multiply from the left only.
    return (mapping.t() @ weight.t()).t().contiguous() if mapping.is_sparse else weight @ mapping


def scaled(mapping: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """diag(a) mapping diag(b), for a (n,) and b (m,)."""
    if not mapping.is_sparse:
        return a.unsqueeze(1) * mapping * b
    mapping = mapping.coalesce()
    rows, columns = mapping.indices()
    return torch.sparse_coo_tensor(
        mapping.indices(), a[rows] * mapping.values() * b[columns], mapping.shape, check_invariants=False
    ).coalesce()


def normalised_rows(plan: Tensor) -> Tensor:
    """A plan (n, m) with signs, each row's absolute values summing to 1; a row without an entry stays empty."""
    tiny = torch.finfo(plan.dtype).tiny
    if not plan.is_sparse:
        return plan / plan.abs().sum(1, keepdim=True).clamp_min(tiny)
    plan = plan.coalesce()
    rows, values = plan.indices()[0], plan.values()
    sums = torch.zeros(plan.shape[0], dtype=values.dtype).index_add_(0, rows, values.abs())
    values = values / sums[rows].clamp_min(tiny)
    return torch.sparse_coo_tensor(plan.indices(), values, plan.shape, check_invariants=False).coalesce()


def unmatched(mapping: Tensor, dim: int) -> Tensor:
    """Which rows (dim 0) or columns (dim 1) of a map hold nothing; bool."""
    if not mapping.is_sparse:
        return (mapping == 0).all(1 - dim)
    mapping = mapping.coalesce()
    alone = torch.ones(mapping.shape[dim], dtype=torch.bool)
    alone[mapping.indices()[dim][mapping.values() != 0]] = False
    return alone
