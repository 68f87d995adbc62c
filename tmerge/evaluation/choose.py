"""``fusion.alpha: auto``: how strongly each group of projections is fused, chosen on texts that serve nothing else.

The groups are taken in turn, from all zero. A group gets the alpha with the fewest bits per byte on the choosing
texts, the groups before it fused as chosen; but only if what it gains is clear of zero, by an interval that allows for
how many are tried. At last all groups are fused alike, since what fine-tuning changed in one projection counts on what
it changed in the others, and that is taken if it clearly gains on what the groups found for themselves.
So the result is better than the base on the choosing texts or is the base, and luck among few texts is hardly taken
for gain.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from tmerge.evaluation.controls import applied
from tmerge.evaluation.intervals import Interval, clearly_gains, difference
from tmerge.evaluation.likelihood import Scores
from tmerge.fusion import TransportedNeurons
from tmerge.models import STREAM, Projection, group_of

__all__ = ["PROJECTION_GROUPS", "Choice", "Trial", "choose_alpha"]

PROJECTION_GROUPS: tuple[tuple[str, ...], ...] = (("q", "k"), ("v",), ("o",), ("gate", "up"), ("down",), (STREAM,))
"""What is fused with one alpha: q and k make the attention scores together, gate and up the MLP's hidden neurons; and
embeddings and norms, where a task vector has them."""


@dataclass(frozen=True)
class Trial:
    """One alpha of one group.

    Attributes:
        group: The projections.
        alpha: Tried for them.
        gain: Bits per byte against the best so far, paired; negative is better.
    """

    group: tuple[str, ...]
    alpha: float
    gain: Interval


@dataclass(frozen=True)
class Choice:
    """What was chosen.

    Attributes:
        alpha: projection -> alpha, 0 included.
        trials: Everything that was tried, in order.
        difference: The chosen model against the base on the choosing texts.
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
                {"group": list(trial.group), "alpha": trial.alpha, "gain": trial.gain.to_dict()}
                for trial in self.trials
            ],
        }


def choose_alpha(
    layers: Sequence[dict[str, Projection]],
    transported: Sequence[TransportedNeurons],
    alphas: Sequence[float],
    score: Callable[[str], Scores],
    counts: Tensor,
) -> Choice:
    """Choose alpha for every group of projections that was transported.

    Args:
        layers: The unfused target's projections, `Architecture.views`; they have their bytes back afterwards.
        transported: What fusing would write.
        alphas: Tried beside 0.
        score: Scores the model as it is in memory on the choosing texts; told what is being scored.
        counts: (B, N) from `resamples`, for the choosing texts.
    """
    names = list(dict.fromkeys(group_of(item.projection) for item in transported))
    chosen = dict.fromkeys(names, 0.0)
    base = best = score("base")
    seconds = base.seconds
    trials = []
    groups = [tuple(name for name in group if name in chosen) for group in PROJECTION_GROUPS]
    groups = [group for group in groups if group]
    asked = [*groups, tuple(names)] if len(groups) > 1 else groups
    chances = len(asked) * len(alphas)
    for members in asked:
        found: tuple[float, Scores] | None = None
        for alpha in sorted(alphas):
            with applied(layers, transported, {**chosen, **dict.fromkeys(members, alpha)}):
                scores = score(f"{' '.join(members)} at alpha {alpha:g}")
            seconds += scores.seconds
            gain = difference(scores, best, counts)
            trials.append(Trial(members, alpha, gain))
            clear = clearly_gains(scores, best, counts, chances=chances)
            if clear and (found is None or scores.bits_per_byte < found[1].bits_per_byte):
                found = alpha, scores
        if found is not None:
            chosen.update(dict.fromkeys(members, found[0]))
            best = found[1]
    return Choice(chosen, trials, difference(best, base, counts), seconds)
