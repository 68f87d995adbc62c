"""Phi_out and Phi_in: what a plan becomes before it meets a weight (Theorem 4.1).

The transported weight ``W~ = Phi_out W_B Phi_in`` reads: carry the target's features into the source's
coordinates (Phi_in), apply the source's weight, carry the result back (Phi_out). In size that holds only when the
maps are averages. A plan's rows sum to 1/n, so as published (`literal`) the transported weight is about n * n'
times too small and the fusion a mere shrinking; `barycentric` rescales the rows to sum to one.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from tmerge.transport.plans import mutual_top
from tmerge.transport.sparse import normalised_rows

__all__ = ["Scale", "phi_in", "phi_out"]

Scale = Literal["barycentric", "literal", "row-norm"]


def phi_out(
    plan: Tensor, *, scale: Scale, kept: int | None = None, mask: Tensor | None = None, partial: bool = False
) -> Tensor:
    """Phi_out of a post-side plan: each target output as an average of source outputs.

    Args:
        plan: (n, n') Q, entries summing to 1. A sparse one is a correspondence all of whose entries survive.
        scale: ``barycentric`` and ``row-norm`` give rows that sum to 1: n * Q, sparsified and renormalised.
            ``literal`` gives the sparsified plan as it is.
        kept: Entries that survive per row and per column; all of them if None.
        mask: (n, n') which entries survive, where `mutual_top` has already been asked.
        partial: A correspondence (`tmerge.transport.matching`): entries have signs, and a neuron without an entry has
            no counterpart and carries nothing.

    Returns:
        (n, n'), sparse where the plan is.
    """
    if plan.is_sparse:
        return plan if scale == "literal" else normalised_rows(plan)
    return _map(plan, _survivors(plan, kept) if mask is None else mask, scale, partial)


def phi_in(
    plan: Tensor, *, scale: Scale, kept: int | None = None, mask: Tensor | None = None, partial: bool = False
) -> Tensor:
    """Phi_in of a pre-side plan: each source input as an average of target inputs.

    Args:
        plan: (n, n') as for `phi_out`.
        scale: As for `phi_out`; barycentric is n' * Q^T, sparsified and renormalised.
        kept: As for `phi_out`.
        mask: (n, n') as for `phi_out`.
        partial: As for `phi_out`.

    Returns:
        (n', n), sparse where the plan is.
    """
    if plan.is_sparse:
        return phi_out(plan.t().coalesce(), scale=scale, kept=kept)
    return _map(plan.T, (_survivors(plan, kept) if mask is None else mask).T, scale, partial)


def _survivors(plan: Tensor, kept: int | None) -> Tensor:
    return torch.ones_like(plan, dtype=torch.bool) if kept is None else mutual_top(plan, kept)


def _map(plan: Tensor, mask: Tensor, scale: Scale, partial: bool) -> Tensor:
    kept = torch.where(mask, plan, torch.zeros_like(plan))
    if scale == "literal":
        return kept
    if partial:
        # Rows without an entry stay zero.
        return normalised_rows(kept)
    # A row whose every entry lost the mutual vote would transport zeros, which is a shrinking in disguise:
    # it keeps its single largest entry instead. So does one left with entries that underflowed to zero.
    empty = kept.sum(1) == 0
    if bool(empty.any()):
        rows = empty.nonzero(as_tuple=True)[0]
        kept[rows, plan[rows].argmax(1)] = 1.0
    return kept / kept.sum(1, keepdim=True)
