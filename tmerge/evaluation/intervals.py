"""How sure a score is: paired bootstrap intervals over texts, and the verdict they give.

Texts are the units that are resampled. Two models' scores on the same resample are compared, so what makes a text
easy or hard for both falls out of their difference.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from tmerge.evaluation.likelihood import Scores

__all__ = ["Interval", "Verdict", "clearly_gains", "difference", "resamples", "score", "verdict"]

Verdict = Literal["helps", "hurts", "no difference"]


@dataclass(frozen=True)
class Interval:
    """A value with its 95 % percentile-bootstrap interval."""

    value: float
    low: float
    high: float

    def to_dict(self) -> dict[str, float | list[float]]:
        """As report.json holds it."""
        return {"value": self.value, "ci95": [self.low, self.high]}


def resamples(texts: int, count: int, seed: int) -> Tensor:
    """How often each text is drawn in each resample: (count, texts) float64, rows summing to `texts`."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(texts, (count, texts), generator=generator)
    counts = torch.zeros(count, texts, dtype=torch.float64)
    return counts.scatter_add_(1, drawn, torch.ones_like(counts))


def score(scores: Scores, counts: Tensor) -> Interval:
    """Bits per byte with its interval.

    Args:
        scores: On N texts.
        counts: (B, N) from `resamples`.
    """
    return _interval(scores.bits_per_byte, counts @ scores.bits / (counts @ scores.bytes))


def difference(scores: Scores, base: Scores, counts: Tensor) -> Interval:
    """Bits per byte of a model minus those of the base, paired by text; negative is better than the base.

    Args:
        scores: Of the model.
        base: Of the base, on the same texts.
        counts: (B, N) from `resamples`.

    Raises:
        ValueError: The two were not scored on the same bytes.
    """
    if not torch.equal(scores.bytes, base.bytes):
        raise ValueError("paired scores need the same texts on both sides")
    value = float((scores.bits - base.bits).sum() / base.bytes.sum())
    return _interval(value, counts @ (scores.bits - base.bits) / (counts @ base.bytes))


def clearly_gains(scores: Scores, base: Scores, counts: Tensor, *, chances: int) -> bool:
    """Whether a model is better than the base beyond luck, among so many that are asked the same.

    The interval is as much wider as it takes for one of `chances` intervals to lie below zero by luck once in forty
    times, all together (Bonferroni).

    Args:
        scores: Of the model.
        base: Of the base, on the same texts.
        counts: (B, N) from `resamples`.
        chances: How many models are compared.
    """
    samples = counts @ (scores.bits - base.bits) / (counts @ base.bytes)
    return float(torch.quantile(samples, 1 - 0.025 / chances)) < 0


def verdict(interval: Interval) -> Verdict:
    """What an interval of fused minus base says: below zero helps, above zero hurts, else no difference."""
    if interval.high < 0:
        return "helps"
    return "hurts" if interval.low > 0 else "no difference"


def _interval(value: float, samples: Tensor) -> Interval:
    low, high = torch.quantile(samples, torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return Interval(value, low, high)
