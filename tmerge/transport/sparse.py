"""Plans of which few entries are kept: as matrices to calculate with, and as rows to store.

Between an MLP of 14336 neurons and one of 8192, a dense plan has 117 million entries, of which 8192 are not zero in a
one-to-one correspondence.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from tmerge.transport.matching import Correspondence

__all__ = ["MASS_AT", "SparsePlans", "mass_of_top", "normalised_rows", "sparse_plan", "sparsify"]

_MASS_ROWS = 256
MASS_AT = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)
"""Numbers of entries at which a row's captured mass is recorded; past the row's length it is 1."""


@dataclass(frozen=True)
class SparsePlans:
    """Some plans of one shape (n, n'), each row's kept entries one after the other.

    Attributes:
        offsets: (K * n + 1,) int64, where each row begins in `columns` and `values`.
        columns: (E,) int16, or int32 where n' needs it.
        values: (E,) float16, n * Q, so that a row of the whole plan sums to 1.
        beyond: (B,) int64, sorted: entries that did not survive the top-entries rule. A row or column of which
            nothing survived is transported through its largest entry, so that one is stored as well.
        shape: (n, n').
    """

    offsets: Tensor
    columns: Tensor
    values: Tensor
    beyond: Tensor
    shape: tuple[int, int]

    def is_sound(self, count: int) -> bool:
        """Whether it holds `count` plans whose entries all lie within them: what was stored may be damaged."""
        n, m = self.shape
        entries = len(self.values)
        offsets, beyond, columns = self.offsets, self.beyond, self.columns
        if len(offsets) != count * n + 1 or len(columns) != entries or int(offsets[0]) != 0:
            return False
        within = int(offsets[-1]) == entries and bool((offsets.diff() >= 0).all()) and bool((beyond.diff() > 0).all())
        inside = [(columns, m), (beyond, entries)]
        return within and all(not len(t) or (int(t.min()) >= 0 and int(t.max()) < end) for t, end in inside)

    def dense(self, index: int) -> Tensor:
        """Plan number `index` as (n, n') float32, entries of n * Q, zeros where nothing survived."""
        plan, mask = self.read(index)
        return torch.where(mask, plan, 0.0)

    def sparse(self, index: int) -> Tensor:
        """Plan number `index` as (n, n') sparse float32, entries of n * Q, with what survived."""
        n, m = self.shape
        rows, columns, values, survived = self._entries(index)
        indices = torch.stack([rows[survived], columns[survived]])
        return torch.sparse_coo_tensor(indices, values[survived], (n, m), check_invariants=False).coalesce()

    def read(self, index: int) -> tuple[Tensor, Tensor]:
        """Plan number `index` with all its stored entries, (n, n') float32 of n * Q, and which of them survived."""
        n, m = self.shape
        rows, columns, values, survived = self._entries(index)
        plan, mask = torch.zeros(n, m), torch.zeros(n, m, dtype=torch.bool)
        plan[rows, columns] = values
        mask[rows, columns] = survived
        return plan, mask

    def _entries(self, index: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Rows, columns, values and whether they survived, of the E entries of one plan."""
        n = self.shape[0]
        offsets = self.offsets[index * n : (index + 1) * n + 1]
        start, stop = int(offsets[0]), int(offsets[-1])
        rows, columns = torch.repeat_interleave(torch.arange(n), offsets.diff()), self.columns[start:stop].long()
        survived = torch.ones(stop - start, dtype=torch.bool)
        first, last = torch.searchsorted(self.beyond, torch.tensor([start, stop])).tolist()
        survived[self.beyond[first:last] - start] = False
        return rows, columns, self.values[start:stop].float(), survived


def sparsify(plans: list[Tensor], masks: list[Tensor | None]) -> SparsePlans:
    """Gather the masked entries of plans Q (n, n') of one shape, as n * Q in float16; of sparse plans all entries."""
    counts, columns, values, survived = [], [], [], []
    for plan, mask in zip(plans, masks, strict=True):
        if mask is None:
            (rows, plan_columns), entries = plan.indices(), plan.values()
            remaining = torch.ones(len(rows), dtype=torch.bool)
        else:
            rows, plan_columns = (mask | _largest_of_empty(plan, mask)).nonzero(as_tuple=True)
            entries, remaining = plan[rows, plan_columns], mask[rows, plan_columns]
        counts.append(torch.bincount(rows, minlength=plan.shape[0]))
        columns.append(plan_columns.to(torch.int16 if plan.shape[1] <= torch.iinfo(torch.int16).max else torch.int32))
        values.append((entries * plan.shape[0]).to(torch.float16))
        survived.append(remaining)
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), torch.cat(counts).cumsum(0)])
    beyond = (~torch.cat(survived)).nonzero().flatten()
    n, m = plans[0].shape
    return SparsePlans(offsets, torch.cat(columns), torch.cat(values), beyond, (n, m))


def _largest_of_empty(plan: Tensor, mask: Tensor) -> Tensor:
    """(n, n') bool: the largest entry of every row and of every column of which the mask keeps nothing."""
    largest = torch.zeros_like(mask)
    rows, columns = (~mask.any(1)).nonzero().flatten(), (~mask.any(0)).nonzero().flatten()
    largest[rows, plan[rows].argmax(1)] = True
    largest[plan[:, columns].argmax(0), columns] = True
    return largest


def mass_of_top(plan: Tensor) -> Tensor:
    """Share of each row's mass in its largest entries, mean over rows, at the numbers in `MASS_AT` (Figure 3).

    Args:
        plan: (n, n'); of more than 256 rows, evenly spaced ones are read, 256 at most.

    Returns:
        (len(MASS_AT),) float32, rising to 1. A row without an entry, of a neuron without a counterpart, has no mass.
    """
    rows = plan.index_select(0, torch.arange(0, plan.shape[0], -(-plan.shape[0] // _MASS_ROWS)))
    rows = rows.to_dense() if rows.is_sparse else rows
    ordered = np.sort(rows.abs().numpy(), axis=1)[:, ::-1]
    ordered = ordered[ordered[:, 0] > 0]
    if not len(ordered):
        return torch.ones(len(MASS_AT))
    share = np.cumsum(ordered, axis=1, dtype=np.float64)
    share /= share[:, -1:]
    return torch.tensor([share[:, min(k, plan.shape[1]) - 1].mean() for k in MASS_AT], dtype=torch.float32)


def sparse_plan(correspondence: Correspondence, kept: int) -> Tensor | None:
    """A correspondence as a plan Q, (n, n') sparse, or None where `kept` would leave some of its entries out.

    Args:
        correspondence: Its values are n * Q.
        kept: Entries that survive per row and per column (`mutual_top`).
    """
    n, m = correspondence.shape
    most = max(int(torch.bincount(index, minlength=1).max()) for index in (correspondence.rows, correspondence.columns))
    if most > kept:
        return None
    return torch.sparse_coo_tensor(
        torch.stack([correspondence.rows, correspondence.columns]),
        correspondence.values / n,
        (n, m),
        check_invariants=False,
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
