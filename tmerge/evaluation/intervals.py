"""How sure a score is: paired bootstrap intervals over texts, and the verdict they give.

Texts are the units that are resampled. Two models' scores on the same resample are compared, so what makes a text
easy or hard for both falls out of their difference.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from statistics import NormalDist
from typing import Literal

import torch
from scipy.special import stdtr
from torch import Tensor

from tmerge.evaluation.likelihood import Scores

__all__ = [
    "Interval",
    "Verdict",
    "chance_to_gain",
    "clearly_gains",
    "detectable",
    "difference",
    "resamples",
    "score",
    "upper_bound",
    "verdict",
]

Verdict = Literal["helps", "better, but not by the source", "no difference", "hurts"]

# Resamples that lie beyond a quantile that is read: it then scatters by a fifth of its own probability.
_BEYOND_THE_QUANTILE = 25
_RESAMPLES_AT_ONCE = 4096


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
    change = _paired(scores, base)
    return _interval(float(change.sum() / base.bytes.sum()), counts @ change / (counts @ base.bytes))


def detectable(scores: Scores, base: Scores) -> float | None:
    """The smallest true difference that texts as many and as different as these would show four times in five.

        delta = (z_0.975 + z_0.8) se

    se the linearised standard error of the paired difference (Miller, Adding Error Bars to Evals, arXiv 2411.00640,
    section 5, with the variance that was seen): a true difference of delta gives a 95 % interval clear of zero with
    power 0.8. A smaller one may be there, and these texts will mostly not show it.

    Args:
        scores: Of the model, on N texts.
        base: Of the base, on the same texts.

    Returns:
        In the scores' own unit; None where every text says the same, and nothing can be told of how texts vary.

    Raises:
        ValueError: The two were not scored on the same bytes.
    """
    change, sizes = _paired(scores, base), base.bytes
    residual = change - change.sum() / sizes.sum() * sizes
    error = float(_standard_error(residual.square().sum(), sizes.sum(), len(change)))
    normal = NormalDist()
    # Where all are alike, what is left is rounding.
    alike = error <= 1e-12 * float(change.abs().sum() / sizes.sum())
    return None if alike else (normal.inv_cdf(0.975) + normal.inv_cdf(0.8)) * error


def clearly_gains(scores: Scores, base: Scores, *, chances: int, seed: int) -> bool:
    """Whether a model is better than the base beyond luck, among so many that are asked the same.

    The one-sided level is 0.025 / `chances`: for one of so many to pass by luck, all together, once in forty times
    (Bonferroni).

    Args:
        scores: Of the model.
        base: Of the base, on the same texts.
        chances: How many models are compared.
        seed: Of the resamples.
    """
    return upper_bound(scores, base, level=0.025 / chances, seed=seed) < 0


def upper_bound(scores: Scores, base: Scores, *, level: float, seed: int) -> float:
    """A one-sided upper bound of a paired difference in bits per byte, by the studentised bootstrap.

        bound = g - q * se(g),   q the `level` quantile of (g* - g) / se(g*) over resamples

    with g the ratio of summed bits to summed bytes and se its linearised standard error (Efron and Tibshirani, An
    Introduction to the Bootstrap, section 12.5). At levels as small as a correction for many tries needs, the
    percentile interval passes two to four times as often as it says, and Student's t is misled by skewed differences;
    this is neither, and takes as many resamples as the level needs, whatever the report's intervals take.

    Args:
        scores: Of the model, on N texts.
        base: Of the base, on the same texts.
        level: How often the true difference may lie above the bound, in (0, 0.5).
        seed: Of the resamples.

    Raises:
        ValueError: The two were not scored on the same bytes.
    """
    change = _paired(scores, base)
    texts, sizes = len(change), base.bytes
    gain = change.sum() / sizes.sum()
    residual = change - gain * sizes  # (N,), what the ratio leaves of each text
    error = _standard_error(residual.square().sum(), sizes.sum(), texts)
    count = math.ceil(_BEYOND_THE_QUANTILE / level)
    ratios = []
    for first in range(0, count, _RESAMPLES_AT_ONCE):
        counts = resamples(texts, min(_RESAMPLES_AT_ONCE, count - first), seed + first)
        drawn = counts @ sizes
        moved = counts @ residual / drawn  # g* - g
        spread = counts @ residual.square() - 2 * moved * (counts @ (residual * sizes))
        spread += moved.square() * (counts @ sizes.square())
        ratios.append(moved / _standard_error(spread.clamp(min=0), drawn, texts))
    # A resample of equal texts has no spread: infinitely far from g, or, where it is at g itself, not at all.
    studentised = torch.cat(ratios).nan_to_num(nan=0.0, posinf=math.inf, neginf=-math.inf)
    return float(gain - torch.quantile(studentised, level, interpolation="lower") * error)


def chance_to_gain(scores: Scores, base: Scores, *, of: int, level: float) -> float:
    """How likely a model, seen on the first n of N texts, is to be clearly better than another on all of them.

    The difference over all N is predicted from the n: it will lie about the one seen with the standard error
    s sqrt((N - n) / (N n)), s the deviation of a text's difference, which n texts tell with n - 1 degrees of freedom.

    Args:
        scores: Of the model, on the first n texts.
        base: Of the other, on the same.
        of: N, more than n.
        level: One-sided, at which the gain over all N will have to be clear of zero; 0.5 asks only for a gain.
    """
    change = _paired(scores, base)
    texts = len(change)
    gain = change.sum() / base.bytes.sum()
    error = _standard_error((change - gain * base.bytes).square().sum(), base.bytes.sum(), texts)
    deviation = float(error) * texts**0.5
    if deviation == 0:  # every text alike, as where nothing differs
        return float(gain < 0)
    needed = NormalDist().inv_cdf(1 - level) / of**0.5
    reach = ((of - texts) / (of * texts)) ** 0.5
    return float(stdtr(texts - 1, (-float(gain) / deviation - needed) / reach))


def verdict(change: Interval, fused_minus_controls: Iterable[Interval] = ()) -> Verdict:
    """What a model's paired differences say of it.

    Args:
        change: Of the model to its target. Above zero it hurts; around zero, no difference is shown.
        fused_minus_controls: Of the model to each control, which changes the target by as much and knows nothing of the
            source. Below zero, all of them, it helps; else it is better, and these texts do not show that the source is
            why.
    """
    if change.high < 0:
        known = all(interval.high < 0 for interval in fused_minus_controls)
        return "helps" if known else "better, but not by the source"
    return "hurts" if change.low > 0 else "no difference"


def _paired(scores: Scores, base: Scores) -> Tensor:
    """(N,) what each text costs more under the one than under the other, in bits."""
    if not torch.equal(scores.bytes, base.bytes):
        raise ValueError("paired scores need the same texts on both sides")
    return scores.bits - base.bits


def _standard_error(squares: Tensor, total: Tensor, texts: int) -> Tensor:
    """Of a ratio of sums over texts: of its residuals' sum of squares, and the sum that stands below."""
    return (squares * texts / max(texts - 1, 1)).sqrt() / total


def _interval(value: float, samples: Tensor) -> Interval:
    low, high = torch.quantile(samples, torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return Interval(value, low, high)
