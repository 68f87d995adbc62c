"""Runs and the Hub: the card that says what was measured, finished runs here and there, and pushing one."""

from __future__ import annotations

from tmerge.hub.card import card_text, merge_licence, write_card
from tmerge.hub.pull import FoundRun, Plan, find_run
from tmerge.hub.push import Pushed, PushPlan, plan_push, push

__all__ = [
    "FoundRun",
    "Plan",
    "PushPlan",
    "Pushed",
    "card_text",
    "find_run",
    "merge_licence",
    "plan_push",
    "push",
    "write_card",
]
