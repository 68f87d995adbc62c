"""Runs and the Hub: the card that says what was measured, finished runs here and there, and pushing one."""

from __future__ import annotations

from tmerge.hub.card import card_text, merge_licence, write_card
from tmerge.hub.push import Pushed, PushPlan, plan_push, push
from tmerge.recorded import FoundRun, find_run

__all__ = [
    "FoundRun",
    "PushPlan",
    "Pushed",
    "card_text",
    "find_run",
    "merge_licence",
    "plan_push",
    "push",
    "write_card",
]
