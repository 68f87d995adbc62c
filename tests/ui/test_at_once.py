"""Visitors beside each other: what takes long for one keeps no other waiting."""

import threading

import pytest

pytest.importorskip("playwright.sync_api", reason="playwright is not installed")

from playwright.sync_api import expect

from tmerge.ui.tabs import look


def test_a_run_that_takes_long_to_look_at_keeps_nobody_waiting(visit, served, monkeypatch):
    run_id = served.context.store.start(served.recipe(seed=31), "someone")
    served.ended(run_id)
    asked, others, goes_on, read = threading.Event(), threading.Event(), threading.Event(), look.looked_at

    def slow(folder):
        if not others.is_set():
            asked.set()
            assert goes_on.wait(120)
        return read(folder)

    monkeypatch.setattr(look, "looked_at", slow)
    try:
        first = visit(f"&run={run_id}&tab=look")
        assert asked.wait(60)
        others.set()
        second = visit(f"&run={run_id}&tab=look")
        expect(second.locator("#look-head")).to_contain_text("merged with")
    finally:
        goes_on.set()
    expect(first.locator("#look-head")).to_contain_text("merged with")
