"""A feature plan at screen size: an order in which its structure shows, and the mass of its blocks.

A plan couples hundreds to thousands of neurons with as many others: more than a screen has pixels, and in an order
that means little, as the neurons of a residual stream can be permuted freely. Here rows and columns are first put in
order, then summed into blocks. Only the sparse entries are touched, so a plan of any size takes a moment.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np

from tmerge.transport import SparsePlans

__all__ = [
    "Blocks",
    "Entries",
    "Order",
    "plan_blocks",
    "plan_entries",
    "plan_orders",
    "structure_order",
    "window_blocks",
]

Order = Literal["structure", "natural"]

# A group of this many neurons is ordered along one axis and not split again.
_LEAF = 16
# Steps of the power iteration. Its axis need not be exact: any direction of the leading few splits well.
_STEPS = 8
# A group with an entry to so many pairs of neurons is multiplied as a dense matrix: its zeros cost less than gathering.
_DENSE = 16


@dataclass(frozen=True)
class Entries:
    """A sparse plan's entries.

    Attributes:
        rows: (E,) target neurons, int64.
        columns: (E,) source neurons, int64.
        mass: (E,) their share of the whole plan's mass, float64; they sum to the share that was kept.
        shape: (n, n').
    """

    rows: np.ndarray
    columns: np.ndarray
    mass: np.ndarray
    shape: tuple[int, int]


@dataclass(frozen=True)
class Blocks:
    """A plan summed into blocks of neurons.

    Attributes:
        mass: (a, b) share of the whole plan's mass in each block, float64; sums to `Entries.mass`'s sum.
        rows: The target neurons of each of the a block rows.
        columns: The source neurons of each of the b block columns.
        shape: (n, n') of the plan.
    """

    mass: np.ndarray
    rows: list[np.ndarray]
    columns: list[np.ndarray]
    shape: tuple[int, int]

    @property
    def density(self) -> np.ndarray:
        """(a, b) mass relative to what the uniform plan has in the same block: 1 says the plan prefers nothing."""
        sizes = np.outer([len(group) for group in self.rows], [len(group) for group in self.columns])
        return self.mass * (self.shape[0] * self.shape[1]) / sizes


def plan_entries(plans: SparsePlans, index: int) -> Entries:
    """The surviving entries of plan number `index`, as shares of the plan's mass (the record keeps n * Q)."""
    n = plans.shape[0]
    offsets = plans.offsets[index * n : (index + 1) * n + 1].numpy()
    part = slice(int(offsets[0]), int(offsets[-1]))
    survived = ~np.isin(np.arange(part.start, part.stop), plans.beyond.numpy())
    return Entries(
        np.repeat(np.arange(n), np.diff(offsets))[survived],
        plans.columns[part].numpy().astype(np.int64)[survived],
        plans.values[part].numpy().astype(np.float64)[survived] / n,
        plans.shape,
    )


def plan_blocks(entries: Entries, size: int, order: Order = "structure") -> Blocks:
    """Sum a plan into at most `size` x `size` blocks.

    Args:
        entries: From `plan_entries`.
        size: Most blocks along either side; blocks of one side differ by one neuron at most.
        order: ``structure`` by `structure_order`; ``natural`` as the models number their neurons, in which
            attention heads are contiguous.

    Returns:
        Blocks whose masses sum to the entries'.
    """
    n, m = entries.shape
    return window_blocks(entries, plan_orders(entries, order), (0, n), (0, m), size)


def plan_orders(entries: Entries, order: Order) -> tuple[np.ndarray, np.ndarray]:
    """(n,) and (n',): the neuron at each place of an order; see `plan_blocks`."""
    n, m = entries.shape
    return structure_order(entries) if order == "structure" else (np.arange(n), np.arange(m))


def window_blocks(
    entries: Entries,
    orders: tuple[np.ndarray, np.ndarray],
    rows: tuple[int, int],
    columns: tuple[int, int],
    size: int,
) -> Blocks:
    """Sum a stretch of an ordered plan into at most `size` x `size` blocks: what a zoomed view shows.

    Args:
        entries: From `plan_entries`.
        orders: From `plan_orders`.
        rows: First place shown and the one after the last, in the order of the rows; at least one place.
        columns: Likewise.
        size: Most blocks along either side. A stretch that is no longer than that is shown neuron by neuron.
    """
    (places, row_groups), (across, column_groups) = (
        _groups(line[slice(*stretch)], size, len(line)) for line, stretch in zip(orders, (rows, columns), strict=True)
    )
    row, column = places[entries.rows], across[entries.columns]
    inside = (row >= 0) & (column >= 0)
    flat = row[inside] * len(column_groups) + column[inside]
    mass = np.bincount(flat, weights=entries.mass[inside], minlength=len(row_groups) * len(column_groups))
    return Blocks(mass.reshape(len(row_groups), len(column_groups)), row_groups, column_groups, entries.shape)


def structure_order(entries: Entries) -> tuple[np.ndarray, np.ndarray]:
    """Orders of rows and columns that bring neurons of like partners together: recursive spectral bisection.

    The bipartite graph of the plan is split in two along the second singular vectors of D_r^-1/2 Q D_c^-1/2
    (Dhillon 2001, co-clustering), each half again, and so on; groups too small to split are sorted along that axis.
    Each axis points the way its parent's did, so that neighbouring groups are alike.

    Returns:
        (n,) and (n',) permutations: the neuron to show at each place.
    """
    n, m = entries.shape
    pending: list[tuple[np.ndarray, ...]] = [(np.arange(n), np.arange(m), np.arange(len(entries.mass)), np.zeros(n))]
    rows: list[np.ndarray] = []
    columns: list[np.ndarray] = []
    # Where a neuron stands in the group at hand.
    row_place, column_place = np.zeros(n, dtype=np.int64), np.zeros(m, dtype=np.int64)
    while pending:
        of_target, of_source, inside, parent = pending.pop()
        row_place[of_target], column_place[of_source] = np.arange(len(of_target)), np.arange(len(of_source))
        r, c, mass = row_place[entries.rows[inside]], column_place[entries.columns[inside]], entries.mass[inside]
        x, y = _second_axis(r, c, mass, len(of_target), len(of_source))
        if x @ parent < 0:
            x, y = -x, -y
        low, left = x <= 0, y <= 0
        smallest = min(low.sum(), (~low).sum(), left.sum(), (~left).sum())
        if min(len(of_target), len(of_source)) < 2 * _LEAF or smallest < _LEAF // 2:
            rows.append(of_target[np.argsort(x, kind="stable")])
            columns.append(of_source[np.argsort(y, kind="stable")])
            continue
        both_low, both_high = low[r] & left[c], ~low[r] & ~left[c]
        # Last in, first out: the lower half comes next.
        pending.append((of_target[~low], of_source[~left], inside[both_high], x[~low]))
        pending.append((of_target[low], of_source[left], inside[both_low], x[low]))
    return np.concatenate(rows), np.concatenate(columns)


def _second_axis(r: np.ndarray, c: np.ndarray, mass: np.ndarray, n: int, m: int) -> tuple[np.ndarray, np.ndarray]:
    """Coordinates of rows (n,) and columns (m,) along the second singular vectors of the normalised plan.

    The first ones are known, the square roots of the marginals, and are projected out.
    """
    row_root = np.sqrt(np.bincount(r, weights=mass, minlength=n))
    column_root = np.sqrt(np.bincount(c, weights=mass, minlength=m))
    row_scale, column_scale = _inverse(row_root), _inverse(column_root)
    multiply, multiply_transposed = _products(r, c, mass * row_scale[r] * column_scale[c], n, m)
    trivial: np.ndarray = column_root / max(float(np.linalg.norm(column_root)), np.finfo(float).tiny)
    y: np.ndarray = np.random.default_rng(0).standard_normal(m)
    x: np.ndarray = np.zeros(n)
    for _ in range(_STEPS):
        # No singular value is above 1, and the steps are few: nothing overflows, nor vanishes, without normalising.
        y = y - trivial * (trivial @ y)
        x = multiply(y)
        y = multiply_transposed(x)
    y = y - trivial * (trivial @ y)
    return x * row_scale, y * column_scale


def _products(
    r: np.ndarray, c: np.ndarray, weights: np.ndarray, n: int, m: int
) -> tuple[Callable[[np.ndarray], np.ndarray], Callable[[np.ndarray], np.ndarray]]:
    """What multiplies a vector by the (n, m) matrix of these entries, and by its transpose."""
    if n * m <= _DENSE * len(weights):
        matrix = np.bincount(r * m + c, weights=weights, minlength=n * m).reshape(n, m)
        return matrix.__matmul__, matrix.T.__matmul__
    return (
        lambda vector: np.bincount(r, weights=weights * vector[c], minlength=n),
        lambda vector: np.bincount(c, weights=weights * vector[r], minlength=m),
    )


def _inverse(root: np.ndarray) -> np.ndarray:
    return np.divide(1.0, root, out=np.zeros_like(root), where=root > 0)


def _groups(order: np.ndarray, size: int, neurons: int) -> tuple[np.ndarray, list[np.ndarray]]:
    """The block of every neuron (n,), -1 where it is in none, and the neurons of every block."""
    groups = np.array_split(order, min(size, len(order)))
    places = np.full(neurons, -1, dtype=np.int64)
    for place, group in enumerate(groups):
        places[group] = place
    return places, groups
