"""The report of a run: typed, validated when it is read, and said in words and rows that are written once."""

from __future__ import annotations

from tmerge.report.build import build_report
from tmerge.report.environment import library_versions, peak_memory
from tmerge.report.parts import (
    Calibration,
    Choice,
    Fusion,
    Items,
    Measured,
    MergedModel,
    Part,
    TrainingTexts,
    Transport,
)
from tmerge.report.reading import DocumentKind, read_report, report_of
from tmerge.report.report import SCHEMA, Adaptation, Control, Descent, Evaluation, Report
from tmerge.report.rows import ScoreRow, score_rows
from tmerge.report.words import (
    RELATED,
    Tone,
    alpha_words,
    change_words,
    how_words,
    interval_words,
    moved_words,
    next_words,
    ratio_heading,
    ratio_words,
    relatedness_words,
    score_words,
    solved_words,
    summary,
    training_summary,
    verdict_sentence,
    verdict_tone,
    verdict_words,
)

__all__ = [
    "RELATED",
    "SCHEMA",
    "Adaptation",
    "Calibration",
    "Choice",
    "Control",
    "Descent",
    "DocumentKind",
    "Evaluation",
    "Fusion",
    "Items",
    "Measured",
    "MergedModel",
    "Part",
    "Report",
    "ScoreRow",
    "Tone",
    "TrainingTexts",
    "Transport",
    "alpha_words",
    "how_words",
    "moved_words",
    "next_words",
    "ratio_heading",
    "build_report",
    "change_words",
    "interval_words",
    "library_versions",
    "peak_memory",
    "ratio_words",
    "read_report",
    "relatedness_words",
    "report_of",
    "score_rows",
    "score_words",
    "solved_words",
    "summary",
    "training_summary",
    "verdict_sentence",
    "verdict_tone",
    "verdict_words",
]
