r"""The assignment of largest total similarity, without looking at most of the entries.

Between relatives nearly every neuron's partner is among the few that are nearest to it. So the problem is solved on
these candidates alone, as a sparse one, and then held against all entries: with the potentials v of the dual linear
program, the assignment is the best of all if

    S_ij + v_j <= S_i,p(i) + v_p(i)     for every i and j,     v <= 0, and 0 where nobody is assigned,

p(i) being i's partner (Kuhn 1955; the potentials are shortest paths from the assignment, Bellman and Ford). Entries
that break this join the candidates, and it is solved again, until none does: the result is exact, whatever the
candidates were. Where too many join, the dense solver is quicker and takes over.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from scipy.sparse import csr_array
from scipy.sparse.csgraph import min_weight_full_bipartite_matching
from torch import Tensor

__all__ = ["assign"]

# Entries of a problem from which on candidates are quicker than all.
_LARGE = 1 << 22
# Nearest neurons that each neuron of the narrower side begins with, and how many join it at most in a round.
_CANDIDATES, _JOINING = 16, 32
# Rounds after which the candidates are no fewer than all that matters.
_ROUNDS = 16
# Sweeps after which potentials take longer than the dense solver does.
_SWEEPS = 500
# Rows whose entries are held against the potentials at a time.
_ROWS = 256
# Of similarities, which are at most about 1: what float32 cannot tell from nothing.
_TOLERANCE = 1e-9


def assign(similarity: Tensor, *, large: int = _LARGE) -> tuple[Tensor, Tensor]:
    """Give each neuron of the narrower side one of the other, no two the same, so that similarities sum to the most.

    Args:
        similarity: (n, n') finite.
        large: Entries from which on candidates are tried.

    Returns:
        (k,) int64 rows, ascending where n <= n', and (k,) int64 columns, k = min(n, n').
    """
    if similarity.numel() >= large:
        wide = similarity.shape[0] > similarity.shape[1]
        partners = _by_candidates(similarity.T.contiguous() if wide else similarity)
        if partners is not None:
            narrower = torch.arange(len(partners))
            return (partners, narrower) if wide else (narrower, partners)
    rows, columns = linear_sum_assignment(similarity.double().numpy(), maximize=True)
    return torch.from_numpy(rows), torch.from_numpy(columns)


@dataclass
class _Candidates:
    """Entries of an (n, m) problem that are looked at, each once, row by row."""

    rows: Tensor
    columns: Tensor
    values: Tensor
    shape: tuple[int, int]

    @classmethod
    def first(cls, similarity: Tensor) -> _Candidates:
        """Each row's nearest, and a diagonal, along which there is an assignment whatever else there is."""
        n, m = similarity.shape
        near = similarity.topk(min(_CANDIDATES, m), 1).indices
        diagonal = torch.arange(n)
        return cls.of(
            similarity,
            torch.cat([near.flatten(), diagonal]),
            torch.cat([diagonal.repeat_interleave(near.shape[1]), diagonal]),
        )

    @classmethod
    def of(cls, similarity: Tensor, columns: Tensor, rows: Tensor) -> _Candidates:
        n, m = similarity.shape
        entries = torch.unique(rows * m + columns)
        rows, columns = entries // m, entries % m
        return cls(rows, columns, similarity[rows, columns].double(), (n, m))

    def joined_by(self, similarity: Tensor, columns: Tensor, rows: Tensor) -> _Candidates:
        """With further entries."""
        return self.of(similarity, torch.cat([self.columns, columns]), torch.cat([self.rows, rows]))

    def solved(self) -> Tensor:
        """(n,) the best columns among the candidates."""
        # Costs of at least 1: an entry of zero would be none.
        costs = (self.values.max() - self.values + 1).numpy()
        graph = csr_array((costs, (self.rows.numpy(), self.columns.numpy())), shape=self.shape)
        rows, columns = min_weight_full_bipartite_matching(graph)
        return torch.from_numpy(columns[np.argsort(rows)].astype(np.int64))

    def potentials(self, partners: Tensor) -> Tensor | None:
        """(m,) v of the dual, for the candidates' best assignment; None where it takes too long to find."""
        partner_similarities = torch.zeros(self.shape[0], dtype=torch.float64)
        at = self.columns == partners[self.rows]
        partner_similarities[self.rows[at]] = self.values[at]
        lengths = partner_similarities[self.rows] - self.values
        from_columns = partners[self.rows]
        column_potentials = torch.zeros(self.shape[1], dtype=torch.float64)
        for _ in range(_SWEEPS):
            reached = column_potentials.scatter_reduce(
                0, self.columns, column_potentials[from_columns] + lengths, "amin"
            )
            if bool((column_potentials - reached).max() <= _TOLERANCE / 10):
                return column_potentials
            column_potentials = reached
        return None


def _by_candidates(similarity: Tensor) -> Tensor | None:
    """(n,) partners of an (n, m) problem, n <= m; None where the dense solver is quicker."""
    candidates = _Candidates.first(similarity)
    most = similarity.numel() // 8
    for _ in range(_ROUNDS):
        partners = candidates.solved()
        potentials = candidates.potentials(partners)
        if potentials is None:
            return None
        rows, columns = _breaking(similarity, partners, potentials)
        if not len(rows):
            return partners
        candidates = candidates.joined_by(similarity, columns, rows)
        if len(candidates.rows) > most:
            return None
    return None


def _breaking(similarity: Tensor, partners: Tensor, potentials: Tensor) -> tuple[Tensor, Tensor]:
    """Rows and columns of the entries by which each row could do better, at most `_JOINING` of it."""
    breaking_rows, breaking_columns = [], []
    for start in range(0, len(similarity), _ROWS):
        similarities = similarity[start : start + _ROWS].double()
        own_partners = partners[start : start + _ROWS, None]
        attained = similarities.gather(1, own_partners) + potentials[own_partners] + _TOLERANCE
        reached = similarities + potentials
        rows = (reached.amax(1, keepdim=True) > attained).flatten().nonzero().flatten()
        best = reached[rows].topk(min(_JOINING, reached.shape[1]), 1)
        which, ranks = (best.values > attained[rows]).nonzero(as_tuple=True)
        breaking_rows.append(rows[which] + start)
        breaking_columns.append(best.indices[which, ranks])
    return torch.cat(breaking_rows), torch.cat(breaking_columns)
