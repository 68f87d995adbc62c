"""The report's table rows: made once, shown by terminal, page, card, pictures and app, each in its own dress."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from tmerge.report.parts import Measured
from tmerge.report.report import Report
from tmerge.report.several import join_words, short_name, strength_words
from tmerge.report.words import interval_words

__all__ = ["ScoreRow", "score_rows"]

_CONTROLS = {
    "shrink": "the same neurons made smaller",
    "noise": "moved at random by the same amount",
    "permuted": "moved through shuffled plans",
    "source_base": "toward the source before its fine-tuning",
    "texts": "toward what the source does on other tokens",
}


@dataclass(frozen=True)
class ScoreRow:
    """One model's held-out score.

    Attributes:
        kind: What it is to the merge.
        name: ``target``, ``fused``, ``control: shrink``, ``source 1 alone``.
        explained: What that is, in a few words.
        score: Bits per byte.
        difference: To the target, paired by text; None where it is not asked: of the target itself, and the source.
    """

    kind: Literal["target", "fused", "adapted", "alone", "control", "source"]
    name: str
    explained: str
    score: Measured
    difference: Measured | None = None

    @property
    def label(self) -> str:
        """Its name where nothing else explains it."""
        return f"{self.name}, {self.explained}" if self.kind in ("target", "alone") else self.name

    @property
    def is_result(self) -> bool:
        """Whether it is what the run has made, and not what that is held against."""
        return self.kind in ("fused", "adapted")

    @property
    def value_words(self) -> str:
        """The score to four digits."""
        return f"{self.score.value:.4f}"

    @property
    def interval_words(self) -> str:
        """Its 95 % interval."""
        return interval_words(self.score)

    @property
    def change_words(self) -> str:
        """The difference to the target to four digits, with its sign; empty where there is none."""
        return "" if self.difference is None else f"{self.difference.value:+.4f}"

    @property
    def change_interval_words(self) -> str:
        """Its paired 95 % interval; empty where there is none."""
        return "" if self.difference is None else interval_words(self.difference, signed=True)

    @property
    def cells(self) -> tuple[str, str, str, str]:
        """Score and interval, difference and interval."""
        return self.value_words, self.interval_words, self.change_words, self.change_interval_words


def score_rows(report: Report) -> list[ScoreRow]:
    """The models in the order in which they are shown: target, what was made of it, sources alone, controls, source."""
    evaluation = report.evaluation
    rows = [
        ScoreRow("target", "target", "unchanged", evaluation.base),
        ScoreRow("fused", "fused", join_words(report.fusion) or "the merge", evaluation.fused, evaluation.difference),
    ]
    if evaluation.adapted is not None:
        adapted = evaluation.adapted
        rows.append(
            ScoreRow("adapted", "fused and trained", "the merge, trained on", adapted.score, adapted.difference)
        )
    for source in report.sources:
        if (alone := evaluation.alone.get(source.name)) is not None:
            explained = f"{short_name(source.reference)} at {strength_words(source)}"
            rows.append(ScoreRow("alone", f"{source.name} alone", explained, alone, alone.difference))
    for name, control in evaluation.controls.items():
        explained = _CONTROLS.get(name, "for comparison")
        rows.append(ScoreRow("control", f"control: {name}", explained, control, control.difference))
    read = "source_base" if report.sources else "source"
    return [*rows, ScoreRow("source", read, "on the same texts", evaluation.source)]
