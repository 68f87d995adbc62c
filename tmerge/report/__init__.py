"""The report of a run: typed, validated when it is read, and said in words and rows that are written once."""

from __future__ import annotations

from tmerge.report.build import build_report
from tmerge.report.environment import library_versions, peak_memory
from tmerge.report.parts import Calibration, Fusion, Measured, MergedModel, TrainingTexts, Transport
from tmerge.report.reading import read_report, report_of
from tmerge.report.report import SCHEMA, Adaptation, Control, Descent, Evaluation, Report
from tmerge.report.rows import ScoreRow, score_rows
from tmerge.report.words import (
    RELATED,
    alpha_words,
    bytes_words,
    duration_words,
    interval_words,
    number_words,
    ratio_words,
    relatedness_words,
    solved_words,
    summary,
    training_summary,
)

__all__ = [
    "RELATED",
    "SCHEMA",
    "Adaptation",
    "Calibration",
    "Control",
    "Descent",
    "Evaluation",
    "Fusion",
    "Measured",
    "MergedModel",
    "Report",
    "ScoreRow",
    "TrainingTexts",
    "Transport",
    "alpha_words",
    "build_report",
    "bytes_words",
    "duration_words",
    "interval_words",
    "library_versions",
    "number_words",
    "peak_memory",
    "ratio_words",
    "read_report",
    "relatedness_words",
    "report_of",
    "score_rows",
    "solved_words",
    "summary",
    "training_summary",
]
