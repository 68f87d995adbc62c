"""Telling whether a merge helped: likelihood on held-out texts, intervals, and controls."""

from __future__ import annotations

from tmerge.evaluation.choose import PROJECTION_GROUPS, choose_alpha, choose_strengths
from tmerge.evaluation.controls import Control, applied, noise, shrink
from tmerge.evaluation.descent import Descent, descent_cosines
from tmerge.evaluation.intervals import Interval, Verdict, detectable, difference, resamples, score, verdict
from tmerge.evaluation.likelihood import Scores, score_texts
from tmerge.evaluation.race import Choice, Race, Trial, most_scorings
from tmerge.evaluation.unchanged import MOST_KEPT_BYTES, unchanged_layers, without_unchanged_layers

__all__ = [
    "MOST_KEPT_BYTES",
    "PROJECTION_GROUPS",
    "Choice",
    "Descent",
    "Trial",
    "choose_alpha",
    "choose_strengths",
    "descent_cosines",
    "detectable",
    "Control",
    "Interval",
    "Race",
    "Scores",
    "Verdict",
    "applied",
    "difference",
    "most_scorings",
    "noise",
    "resamples",
    "score",
    "score_texts",
    "shrink",
    "unchanged_layers",
    "verdict",
    "without_unchanged_layers",
]
