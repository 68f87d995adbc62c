"""Visitors beside each other: what takes long for one keeps no other waiting."""

import threading

import pytest

pytest.importorskip("playwright.sync_api", reason="playwright is not installed")

from playwright.sync_api import expect

from tmerge.ui.server import speaking
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


def test_who_asks_while_the_models_answer_another_is_told(visit, served, monkeypatch):
    run_id = served.context.store.start(served.recipe(seed=32), "someone")
    served.ended(run_id)
    goes_on = threading.Event()
    monkeypatch.setattr(speaking, "_PATIENCE", 1.0)
    monkeypatch.setattr(speaking.Speaker, "_speak", lambda *words: goes_on.wait(120))
    first, second = (visit(f"&run={run_id}&tab=try") for _ in range(2))
    try:
        for page in (first, second):
            page.locator("#try-prompt textarea").fill("Kota")
            page.locator("#try-go").click()
            # The second one asks while the first is answered.
            expect(first.locator("#try-stop")).to_be_enabled()
        expect(second.locator("#try-fused-note")).to_contain_text("answering someone else")
        expect(second.locator("#try-go")).to_be_enabled()
        expect(first.locator("#try-go")).to_be_disabled()
    finally:
        goes_on.set()
    expect(first.locator("#try-go")).to_be_enabled()
