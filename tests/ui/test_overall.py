"""How far a whole run is: what was expected, corrected by the pace so far."""

import pytest

from tests.ui.test_running import start
from tmerge.recipe import Recipe
from tmerge.stages.step import Step
from tmerge.ui.server import visitor_run
from tmerge.ui.server.overall import Overall, overall, seconds_left
from tmerge.ui.server.visitor_run import Further, StageProgress, VisitorRun


def run_of(tmp_path, expected, **changes):
    run = VisitorRun("id", Recipe.from_mapping({"target": "a/b", "source": "c/d"}), tmp_path, "visitor")
    run.expected = expected
    for name, value in changes.items():
        setattr(run, name, value)
    return run


def test_what_remains_is_what_was_expected_at_the_pace_so_far(tmp_path):
    run = run_of(tmp_path, {"target": 10.0, "transport": 30.0, "save": 10.0}, state="running", started=100.0)
    run.stages["target"] = StageProgress(100, ended=120)
    run.stages["transport"] = StageProgress(120, done=5, total=10)
    # Half as fast as expected: 60 s for the transport, of which 30 are over, and 20 to write.
    found = overall(run, now=150.0)
    assert found.share == pytest.approx(0.5) and found.remaining == pytest.approx(50.0)
    # Of the first moments nothing is told of the pace.
    early = run_of(tmp_path, {"target": 10.0}, state="running", started=100.0)
    assert overall(early, now=103.0).remaining == pytest.approx(10.0)


def test_it_never_goes_back_and_never_says_that_it_is_over(tmp_path):
    run = run_of(tmp_path, {"target": 10.0, "save": 10.0}, state="running", started=100.0)
    stage = run.stages["target"] = StageProgress(100, "loading")
    shares = []
    for now in range(101, 160):
        # Another piece of the stage begins at nothing again.
        stage.done, stage.total = (1, 1) if now < 105 else (now % 7, 100)
        found = overall(run, now=float(now))
        assert found.remaining >= 10.0
        shares.append(found.share)
    assert shares == sorted(shares) and shares[-1] < 0.5


def test_a_run_that_was_continued_is_timed_from_there(tmp_path):
    run = run_of(tmp_path, {"target": 40.0, "transport": 80.0}, state="running", started=1000.0)
    run.stages["target"] = StageProgress(100, ended=140)
    run.stages["transport"] = StageProgress(1000, done=5, total=10)
    found = overall(run, now=1020.0)
    assert found.remaining == pytest.approx(60.0) and found.share == pytest.approx(0.5)


def test_nothing_is_made_up_where_nothing_was_expected(tmp_path):
    assert overall(run_of(tmp_path, {}, state="running", started=1.0)) is None
    assert overall(run_of(tmp_path, {"save": 1.0}, state="done", started=1.0)) is None
    assert seconds_left(run_of(tmp_path, {})) is None
    assert seconds_left(run_of(tmp_path, {"target": 2.0, "save": 1.0})) == 3.0


def test_a_training_is_as_far_as_its_steps_at_their_pace(tmp_path, monkeypatch):
    clock = iter((100.0, 110.0, 112.0, 114.0, 115.0))
    monkeypatch.setattr(visitor_run.time, "time", lambda: next(clock))
    run = run_of(tmp_path, {}, state="running", started=90.0, further=Further(tmp_path, 9, "sft"))
    monkeypatch.setattr(run, "say", lambda line: None)
    run.hear(Step("adapt", "loading", 1, 1, "models"))
    assert overall(run, now=101.0) is None
    # Continued at its fifth step: those before it say nothing of the pace.
    run.hear(Step("adapt", "sft", 5, 9, "steps"))
    assert overall(run, now=110.0) == Overall(0.5, None)
    run.hear(Step("adapt", "sft", 6, 9, "steps"))
    assert overall(run, now=113.0) == Overall(0.6, 5.0)
    run.hear(Step("adapt", "sft", 9, 9, "steps"))
    # It is scored and written then.
    assert overall(run, now=114.0) == Overall(0.9, None)
    run.hear(Step("adapt", "adapted: held-out texts", 1, 4, "texts"))
    assert overall(run, now=120.0) == Overall(0.9, None)


def test_a_stage_that_was_continued_tells_the_pace_since_then():
    stage = StageProgress(100)
    stage.hear(Step("adapt", "sft", 30, 50, "steps"), 101.0)
    assert stage.rate is None and stage.remaining(105.0) is None
    stage.hear(Step("adapt", "sft", 40, 50, "steps"), 111.0)
    assert stage.rate == 1.0 and stage.remaining(113.0) == 8.0
    stage.hear(Step("adapt", "scoring", 1, 9, "texts"), 112.0)
    assert stage.rate is None


def test_a_comparison_is_as_far_as_its_rows_and_tells_no_time(tmp_path):
    run = run_of(tmp_path, {}, state="running", started=90.0, further=Further(tmp_path, 9, "compare"))
    for done in (3, 5):
        run.hear(Step("compare", "rows", done, 19, "rows"))
        run.hear(Step("compare", "sft, seed 0", 1, 9, "steps"))
        assert overall(run) == Overall(done / 20, None)
        assert run.stages["compare"].what == "sft, seed 0"
    run.wait_again()
    assert run.counted is None


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
