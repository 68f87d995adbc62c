"""Matching neurons with each other: what a feature plan becomes as eps goes to zero.

Without regularisation, and with as many neurons on each side, an optimal plan is a permutation (Birkhoff), and
averaging takes nothing from the weights that it carries. Between two widths that leaves a question, which marginals of
1/n and 1/n' answer badly: they force a share of every neuron onto neurons that are no counterpart of it. So the
marginals are relaxed: of the narrower side every neuron has a partner, and a neuron of the wider side that is left over
joins the one that it resembles, if it resembles it as much as that one's own partner does (a copy), and else stays out.

A `Solver` also solves the regularised problem for the same similarities, for comparison (Eq. 8-9).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tmerge.transport.assignment import assign
from tmerge.transport.sinkhorn import plan_from_potentials, sinkhorn

__all__ = ["MATCHING", "Correspondence", "Solver", "match"]

# A neuron that is left over counts as a copy when it comes this near to the similarity of the partner that is there.
_COPY = 0.01
# Of a regularised plan, an entry below this share of its row's and of its column's largest is left out.
_NEGLIGIBLE = 1e-4


@dataclass(frozen=True)
class Correspondence:
    """Which source neurons stand for which target neurons, as a sparse plan.

    Attributes:
        rows: (E,) int64 target neurons.
        columns: (E,) int64 source neurons.
        values: (E,) float32: +1 or -1 of a matching (the sign that the source neuron is taken with), n * Q of a plan.
        shape: (n, n').
        iterations: Sinkhorn sweeps; 0 where the problem was solved exactly.
        marginal_error: Largest relative violation of the target's marginal.
    """

    rows: Tensor
    columns: Tensor
    values: Tensor
    shape: tuple[int, int]
    iterations: int = 0
    marginal_error: float = 0.0

    def dense(self) -> Tensor:
        """(n, n') float32 of the values, zero elsewhere."""
        plan = torch.zeros(self.shape)
        plan[self.rows, self.columns] = self.values
        return plan

    def signed(self, similarity: Tensor) -> Correspondence:
        """Its values with the signs of `similarity` (n, n'): which neurons are matched with their negative."""
        negative = similarity[self.rows, self.columns] < 0
        return replace(self, values=torch.where(negative, -self.values.abs(), self.values.abs()))

    def among(self, neurons: Tensor) -> Correspondence:
        """Of some of the target's neurons (k,) alone, which are counted from 0 then."""
        place = torch.full((self.shape[0],), -1)
        place[neurons] = torch.arange(len(neurons))
        kept = place[self.rows] >= 0
        rows, columns, values = place[self.rows[kept]], self.columns[kept], self.values[kept]
        return replace(self, rows=rows, columns=columns, values=values, shape=(len(neurons), self.shape[1]))

    def shuffled(self, seed: int) -> Correspondence:
        """The same with the source's neurons in another order: what chance gives."""
        order = torch.randperm(self.shape[1], generator=torch.Generator().manual_seed(seed))
        return replace(self, columns=order[self.columns])

    def partner(self) -> Tensor:
        """(n,) the strongest source neuron of every target neuron; -1 where it has none."""
        plan = self.dense().abs()
        return torch.where(plan.amax(1) > 0, plan.argmax(1), -1)

    @property
    def in_place(self) -> int:
        """How many target neurons have the source neuron of the same number as their strongest."""
        largest = torch.zeros(self.shape[0]).scatter_reduce(0, self.rows, self.values.abs(), "amax")
        is_strongest = self.values.abs() == largest[self.rows]
        return int((is_strongest & (self.rows == self.columns)).sum())

    @classmethod
    def of(cls, plan: Tensor, iterations: int = 0, marginal_error: float = 0.0) -> Correspondence:
        """From a dense plan (n, n')."""
        rows, columns = plan.nonzero(as_tuple=True)
        shape = (plan.shape[0], plan.shape[1])
        return cls(rows, columns, plan[rows, columns].float(), shape, iterations, marginal_error)


def match(similarity: Tensor) -> Correspondence:
    """The one-to-one matching of largest total similarity, with the neurons that are left over.

    Args:
        similarity: (n, n'), larger is more alike: correlations, or means of them.

    Returns:
        The pairs of `assign`, and copies among the neurons that they leave over.
    """
    rows, columns = assign(similarity)
    n, m = similarity.shape
    pair_similarities = similarity[rows, columns].double()
    if n > m:
        copies, of = _copies(similarity.T, _others(rows, n), columns, pair_similarities)
        rows, columns = torch.cat([rows, copies]), torch.cat([columns, of])
    elif m > n:
        copies, of = _copies(similarity, _others(columns, m), rows, pair_similarities)
        rows, columns = torch.cat([rows, of]), torch.cat([columns, copies])
    order = torch.argsort(rows * m + columns)
    return Correspondence(rows[order], columns[order], torch.ones(len(rows)), (n, m))


def _copies(similarity: Tensor, alone: Tensor, paired: Tensor, pair_similarities: Tensor) -> tuple[Tensor, Tensor]:
    """Neurons that are left over and no strangers, and whose copies they are.

    Args:
        similarity: (a, b) with the narrower side's neurons as rows, all of which have a partner.
        alone: Columns that are left over.
        paired: (a,) rows in the order of `pair_similarities`.
        pair_similarities: (a,) similarity of each to its partner.
    """
    nearness = torch.empty_like(pair_similarities)
    nearness[paired] = pair_similarities
    best = similarity[:, alone].max(0)
    copies = (best.values > 0) & (best.values >= nearness[best.indices] * (1 - _COPY))
    return alone[copies], best.indices[copies]


def _others(indices: Tensor, size: int) -> Tensor:
    """Those below `size` that are not among `indices`, ascending."""
    is_left_over = torch.ones(size, dtype=torch.bool)
    is_left_over[indices] = False
    return is_left_over.nonzero().flatten()


@dataclass(frozen=True)
class Solver:
    """How the correspondence of some neurons is found.

    Attributes:
        epsilon: Regularisation; None matches one to one.
        max_iterations: Sinkhorn sweeps.
        tolerance: Relative marginal violation.
        signed: Whether neurons of the stream, of v and of gated MLPs may meet their negative.
    """

    epsilon: float | None = None
    max_iterations: int = 200
    tolerance: float = 1e-6
    signed: bool = False

    def __call__(self, similarity: Tensor) -> Correspondence:
        """A matching, or with `epsilon` the entropic plan of cost 1 - similarity and uniform marginals (Eq. 8-9).

        Args:
            similarity: (n, n').
        """
        if self.epsilon is None:
            return match(similarity)
        cost = 1.0 - similarity.double()
        result = sinkhorn(cost, self.epsilon, max_iterations=self.max_iterations, tolerance=self.tolerance)
        plan = plan_from_potentials(cost, result.f, result.g, self.epsilon) * cost.shape[0]
        large = (plan >= _NEGLIGIBLE * plan.amax(1, keepdim=True)) | (plan >= _NEGLIGIBLE * plan.amax(0, keepdim=True))
        return Correspondence.of(torch.where(large, plan, 0.0), int(result.iterations), float(result.marginal_error))

    def either_sign(self, similarity: Tensor) -> Correspondence:
        """Likewise; neurons may meet their negative where they may."""
        return self(similarity.abs()).signed(similarity) if self.signed else self(similarity)


MATCHING = Solver()
"""One to one, each neuron as it is."""
