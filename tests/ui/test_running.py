"""The Run tab in a browser: to the end, cancelled, come back to, two visitors, and one that fails."""

import json
import re
import threading
import time

import pytest

pytest.importorskip("playwright.sync_api", reason="playwright is not installed")

from playwright.sync_api import expect

from tests.ui.test_choose import open_fold, write_yaml
from tmerge.ui.parts import starting
from tmerge.ui.tabs import choose


def fill(page, served, **changes):
    """The pico recipe, in the page's YAML."""
    open_fold(page, "Recipe (YAML)")
    write_yaml(page, served.recipe(**changes).to_yaml())
    expect(page.locator("#target-model input")).to_have_value(str(served.root / "target"))


def start(page, served, **changes):
    fill(page, served, **changes)
    page.locator("#start").click()
    page.wait_for_url("**run=*", timeout=60_000)
    return page.url.partition("run=")[2]


@pytest.mark.slow
def test_a_run_to_its_end(visit, served):
    page = visit()
    run_id = start(page, served, fusion={"alpha": "auto"})
    expect(page.locator("#run-head")).to_contain_text("Done", timeout=60_000)
    run = served.ended(run_id)
    assert run.state == "done", run.error
    result = page.locator("#run-result")
    expect(result).to_contain_text(f"{run.report.evaluation.fused.value:.4f}")
    expect(result.locator("tbody tr")).to_have_count(6)
    expect(page.locator("#run-files")).to_contain_text("model.safetensors")
    expect(page.locator("#run-log")).to_contain_text("transporting weights")
    expect(page.locator("#run-stages .step.done .name", has_text="Pick alpha")).to_have_count(1)
    expect(page.locator("#run-log")).to_contain_text("note: The target states no licence")
    expect(page.locator("#run-map .heatmaplayer image")).to_have_count(1)
    expect(page.locator("#cancel")).to_be_disabled()
    with page.expect_download() as download:
        page.locator("#get-report").click()
    with open(download.value.path(), encoding="utf-8") as file:
        assert json.load(file)["verdict"] == run.report.verdict


def test_progress_is_shown_and_a_reload_comes_back_to_the_run(visit, served, gate):
    gate.close_at("transport", rows=5)
    page = visit()
    run_id = start(page, served)
    expect(page.locator("#run-stages .step.now")).to_have_count(1)
    expect(page.locator("#run-map .heatmaplayer image")).to_have_count(1, timeout=40_000)
    assert not served.context.store.get(run_id).over
    visit.reload(page)
    expect(page.locator("#run-head")).to_contain_text("Running", timeout=15_000)
    expect(page.locator("#run-log")).to_contain_text("started")
    gate.open()
    expect(page.locator("#run-head")).to_contain_text("Done", timeout=60_000)
    expect(page.locator("#run-result")).to_contain_text("bits per byte")
    # And after its end, on another page.
    later = visit(f"&run={run_id}")
    expect(later.locator("#run-head")).to_contain_text("Done")
    expect(later.locator("#run-result")).to_contain_text("bits per byte")
    expect(later.locator("#get-report")).to_be_visible()


def test_cancel_stops_at_once_and_the_run_can_be_continued(visit, served, gate, monkeypatch):
    gate.close_at("target")
    cancel, asked = served.context.store.cancel, []
    monkeypatch.setattr(served.context.store, "cancel", lambda run_id: (asked.append(time.time()), cancel(run_id)))
    page = visit()
    run_id = start(page, served)
    expect(page.locator("#run-stages .step.now")).to_have_count(1)
    page.locator("#cancel").click()
    expect(page.locator("#run-head")).to_contain_text("Cancelled")
    run = served.ended(run_id)
    # By the app's clock: how soon a busy browser hears of it is its own affair.
    assert run.state == "cancelled" and len(asked) == 1 and run.ended - asked[0] < 2
    # The same button continues it; what it had finished stays in sight.
    gate.open()
    expect(page.locator("#run-result")).to_contain_text("can be continued")
    page.get_by_role("button", name="Continue this run").click()
    expect(page.locator("#run-head")).to_contain_text("Done", timeout=60_000)
    expect(page.locator("#run-result")).to_contain_text("bits per byte")
    expect(page.locator("#run-log")).to_contain_text("continued")
    expect(page.get_by_role("button", name="Cancel this run")).to_be_disabled()
    assert page.url.endswith(run_id)


@pytest.mark.slow
def test_two_visitors_at_once_do_not_see_each_other(visit, served, gate):
    # The first run is under way still when the second page has started its own.
    gate.close_at("target")
    one, two = visit(), visit()
    first = start(one, served)
    second = start(two, served, seed=7)
    expect(two.locator("#run-head")).to_contain_text("1 run before this one")
    assert first != second
    for page, other in ((one, second), (two, first)):
        assert other not in page.content()
    # A third one, without a link, sees neither.
    three = visit()
    three.get_by_role("tab", name="Run").click()
    expect(three.locator("#run-head")).to_contain_text("No run yet")
    served.context.store.cancel(first)
    served.ended(first)
    gate.open()
    expect(two.locator("#run-head")).to_contain_text("Done", timeout=60_000)
    expect(one.locator("#run-head")).to_contain_text("Cancelled")


@pytest.mark.slow
def test_a_failing_run_says_why_in_a_card(visit, served):
    page = visit()
    (served.root / "few.txt").write_text("one\ntwo\nthree\n")
    run_id = start(page, served, calibration={"dataset": str(served.root / "few.txt")})
    card = page.locator("#run-result").get_by_role("alert")
    expect(card).to_contain_text("3 rows read", timeout=30_000)
    expect(page.locator("#run-head")).to_contain_text("Failed")
    assert served.ended(run_id).error in card.inner_text()


