"""The rows of a comparison: what is kept of each when it is finished, and what they come to, seeds averaged."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Any

import torch
from pydantic import BaseModel, ConfigDict, Strict

from tmerge.comparison.result import Added, Row
from tmerge.comparison.scores import compared, measured, task_results
from tmerge.evaluation import Scores, difference, resamples
from tmerge.evaluation.tasks import TaskScore

__all__ = ["Answers", "RowNote", "RowScores", "TextScores", "TrainedScores", "added", "grouped", "summed_up"]


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True)


class TextScores(_Frozen):
    """Bits and bytes of every text, exactly: a JSON float read back is the float that was written."""

    bits: list[float]
    bytes: list[float]

    @classmethod
    def noted(cls, scores: Scores) -> TextScores:
        """What is kept of scores."""
        return cls(bits=scores.bits.tolist(), bytes=scores.bytes.tolist())

    @property
    def bits_per_byte(self) -> float:
        """Over all texts."""
        return sum(self.bits) / sum(self.bytes)


class Answers(_Frozen):
    """Every question's own result on a task, and its margin where it has one, in bits per byte."""

    metric: str
    items: list[float]
    margins: list[float] | None = None

    @classmethod
    def noted(cls, scores: TaskScore) -> Answers:
        """What is kept of scores."""
        margins = None if scores.margins is None else scores.margins.tolist()
        return cls(metric=scores.metric, items=scores.items.tolist(), margins=margins)


class RowScores(TextScores):
    """What a row's model does.

    Attributes:
        bits, bytes: On the held-out texts.
        domains: Further domain -> the same.
        tasks: Benchmark task -> answers.
    """

    domains: dict[str, TextScores]
    tasks: dict[str, Answers]


class TrainedScores(RowScores):
    """Likewise, of one that was trained, and what its training took; as in `RowNote`."""

    tokens: int
    steps: int
    resumed: int
    seconds: float
    loss: list[Annotated[tuple[int, float], Strict(False)]]


class RowNote(RowScores):
    """A finished row, of one seed where it is trained; ``rows/*.json`` in the comparison's folder.

    Attributes:
        resumed: Steps of a training that `seconds` leaves out, as an earlier call had done them.
        loss: (step, loss) pairs of a training.
    """

    name: str
    kind: str
    tokens: int = 0
    steps: int = 0
    resumed: int = 0
    seconds: float
    alpha: float | None = None
    of: str | None = None
    seed: int | None = None
    loss: list[Annotated[tuple[int, float], Strict(False)]] = []


def grouped(notes: Iterable[RowNote]) -> dict[str, list[RowNote]]:
    """Name -> a note for every seed, in their order."""
    groups: dict[str, list[RowNote]] = {}
    for note in notes:
        groups.setdefault(note.name, []).append(note)
    return groups


def summed_up(group: Sequence[RowNote], base: RowNote, *, seed: int, bootstrap: int) -> Row:
    """A row's values and its paired intervals.

    Args:
        group: Its notes, one for each seed.
        base: The row that all are held against.
        seed: Of the resamples.
        bootstrap: How many.
    """
    first, is_base = group[0], group[0].name == base.name
    counts = resamples(len(base.bits), bootstrap, seed)
    own = compared(_mean(group), None if is_base else _mean([base]), counts)
    domains = {}
    for domain, scores in base.domains.items():
        drawn = resamples(len(scores.bits), bootstrap, seed)
        domains[domain] = compared(
            _mean([note.domains[domain] for note in group]), None if is_base else _mean([scores]), drawn
        )
    row: dict[str, Any] = {name: getattr(first, name) for name in ("name", "kind", "tokens", "steps")}
    row |= {name: getattr(first, name) for name in ("alpha", "of") if getattr(first, name) is not None}
    row |= {"seconds": sum(note.seconds for note in group) / len(group), "value": own.value, "ci95": own.ci95}
    row |= {"difference": own.difference} if own.difference is not None else {}
    row["domains"] = domains
    if first.tasks:
        row["tasks"] = task_results(
            _answers(group), None if is_base else _answers([base]), seed=seed, bootstrap=bootstrap
        )
    if first.kind == "trained":
        row["seeds"] = [{"seed": note.seed, "value": note.bits_per_byte, "loss": note.loss} for note in group]
    return Row.model_validate(row)


def added(groups: Mapping[str, Sequence[RowNote]], *, seed: int, bootstrap: int) -> list[Added]:
    """What the merge adds to each training: with it against without it, the seeds averaged text by text."""
    additions = []
    pairs = [(name, name.removeprefix("fused+") + time) for name in groups for time in ("", "+time")]
    for name, to in pairs:
        group, without = groups[name], groups.get(to, ())
        if not name.startswith("fused+") or not without:
            continue
        counts = resamples(len(group[0].bits), bootstrap, seed)
        change = measured(difference(_mean(group), _mean(without), counts))
        seeds = [
            {"seed": with_merge.seed, "value": with_merge.bits_per_byte - without_merge.bits_per_byte}
            for with_merge, without_merge in zip(group, without, strict=True)
        ]
        additions.append(Added.model_validate({"row": name, "to": to, **change.to_dict(), "seeds": seeds}))
    return additions


def _mean(scores: Sequence[TextScores]) -> Scores:
    """Bits and bytes of a row's seeds, averaged text by text."""
    bits, sizes = torch.tensor([(score.bits, score.bytes) for score in scores], dtype=torch.float64).mean(0)
    return Scores(bits, sizes, 0, 0.0)


def _answers(group: Sequence[RowNote]) -> dict[str, TaskScore]:
    """Questions averaged over the seeds of a row."""
    averaged = {}
    for task, answers in group[0].tasks.items():
        of_seeds = [note.tasks[task] for note in group]
        margins = [seed.margins for seed in of_seeds if seed.margins is not None]
        averaged[task] = TaskScore(
            answers.metric,
            _mean_of([seed.items for seed in of_seeds]),
            0.0,
            _mean_of(margins) if len(margins) == len(of_seeds) else None,
        )
    return averaged


def _mean_of(seeds: Sequence[Sequence[float]]) -> torch.Tensor:
    """(N,) float64 of (seeds, N)."""
    return torch.tensor(seeds, dtype=torch.float64).mean(0)
