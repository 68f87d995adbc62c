"""A model's scores beside those of another: on texts, and on benchmark tasks; each with its paired difference."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from tmerge.evaluation import Interval, Scores, detectable, difference, resamples, score
from tmerge.evaluation.tasks import TaskScore, task_detectable, task_difference, task_score
from tmerge.report import Measured

__all__ = ["Compared", "TaskResult", "compared", "measured", "task_results"]


class Compared(Measured):
    """A value, and its paired difference to the first model's.

    Attributes:
        difference: None of the first model itself.
        detectable: The smallest true difference that so many texts or questions would show four times in five
            (`tmerge.evaluation.detectable`); None of the first model, and where no text told the two apart.
    """

    difference: Measured | None = None
    detectable: float | None = None


class TaskResult(Compared):
    """A benchmark task's: the metric of the harness, over so many questions.

    Attributes:
        margin: The same questions by how far ahead the right answer is, in bits per byte (`question_margins`); None of
            a task that is not multiple choice.
    """

    metric: str
    questions: int
    margin: Compared | None = None


def measured(interval: Interval) -> Measured:
    """An interval as documents hold it."""
    return Measured(value=interval.value, ci95=(interval.low, interval.high))


def compared(scores: Scores, first: Scores | None, counts: Tensor) -> Compared:
    """Bits per byte.

    Args:
        scores: Of the model, on N texts.
        first: Of the model that it is held against; None of that one itself.
        counts: (B, N) from `resamples`.
    """
    own = score(scores, counts)
    if first is None:
        return _compared(own)
    return _compared(own, difference(scores, first, counts), detectable(scores, first))


def task_results(
    scores: Mapping[str, TaskScore], first: Mapping[str, TaskScore] | None, *, seed: int, bootstrap: int
) -> dict[str, TaskResult]:
    """Benchmark tasks.

    Args:
        scores: Task -> the model's.
        first: Those of the model that it is held against; None of that one itself.
        seed: Of the resamples.
        bootstrap: How many.
    """
    results = {}
    for name, task_scores in scores.items():
        counts = resamples(len(task_scores.items), bootstrap, seed)
        before = None if first is None else first[name]
        ahead, ahead_before = task_scores.by_margin, None if before is None else before.by_margin
        known = _task_compared(task_scores, before, counts).to_dict()
        if ahead is not None and (before is None or ahead_before is not None):
            known["margin"] = _task_compared(ahead, ahead_before, counts)
        results[name] = TaskResult(metric=task_scores.metric, questions=len(task_scores.items), **known)
    return results


def _task_compared(scores: TaskScore, first: TaskScore | None, counts: Tensor) -> Compared:
    own = task_score(scores, counts)
    if first is None:
        return _compared(own)
    return _compared(own, task_difference(scores, first, counts), task_detectable(scores, first))


def _compared(own: Interval, change: Interval | None = None, smallest: float | None = None) -> Compared:
    """What applies only: a document leaves out what was not given."""
    known: dict[str, Any] = {} if change is None else {"difference": measured(change)}
    known |= {} if smallest is None else {"detectable": smallest}
    return Compared(value=own.value, ci95=(own.low, own.high), **known)