def test_a_link_to_no_run_says_so(visit):
    page = visit("&run=nothing-of-that-name")
    expect(page.locator("#run-head")).to_contain_text("not here any more")


def test_start_without_a_model_says_which(visit):
    page = visit()
    page.locator("#start").click()
    expect(page.locator("#problem")).to_contain_text("name a target model first")


@pytest.fixture
def held_up(monkeypatch):
    """Edits reach the server, and are not taken in before the event is set."""
    free = threading.Event()

    def hold_up(name):
        plain = getattr(choose, name)

        def held(*words):
            assert free.wait(30)
            return plain(*words)

        monkeypatch.setattr(choose, name, held)

    yield hold_up, free
    free.set()


@pytest.mark.slow
def test_start_right_after_an_edit_of_the_recipe_waits_for_it(visit, served, held_up):
    page = visit()
    fill(page, served)
    hold_up, free = held_up
    hold_up("read_yaml")
    write_yaml(page, served.recipe(seed=41).to_yaml())
    page.locator("#start").click()
    expect(page.locator("#problem")).to_contain_text("Waiting for the last change")
    expect(page.locator("#start")).to_be_disabled()
    free.set()
    page.wait_for_url("**run=*", timeout=60_000)
    run = served.ended(page.url.partition("run=")[2])
    assert (run.state, run.recipe.seed) == ("done", 41)
    page.get_by_role("tab", name="Choose").click()
    expect(page.locator("#start")).to_be_enabled()


@pytest.mark.slow
def test_start_right_after_an_edit_of_a_field_runs_what_the_field_says(visit, served, held_up):
    page = visit()
    fill(page, served)
    open_fold(page, "All settings")
    expect(page.get_by_label("Strength (alpha)")).to_have_value(str(served.recipe().fusion.alpha))
    hold_up, free = held_up
    hold_up("with_value")
    alpha = page.get_by_label("Strength (alpha)")
    alpha.press("Control+A")
    alpha.press_sequentially("0.37")
    page.locator("#start").click()
    expect(page.locator("#problem")).to_contain_text("Waiting for the last change")
    free.set()
    page.wait_for_url("**run=*", timeout=60_000)
    run = served.ended(page.url.partition("run=")[2])
    assert (run.state, run.recipe.fusion.alpha) == ("done", 0.37)


@pytest.mark.slow
def test_start_after_an_edit_that_cannot_be_read_says_why_and_can_be_pressed_again(visit, served, monkeypatch):
    # Long enough to be seen, as this page looks every second.
    monkeypatch.setattr(starting, "_PATIENCE_UNREADABLE", 3.0)
    page = visit()
    fill(page, served)
    before = len(served.context.store._runs)
    write_yaml(page, "target: a/b\nsource: [c\n")
    page.locator("#start").click()
    expect(page.locator("#start")).to_be_disabled()
    expect(page.locator("#start")).to_be_enabled()
    expect(page.locator("#problem")).to_contain_text("not YAML")
    assert len(served.context.store._runs) == before
    write_yaml(page, served.recipe(seed=42).to_yaml())
    page.locator("#start").click()
    page.wait_for_url("**run=*", timeout=60_000)
    assert served.ended(page.url.partition("run=")[2]).recipe.seed == 42


@pytest.mark.slow
def test_start_right_after_another_upload_reads_that_file(visit, served, held_up, monkeypatch):
    """Of the same name as the one before it."""
    read = []
    begin = served.context.store.start

    def start(recipe, visitor, upload, *more, **named):
        read.append(upload.read_text())
        return begin(recipe, visitor, upload, *more, **named)

    monkeypatch.setattr(served.context.store, "start", start)
    page = visit()
    fill(page, served)
    page.get_by_label("Upload", exact=True).check()

    def give(line):
        file = {"name": "mine.txt", "mimeType": "text/plain", "buffer": f"{line}\n".encode() * 80}
        page.set_input_files("#texts-file input[type=file]", file)

    give("old")
    expect(page.locator("#recipe-yaml .cm-content")).to_contain_text("upload:mine.txt")
    hold_up, free = held_up
    hold_up("write_yaml")
    page.locator("#texts-file").get_by_label("Clear").first.click()
    give("new")
    expect(page.locator("#texts-file")).to_contain_text("mine")
    page.locator("#start").click()
    expect(page.locator("#problem")).to_contain_text("Waiting for the last change")
    free.set()
    page.wait_for_url("**run=*", timeout=60_000)
    assert [text.split()[0] for text in read] == ["new"]


@pytest.mark.slow
def test_a_second_choice_while_the_first_is_written_is_not_dropped(visit, served, held_up):
    page = visit()
    fill(page, served)
    hold_up, free = held_up
    hold_up("write_yaml")
    for kind in ("Hub dataset", "Upload"):
        page.get_by_role("radio", name=kind, exact=True).check()
    free.set()
    expect(page.locator("#recipe-yaml .cm-content")).to_contain_text("upload:")


@pytest.mark.slow
def test_spaces_around_a_name_in_the_recipe_are_no_change(visit, served):
    page = visit()
    fill(page, served)
    write_yaml(page, served.recipe(seed=43).to_yaml().replace(f"target: {served.root / 'target'}", 'target: " x "'))
    expect(page.locator("#target-model input")).to_have_value(re.compile("^ *x *$"))
    page.locator("#start").click()
    expect(page.locator("#problem")).to_contain_text("'x'", timeout=8000)
