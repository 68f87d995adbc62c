"""The recorded runs that ship: whole, small, without paths of a machine; looked at and read in the app."""

import re
from importlib import resources

import pytest

pytest.importorskip("playwright.sync_api", reason="playwright is not installed")

from playwright.sync_api import expect

from tmerge.report import Report, score_rows
from tmerge.ui.server.examples import EXAMPLES, Example, Examples, example_id, shipped_report


@pytest.fixture(scope="module")
def examples():
    kept = Examples()
    yield kept
    kept.close()


@pytest.mark.parametrize("name", EXAMPLES)
def test_a_recorded_run_is_whole_and_says_how_it_was_made(examples, name):
    run = examples.get(example_id(name))
    assert run.state == "done" and run.report.evaluation.texts > 10
    layers = run.report.target.layers
    assert {row.key for row in run.rows} and all(len(row.costs) == run.report.source.layers for row in run.rows)
    assert max(row.layer for row in run.rows) == layers - 1
    assert {talk.prompt for talk in run.example.talks} and "tests" in run.example.made
    for talk in run.example.talks:
        assert set(talk.said) == {"target", "fused", "source"} and any(answer.text for answer in talk.said.values())
    # What is told of it on the first page is its own report's.
    assert shipped_report(name) == run.report


def test_they_are_what_they_are_shown_for(examples):
    relatives, strangers = (examples.get(example_id(name)).report for name in EXAMPLES)
    assert relatives.verdict == "helps" and strangers.verdict != "helps"


def test_what_ships_is_small_and_names_no_folder_of_a_machine():
    for name in EXAMPLES:
        for file in (resources.files("tmerge.ui") / "examples" / name).iterdir():
            data = file.read_bytes()
            assert len(data) < 2**20, file
            if not file.name.endswith(".xz"):
                assert not re.search(r"/(tmp|home|root|work|Users)/", data.decode("utf-8")), file


@pytest.mark.parametrize("run_id", ["example-", "example-../relatives", "example-none", "relatives", ""])
def test_no_other_id_is_one(examples, run_id):
    assert examples.get(run_id) is None


def test_a_first_visitor_looks_at_one_and_reads_what_its_models_said(visit, served):
    page = visit()
    expect(page.locator("#ways")).to_contain_text("bits per byte")
    page.locator("#see-relatives").click()
    expect(page.get_by_role("tab", name="Look")).to_have_attribute("aria-selected", "true")
    expect(page.locator("#look-head")).to_contain_text("helps", timeout=60_000)
    expect(page.locator("#look-coupling .heatmaplayer image")).to_have_count(1, timeout=60_000)
    page.get_by_role("tab", name="Try").click()
    example: Example = served.context.seen("example-relatives").example
    expect(page.locator("#try-fused textarea")).to_have_value(example.talks[0].said["fused"].text)
    expect(page.locator("#try-go")).to_be_hidden()
    page.locator("#try-offered button").nth(1).click()
    expect(page.locator("#try-source textarea")).to_have_value(example.talks[1].said["source"].text)
    page.get_by_role("tab", name="Run").click()
    expect(page.locator("#run-head")).to_contain_text("a recorded run")
    expect(page.locator("#run-result tbody tr")).to_have_count(len(score_rows(shipped_report("relatives"))))
    # Its model is not there, what was recorded of it is.
    expect(page.locator("#run-files a")).to_have_count(3)
    with page.expect_download() as download:
        page.locator("#get-report").click()
    assert Report.model_validate_json(download.value.path().read_bytes()).verdict
    page.get_by_role("tab", name="Push").click()
    expect(page.locator("#push-nothing")).to_contain_text("cannot be pushed")
    # Its link is a link like any other; it is none of the visitor's own runs.
    assert page.url.endswith("run=example-relatives")
    assert page.request.get(f"{served.url}/run/example-relatives/model.zip").status == 404
    assert page.request.get(f"{served.url}/run/example-relatives/files/tmerge/report.json").status == 200


def test_a_way_in_takes_its_preset_and_leaves_the_names_to_the_visitor(visit):
    page = visit()
    page.get_by_role("button", name="Name two relatives").click()
    expect(page.locator("#expected")).to_contain_text("Name a target and a source model")
    page.get_by_role("button", name="Recipe (YAML)").click()
    expect(page.locator("#recipe-yaml .cm-content")).to_contain_text("what: task-vector")
    page.get_by_role("button", name="Use the built-in pair").click()
    expect(page.locator("#target-model input")).to_have_value(re.compile("^demo:|built in"))
