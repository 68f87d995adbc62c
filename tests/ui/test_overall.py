"""How far a whole run is: what was expected, corrected by the pace so far."""

import pytest

from tests.ui.test_running import start
from tmerge.recipe import Recipe
from tmerge.ui.server.overall import overall, seconds_left
from tmerge.ui.server.visitor_run import StageProgress, VisitorRun


def run_of(tmp_path, expected, **changes):
    run = VisitorRun("id", Recipe.from_mapping({"target": "a/b", "source": "c/d"}), tmp_path, "visitor")
    run.expected = expected
    for name, value in changes.items():
        setattr(run, name, value)
    return run


def test_what_remains_is_what_was_expected_at_the_pace_so_far(tmp_path):
    run = run_of(tmp_path, {"target": 10.0, "transport": 30.0, "save": 10.0}, state="running", started=100.0)
    run.stages["target"] = StageProgress("target", "", 1, 1, "", 100, 100, ended=120)
    run.stages["transport"] = StageProgress("transport", "", 5, 10, "", 120, 120)
    # 25 of the 50 expected seconds are done, and they took 50: half as fast.
    found = overall(run, now=150.0)
    assert found.share == pytest.approx(0.5) and found.remaining == pytest.approx(50.0)
    # Of the first moments nothing is told of the pace.
    early = run_of(tmp_path, {"target": 10.0}, state="running", started=100.0)
    assert overall(early, now=103.0).remaining == pytest.approx(10.0)


def test_nothing_is_made_up_where_nothing_was_expected(tmp_path):
    assert overall(run_of(tmp_path, {}, state="running", started=1.0)) is None
    assert overall(run_of(tmp_path, {"save": 1.0}, state="done", started=1.0)) is None
    assert seconds_left(run_of(tmp_path, {})) is None
    assert seconds_left(run_of(tmp_path, {"target": 2.0, "save": 1.0})) == 3.0


def test_a_page_shows_the_whole_of_it_and_when_the_next_begins(visit, served, gate):
    from playwright.sync_api import expect

    gate.close_at("transport")
    page, other = visit(), visit()
    first = start(page, served)
    bar = page.get_by_role("progressbar", name="The whole run")
    expect(bar).to_be_visible()
    expect(page.locator("#run-head")).to_contain_text("to go")
    second = start(other, served, seed=5)
    expect(other.locator("#run-head")).to_contain_text("1 run before this one")
    expect(other.locator("#run-head")).to_contain_text("begins in about")
    for run_id in (second, first):
        served.context.store.cancel(run_id)
        served.ended(run_id)
    expect(bar).to_have_count(0)
