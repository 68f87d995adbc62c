"""A race of strengths: several things that may be fused, each with one of several strengths or not at all.

The groups are taken in turn, from all zero. For each, the alphas race against the groups before it fused as chosen,
and against each other, by successive halving (Karnin, Koren and Somekh 2013): all are scored on a sixteenth of the
texts, and each time the texts double, the worse half drops out, and besides whatever can no longer win: an alpha whose
gain over all texts, predicted from those seen, will hardly be clear of zero, or hardly the greatest; or whose scores
are not finite. One that is left after all texts is taken if what it gains is clear of zero, by an interval that allows
for how many are tried. At last all groups are fused alike, since what one brings counts on what others bring, and that
is taken if it clearly gains on what the groups found for themselves. Where a group may do harm whatever the others do,
only those that have gained are fused alike, unless fewer than two have.
Dropping out early can only cost a gain, never feign one: what is chosen was scored on all choosing texts, and is better
than the base on them or is the base.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch

from tmerge.evaluation.intervals import Interval, chance_to_gain, clearly_gains, difference, resamples
from tmerge.evaluation.likelihood import Scores

__all__ = ["Choice", "Race", "Trial", "most_scorings"]

# The first round has this part of the texts, but not fewer than these.
_FIRST = 1 / 16
_FEWEST = 4
# What is less likely than this is not waited for.
_HARDLY = 0.025


@dataclass(frozen=True)
class Trial:
    """One alpha of one group.

    Attributes:
        group: What they are of: projections, or a source.
        alpha: Tried for them.
        gain: Bits per byte against the best so far, paired; negative is better.
        texts: How many choosing texts it was scored on before it dropped out; all of them, if it did not.
    """

    group: tuple[str, ...]
    alpha: float
    gain: Interval
    texts: int


@dataclass(frozen=True)
class Choice:
    """What was chosen.

    Attributes:
        alpha: projection, or source -> alpha, 0 included.
        trials: Everything that was tried, in order.
        difference: The chosen model against the base on the choosing texts; the base itself on those that it needed.
        seconds: Of the scoring.
    """

    alpha: dict[str, float]
    trials: list[Trial]
    difference: Interval
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """As the report holds it."""
        return {
            "alpha": self.alpha,
            "difference": self.difference.to_dict(),
            "trials": [
                {
                    "group": list(trial.group),
                    "alpha": trial.alpha,
                    "gain": trial.gain.to_dict(),
                    "texts": trial.texts,
                }
                for trial in self.trials
            ],
        }


@dataclass(frozen=True)
class Race:
    """What every race of a run has in common.

    Attributes:
        alphas: Tried beside 0.
        score: Scores the model as it is in memory on some of the choosing texts; told what is being scored, and which.
        texts: N, how many choosing texts there are.
        bootstrap: Resamples of the intervals that are told; the one that decides takes what its level needs.
        seed: Of the order of the texts and of the resamples.
    """

    alphas: Sequence[float]
    score: Callable[[str, Sequence[int]], Scores]
    texts: int
    bootstrap: int
    seed: int

    def run(
        self,
        groups: Sequence[tuple[str, ...]],
        fused: Callable[[Mapping[str, float]], AbstractContextManager[None]],
        *,
        gaining_together: bool = False,
    ) -> Choice:
        """Choose a strength for every group, and at last see whether one for all does better.

        Args:
            groups: Names of what has one strength, in the order in which they are taken.
            fused: Name -> strength to the model with all that fused into it, for the length of a ``with``.
            gaining_together: Whether those alone that have gained are at last fused alike, where they are several.
        """
        names = tuple(name for group in groups for name in group)
        # Not in their own order: the first of a file may be of one subject.
        order = torch.randperm(self.texts, generator=torch.Generator().manual_seed(self.seed)).tolist()
        asked = [*groups, names] if len(groups) > 1 else list(groups)
        last = len(groups)
        chances = len(asked) * len(self.alphas)
        chosen = dict.fromkeys(names, 0.0)
        base: Scores | None = None  # as far as it was needed, in the pieces that the alphas are scored in
        best: Scores | None = None  # of what was chosen, on all texts; None while that is the base
        seconds, trials = 0.0, list[Trial]()
        for number, members in enumerate(asked):
            gained = tuple(name for name in members if chosen[name])
            if number == last and gaining_together and len(gained) > 1:
                members = gained
            running, tried = sorted(self.alphas), dict[float, Scores]()
            for begin, end in pairwise((0, *_rounds(self.texts))):
                if not running:
                    break
                if base is None or len(base.bits) < end:
                    scores = self.score("base", order[begin:end])
                    seconds += scores.seconds
                    base = scores if base is None else base.followed_by(scores)
                for alpha in running:
                    with fused({**chosen, **dict.fromkeys(members, alpha)}):
                        scores = self.score(f"{' '.join(members)} at alpha {alpha:g}", order[begin:end])
                    seconds += scores.seconds
                    tried[alpha] = tried[alpha].followed_by(scores) if begin else scores
                if end < self.texts:
                    seen = {alpha: tried[alpha] for alpha in running}
                    running = _still_running(seen, (best or base).first(end), of=self.texts, level=0.025 / chances)
            assert base is not None  # there is an alpha at least
            former = best or base
            for alpha, scores in tried.items():
                count = len(scores.bits)
                gain = difference(scores, former.first(count), resamples(count, self.bootstrap, self.seed))
                trials.append(Trial(members, alpha, gain, count))
            clear = [alpha for alpha in running if _clearly_wins(tried[alpha], former, chances, self.seed)]
            if clear:
                best_alpha = min(clear, key=lambda alpha: tried[alpha].bits_per_byte)
                chosen.update(dict.fromkeys(members, best_alpha))
                best = tried[best_alpha]
        assert base is not None  # there is a group at least
        gain = difference(best or base, base, resamples(len(base.bits), self.bootstrap, self.seed))
        return Choice(chosen, trials, gain, seconds)


def most_scorings(alphas: int, texts: int) -> float:
    """How often all choosing texts are scored for one group, at most: where no alpha drops out but by halving."""
    scored, running = 0, alphas
    for begin, end in pairwise((0, *_rounds(texts))):
        scored += running * (end - begin)
        running = math.ceil(running / 2)
    return scored / max(texts, 1)


def _rounds(texts: int) -> Iterator[int]:
    """How many texts have been seen after each round: a sixteenth or a few, twice as many, ... all."""
    end = max(_FEWEST, math.ceil(texts * _FIRST))
    while end < texts:
        yield end
        end *= 2
    yield texts


def _still_running(seen: dict[float, Scores], best: Scores, *, of: int, level: float) -> list[float]:
    """The better half of some alphas, as far as each can still win.

    Ranked by what taking them may bring: the gain seen, times the chance that it will be clear. A small alpha whose
    gain is sure goes before a larger one that gains more here and there.

    Args:
        seen: alpha -> its scores on the first n of N texts.
        best: Of what the alphas have to beat, on the same.
        of: N.
        level: At which a gain over all N texts has to be clear.
    """
    finite = {alpha: scores for alpha, scores in seen.items() if _is_finite(scores)}
    chance = {alpha: chance_to_gain(scores, best, of=of, level=level) for alpha, scores in finite.items()}
    gain = {alpha: best.bits_per_byte - scores.bits_per_byte for alpha, scores in finite.items()}
    able = [alpha for alpha in finite if chance[alpha] >= _HARDLY]
    ranked = sorted(able, key=lambda alpha: (-gain[alpha] * chance[alpha], alpha))[: math.ceil(len(seen) / 2)]
    sure = [alpha for alpha in ranked if chance[alpha] >= 1 - _HARDLY]
    if not sure:
        return sorted(ranked)
    leader = max(sure, key=lambda alpha: gain[alpha])
    return sorted(
        alpha
        for alpha in ranked
        if alpha == leader or chance_to_gain(finite[alpha], finite[leader], of=of, level=0.5) >= _HARDLY
    )


def _clearly_wins(scores: Scores, best: Scores, chances: int, seed: int) -> bool:
    return _is_finite(scores) and clearly_gains(scores, best, chances=chances, seed=seed)


def _is_finite(scores: Scores) -> bool:
    """Whether the model computed at all: fused strongly, one in float16 may overflow."""
    return bool(torch.isfinite(scores.bits).all())
