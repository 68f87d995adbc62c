"""A model's scores beside those of another: on texts, and on benchmark tasks; each with its paired difference."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from tmerge.evaluation import Interval, Scores, difference, resamples, score
from tmerge.evaluation.tasks import TaskScore, task_difference, task_score
from tmerge.report import Measured

__all__ = ["Compared", "TaskResult", "compared", "measured", "task_results"]


class Compared(Measured):
    """A value, and its paired difference to the first model's; None of the first model itself."""

    difference: Measured | None = None


class TaskResult(Compared):
    """A benchmark task's: the metric of the harness, over so many questions."""

    metric: str
    questions: int


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
    own = measured(score(scores, counts))
    if first is None:
        return Compared(value=own.value, ci95=own.ci95)
    return Compared(value=own.value, ci95=own.ci95, difference=measured(difference(scores, first, counts)))


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
        own = measured(task_score(task_scores, counts))
        known: dict[str, Any] = {"value": own.value, "ci95": own.ci95}
        if first is not None:
            known["difference"] = measured(task_difference(task_scores, first[name], counts))
        results[name] = TaskResult(metric=task_scores.metric, questions=len(task_scores.items), **known)
    return results
