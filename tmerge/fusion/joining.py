"""Joining what several sources learned since their common base, entry by entry of one of the target's tensors.

Of a source i with the strength s_i, the weight w_i and what was carried of it, t_i; d is the density:

    sum    J = sum_i s_i w_i t_i                                  task arithmetic, arXiv 2212.04089
    dare   J = sum_i s_i w_i m_i t_i / d,   m_i ~ Bernoulli(d)    arXiv 2311.03099, eq. 3-4: dropped and rescaled
    ties   J = sum_{i in A} s_i w_i t'_i / sum_{i in A} w_i       arXiv 2306.01708, algorithm 1

For TIES, t'_i is t_i where it is among the largest share d of its tensor by magnitude, and 0 elsewhere (trim); the sign
of an entry is that of sum_i s_i w_i t'_i, a sum of exactly zero counting as positive (elect); and A has the sources
whose t'_i has that sign there (disjoint merge). mergekit computes the same under the names ``task_arithmetic``,
``dare_linear`` and ``ties`` at its defaults, with s as its lambda: a weighted mean for TIES, no division for the
others.

A strength stands outside of that mean, as a lambda of each source: were it a weight, it would cancel where one source
has an entry to itself. A source of strength 0 is not there at all: it elects nothing and divides nothing.

Joined is what was carried, in the target's space, where the tensors have other entries than the source's: a trimmed
matrix goes through a matching one to one as it is, through averaging maps it does not.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from tmerge.errors import FusionError
from tmerge.fusion.merge import NeuronSequence, TransportedNeurons
from tmerge.fusion.seeded import generator_for

__all__ = ["Join", "JoinedNeurons", "SourcePart", "trimmed"]


@dataclass(frozen=True)
class Join:
    """How several sources' task vectors become one.

    Attributes:
        how: Which of the three.
        density: d, the share of each tensor's entries that is kept; in (0, 1], read for ties and dare.
        seed: Of what dare drops.
    """

    how: Literal["sum", "ties", "dare"]
    density: float
    seed: int


@dataclass(frozen=True)
class SourcePart:
    """What was carried of one source.

    Attributes:
        name: That strengths go by.
        identity: What identifies the source's contents, wherever it is named: parts are added in the order of it, and
            dare draws by it, so that the order in which sources are named decides nothing.
        weight: w, above 0.
        neurons: t: of every source the same items, layers, projections and neurons, in the same order.
    """

    name: str
    identity: str
    weight: float
    neurons: NeuronSequence


class JoinedNeurons(NeuronSequence):
    """The sources' neurons joined, an item when it is asked for; memory holds a few tensors of its size.

    Args:
        parts: The sources.
        join: How.
        strengths: Name -> s; a source that is not named has 0. With no strength above 0 there are no items.
    """

    def __init__(self, parts: Sequence[SourcePart], join: Join, strengths: Mapping[str, float]) -> None:
        there = [part for part in parts if strengths.get(part.name, 0.0) != 0]
        self._parts = sorted(there, key=lambda part: (part.identity, part.name))
        self._join, self._strengths = join, strengths

    def __len__(self) -> int:
        return len(self._parts[0].neurons) if self._parts else 0

    def places(self) -> list[tuple[int, str]]:
        """As `NeuronSequence.places`; nothing is joined."""
        return self._parts[0].neurons.places() if self._parts else []

    def _item(self, index: int) -> TransportedNeurons:
        first = self._parts[0].neurons[index]
        place = first.layer, first.projection
        for part in self._parts[1:]:
            other = part.neurons[index]
            if (other.layer, other.projection) != place or not torch.equal(other.neurons, first.neurons):
                raise FusionError(
                    f"{part.name} was carried to other neurons of layer {place[0]}'s {place[1]} than "
                    f"{self._parts[0].name}; delete the run's folder and merge again"
                )
        neurons = first.neurons.clone()
        del first  # and its pages
        biased = [part for part in self._parts if part.neurons[index].bias is not None]
        bias = self._joined(biased, index, "bias", place) if biased else None
        return TransportedNeurons(*place, neurons, self._joined(self._parts, index, "weight", place), bias, True)

    def _joined(self, parts: Sequence[SourcePart], index: int, field: str, place: tuple[int, str]) -> Tensor:
        """One tensor of an item."""

        def read(part: SourcePart) -> Tensor:
            tensor: Tensor = getattr(part.neurons[index], field)
            return tensor

        scales = [(self._strengths[part.name] * part.weight, part) for part in parts]
        if self._join.how == "ties":
            return _ties([(scale, part.weight, partial(read, part)) for scale, part in scales], self._join)
        total: Tensor | None = None
        for scale, part in scales:
            tensor = read(part)
            if self._join.how == "dare" and self._join.density < 1:
                purpose = ("dare", *place, field, part.identity)
                tensor = _dropped(tensor, self._join.density, generator_for(self._join.seed, *purpose))
            total = scale * tensor if total is None else total.add_(scale * tensor)
        assert total is not None  # no item without a part
        return total


def _ties(parts: Sequence[tuple[float, float, Callable[[], Tensor]]], join: Join) -> Tensor:
    """Trim, elect, merge; of each part s w, w, and what gives its tensor.

    Each is trimmed twice, once to elect and once to be merged: so many are never in memory at once.
    """
    votes: Tensor | None = None
    least = list[float]()
    for scale, _, read in parts:
        least.append(_least_kept(read(), join.density))
        vote = _trimmed(read(), join.density, least[-1]).mul_(scale)
        votes = vote if votes is None else votes.add_(vote)
        del vote  # or it would stay beside the next
    assert votes is not None
    positive = votes >= 0
    # What is summed and what it is divided by; the votes' own memory serves for the first.
    total, weights = votes.zero_(), torch.zeros_like(votes)
    for (scale, weight, read), smallest in zip(parts, least, strict=True):
        kept = _trimmed(read(), join.density, smallest)
        agrees = torch.where(positive, kept > 0, kept < 0)
        total.add_(kept.mul_(scale).mul_(agrees))
        weights.add_(agrees, alpha=weight)
        del kept, agrees
    # Where nobody agrees, zero by one.
    return total.div_(weights.masked_fill_(weights == 0, 1.0))


def trimmed(tensor: Tensor, density: float) -> Tensor:
    """A copy with all entries zero but the largest share `density` of them by magnitude.

    Args:
        tensor: Of any shape, with N entries, float32 on the CPU.
        density: Of which floor(density N) stay, at least one. Of entries of one magnitude the first stay.
    """
    return _trimmed(tensor, density, _least_kept(tensor, density))


def _kept_count(tensor: Tensor, density: float) -> int:
    return max(1, int(density * tensor.numel()))


def _least_kept(tensor: Tensor, density: float) -> float:
    """The smallest magnitude that stays."""
    sizes = tensor.abs().flatten().numpy()
    place = len(sizes) - _kept_count(tensor, density)
    sizes.partition(place)  # in a third of the time that torch.kthvalue takes, and in place
    return float(sizes[place])


def _trimmed(tensor: Tensor, density: float, least: float) -> Tensor:
    """As `trimmed`, where the smallest magnitude that stays is known."""
    kept = (tensor > least) | (tensor < -least)
    # Not all that are as large as the least may have room.
    room = _kept_count(tensor, density) - int(torch.count_nonzero(kept))
    equal = ((tensor == least) | (tensor == -least)).flatten().nonzero()[:room, 0]
    kept.view(-1)[equal] = True
    return torch.where(kept, tensor, 0.0)


def _dropped(tensor: Tensor, density: float, generator: torch.Generator) -> Tensor:
    """A copy of which each entry stays with probability `density`, and is divided by it."""
    kept = torch.rand(tensor.shape, generator=generator) < density
    return torch.where(kept, tensor / density, 0.0)
