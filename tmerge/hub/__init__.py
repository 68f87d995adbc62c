"""Runs and the Hub: the card that says what was measured, finished runs here and there, and pushing one."""

from __future__ import annotations

from tmerge.hub.card import card_text, write_card
from tmerge.hub.pull import FoundRun, Plan, find_run

__all__ = ["FoundRun", "Plan", "card_text", "find_run", "write_card"]
