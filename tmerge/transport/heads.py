"""Matching the attention of one layer with that of another, head by head (the structure that attention scores need).

A score is a product of q and k, dimension by dimension, so both must be carried by one correspondence. A rotary
embedding turns the two dimensions of a pair by a frequency of their own, so pairs stay together and meet the pair of
the same place among the frequencies (which is the same frequency, unless one of the models was stretched to longer
texts since they parted: then the place is what they have in common). Query heads that share a key and value head must
still share one afterwards. What is free: which kv group meets which, which query head of a group meets which, and,
within a group, the order of v's dimensions (the inputs of o follow) and of those dimensions of q and k that nothing
rotates.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tmerge.transport.matching import Correspondence, Solver

__all__ = ["Heads", "match_heads"]


@dataclass(frozen=True)
class Heads:
    """How one layer's attention features divide into heads.

    Attributes:
        heads: Query heads H.
        kv_heads: Key and value heads G.
        head_dim: Dimensions D of q and k.
        pairs: (R, 2) int64, the dimensions that a rotary embedding turns together; R = 0 where nothing rotates.
        frequencies: (R,) radians a position, or None where they are not known.
    """

    heads: int
    kv_heads: int
    head_dim: int
    pairs: Tensor
    frequencies: Tensor | None = None

    @classmethod
    def of(cls, facts: Mapping[str, Any]) -> Heads:
        """From what `tmerge.models.head_facts` says of a layer."""
        frequencies = None if facts["frequencies"] is None else torch.tensor(facts["frequencies"], dtype=torch.float64)
        pairs = torch.tensor(facts["pairs"], dtype=torch.int64).reshape(-1, 2)
        return cls(facts["heads"], facts["kv_heads"], facts["head_dim"], pairs, frequencies)

    @property
    def ranked(self) -> Tensor:
        """(R, 2) the pairs from the fastest to the slowest, or as they come where that is not known."""
        if self.frequencies is None:
            return self.pairs
        return self.pairs[torch.argsort(self.frequencies, descending=True, stable=True)]

    @property
    def free(self) -> Tensor:
        """Dimensions of q and k that nothing rotates."""
        unrotated = torch.ones(self.head_dim, dtype=torch.bool)
        unrotated[self.pairs.flatten()] = False
        return unrotated.nonzero().flatten()


def match_heads(
    correlations: Mapping[str, Tensor], target: Heads, source: Heads, solver: Solver
) -> dict[str, Correspondence]:
    """The correspondences of q.post, k.post, v.post and o.pre of a pair of layers.

    Args:
        correlations: Feature key -> (n, n') correlations of the target's with the source's neurons; those of the four
            keys that are there take part.
        target: The target layer's heads.
        source: The source layer's.
        solver: Of heads and of dimensions alike; where it says so, a dimension of v may meet its negative.

    Returns:
        By feature key, for the keys in `correlations`.
    """
    blocks = {key: _blocks(key, values, target, source) for key, values in correlations.items()}
    turned = _rotated(target, source)
    swept: list[Correspondence] = []

    def noted(correspondence: Correspondence) -> Correspondence:
        swept.append(correspondence)
        return correspondence

    alike = {key: _likeness(key, values, turned, target, source) for key, values in blocks.items()}
    heads = _mean([alike[key] for key in ("q.post", "o.pre") if key in alike], target.heads, source.heads)
    groups = _mean([alike[key] for key in ("k.post", "v.post") if key in alike], target.kv_heads, source.kv_heads)
    per_group, source_per_group = target.heads // target.kv_heads, source.heads // source.kv_heads
    inner: dict[tuple[int, int], Correspondence] = {}
    for a in range(target.kv_heads):
        for b in range(source.kv_heads):
            block = heads[a * per_group : (a + 1) * per_group, b * source_per_group : (b + 1) * source_per_group]
            inner[a, b] = noted(solver(block))
            within = inner[a, b].dense()
            groups[a, b] = (groups[a, b] + (within * block).sum() / within.sum()) / 2
    plans = {key: torch.zeros(values.shape) for key, values in correlations.items()}
    matched_groups = noted(solver(groups))
    for a, b, share in zip(
        matched_groups.rows.tolist(), matched_groups.columns.tolist(), matched_groups.values.tolist(), strict=True
    ):
        _fill(plans, blocks, turned, (a, b, share), inner[a, b], target, source, solver, noted)
    sweeps, error = (
        max(correspondence.iterations for correspondence in swept),
        max(correspondence.marginal_error for correspondence in swept),
    )
    return {key: Correspondence.of(plan, sweeps, error) for key, plan in plans.items()}


def _mean(similarities: list[Tensor], rows: int, columns: int) -> Tensor:
    """Of similarities of heads; nothing is alike where none was measured."""
    return torch.stack(similarities).mean(0) if similarities else torch.zeros(rows, columns)


def _blocks(key: str, values: Tensor, target: Heads, source: Heads) -> Tensor:
    """(n, n') as (heads, heads', dimensions, dimensions')."""
    target_heads, source_heads = (
        side.heads if key in ("q.post", "o.pre") else side.kv_heads for side in (target, source)
    )
    return values.unflatten(1, (source_heads, -1)).unflatten(0, (target_heads, -1)).permute(0, 2, 1, 3)


def _rotated(target: Heads, source: Heads) -> tuple[Tensor, Tensor, Tensor]:
    """Which rotated dimensions meet: (E,) target dimensions, (E,) source dimensions, (E,) shares."""
    none = torch.empty(0, dtype=torch.int64)
    if not len(target.pairs) or not len(source.pairs):
        return none, none, torch.empty(0)
    # Pair i of R turns by theta^(-i/R): with as large a theta, i/R says the frequency. The side with fewer pairs meets
    # evenly spaced ones of the other's.
    few = min(len(target.pairs), len(source.pairs))
    target_dims, source_dims = (
        side.ranked[(torch.arange(few) * len(side.pairs) / few).round().long()].T.flatten() for side in (target, source)
    )
    return target_dims, source_dims, torch.ones(2 * few)


def _likeness(key: str, blocks: Tensor, turned: tuple[Tensor, Tensor, Tensor], target: Heads, source: Heads) -> Tensor:
    """(heads, heads') mean correlation of the dimensions: of those that are tied, with their own; else the best."""
    if key in ("v.post", "o.pre"):
        return blocks.abs().amax(3).mean(2)
    target_dims, source_dims, _ = turned
    total = torch.zeros(blocks.shape[:2])
    if len(target_dims):
        total = total + blocks[:, :, target_dims, source_dims].sum(2) * (len(target.pairs) * 2 / len(target_dims))
    free, source_free = target.free, source.free
    if len(free) and len(source_free):
        total = total + blocks[:, :, free][:, :, :, source_free].amax(3).sum(2)
    return total / target.head_dim


def _fill(
    plans: dict[str, Tensor],
    blocks: Mapping[str, Tensor],
    turned: tuple[Tensor, Tensor, Tensor],
    group: tuple[int, int, float],
    inner: Correspondence,
    target: Heads,
    source: Heads,
    solver: Solver,
    noted: Callable[[Correspondence], Correspondence],
) -> None:
    """Write one pair of kv groups into the plans."""
    a, b, share = group
    per_group, source_per_group = target.heads // target.kv_heads, source.heads // source.kv_heads
    members = [
        (a * per_group + row, b * source_per_group + column, value)
        for row, column, value in zip(inner.rows.tolist(), inner.columns.tolist(), inner.values.tolist(), strict=True)
    ]
    weight = sum(value for _, _, value in members)

    def together(single: str, many: str) -> Tensor:
        """Mean correlation of the group's dimensions over its key or value head and its matched query heads."""
        correlations = []
        if single in blocks:
            correlations.append(blocks[single][a, b])
        if many in blocks:
            correlations.append(sum(blocks[many][h, g] * value for h, g, value in members) / weight)
        return torch.stack(correlations).mean(0)

    if "q.post" in blocks or "k.post" in blocks:
        dims = torch.zeros(target.head_dim, source.head_dim)
        dims[turned[0], turned[1]] = turned[2]
        free, source_free = target.free, source.free
        if len(free) and len(source_free):
            dims[free.unsqueeze(1), source_free] = noted(
                solver(together("k.post", "q.post")[free][:, source_free])
            ).dense()
        _put(plans, "q.post", "k.post", (a, b, share), members, dims)
    if "v.post" in blocks or "o.pre" in blocks:
        alike = together("v.post", "o.pre")
        correspondence = noted(solver.either_sign(alike))
        _put(plans, "o.pre", "v.post", (a, b, share), members, correspondence.dense())


def _put(
    plans: dict[str, Tensor],
    many: str,
    single: str,
    group: tuple[int, int, float],
    members: list[tuple[int, int, float]],
    dims: Tensor,
) -> None:
    """One correspondence of dimensions, for the key or value head and for every matched query head."""
    n, m = dims.shape
    a, b, share = group
    if single in plans:
        plans[single][a * n : (a + 1) * n, b * m : (b + 1) * m] = share * dims
    if many in plans:
        for h, g, value in members:
            plans[many][h * n : (h + 1) * n, g * m : (g + 1) * m] = share * value * dims
