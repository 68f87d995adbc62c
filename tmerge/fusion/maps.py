"""Phi_out and Phi_in: what a plan becomes before it meets a weight (Theorem 4.1).

The transported weight ``W~ = Phi_out W_B Phi_in`` reads: carry the target's features into the source's
coordinates (Phi_in), apply the source's weight, carry the result back (Phi_out). In size that holds only when the
maps are averages. A plan's rows sum to 1/n, so as published (`literal`) the transported weight is about n * n'
times too small and the fusion a mere shrinking; `barycentric` rescales the rows to sum to one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from tmerge.fusion.sparse import normalised_rows
from tmerge.transport import mutual_top

__all__ = ["FeatureStatistics", "phi_in", "phi_out", "unit_factors"]

Scale = Literal["barycentric", "literal", "row-norm"]
Units = Literal["none", "layer", "feature"]


@dataclass(frozen=True)
class FeatureStatistics:
    """Per-neuron statistics of one feature over the calibration set.

    Attributes:
        mean: (n,) mean over texts.
        deviation: (n,) standard deviation over texts.
        magnitude: (n,) mean |activation| over texts, the selection score of A.5.
    """

    mean: Tensor
    deviation: Tensor
    magnitude: Tensor

    @classmethod
    def of(cls, features: Tensor) -> FeatureStatistics:
        """Statistics of features (T, n), summed in float64 and returned in float32."""
        exact = features.to(torch.float64)
        return cls(
            exact.mean(0).to(torch.float32),
            exact.std(0, correction=0).to(torch.float32),
            exact.abs().mean(0).to(torch.float32),
        )

    @property
    def root_mean_square(self) -> float:
        """Root mean square over texts and neurons."""
        return float((self.deviation.double().square() + self.mean.double().square()).mean().sqrt())


def phi_out(plan: Tensor, *, scale: Scale, kept: int, mask: Tensor | None = None, partial: bool = False) -> Tensor:
    """Phi_out of a post-side plan: each target output as an average of source outputs.

    Args:
        plan: (n, n') Q, entries summing to 1. A sparse one is a correspondence all of whose entries survive.
        scale: ``barycentric`` and ``row-norm`` give rows that sum to 1: n * Q, sparsified and renormalised.
            ``literal`` gives the sparsified plan as it is.
        kept: Entries that survive per row and per column.
        mask: (n, n') which entries survive, where `mutual_top` has already been asked.
        partial: A correspondence (`tmerge.transport.matching`): entries have signs, and a neuron without an entry has
            no counterpart and carries nothing.

    Returns:
        (n, n'), sparse where the plan is.
    """
    if plan.is_sparse:
        return plan if scale == "literal" else normalised_rows(plan)
    return _map(plan, mutual_top(plan, kept) if mask is None else mask, scale, partial)


def phi_in(plan: Tensor, *, scale: Scale, kept: int, mask: Tensor | None = None, partial: bool = False) -> Tensor:
    """Phi_in of a pre-side plan: each source input as an average of target inputs.

    Args:
        plan: (n, n') as for `phi_out`.
        scale: As for `phi_out`; barycentric is n' * Q^T, sparsified and renormalised.
        kept: Entries that survive per row and per column.
        mask: (n, n') as for `phi_out`.
        partial: As for `phi_out`.

    Returns:
        (n', n), sparse where the plan is.
    """
    if plan.is_sparse:
        return phi_out(plan.t().coalesce(), scale=scale, kept=kept)
    return _map(plan.T, (mutual_top(plan, kept) if mask is None else mask).T, scale, partial)


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
