"""A way on in the app: training on top of a finished merge, and a reconstruction of the same pair."""

import pytest

pytest.importorskip("playwright.sync_api", reason="playwright is not installed")

from playwright.sync_api import expect

from tests.ui.test_running import fill, start
from tmerge.errors import NotEnoughMemoryError, RecipeError, RunNotFoundError
from tmerge.recipe import Recipe
from tmerge.run import Run
from tmerge.ui.parts.form import recipe_of
from tmerge.ui.parts.going_on import _fitted
from tmerge.ui.server import limits
from tmerge.ui.server.limits import AppSettings, refuse_training


@pytest.mark.slow
def test_a_merge_is_trained_on_top_of_and_stays_as_it_is(visit, served):
    page = visit()
    merged = start(page, served)
    expect(page.locator("#run-head")).to_contain_text("Done", timeout=120_000)
    before = (served.context.seen(merged).folder / "model.safetensors").read_bytes()
    expect(page.locator("#go-reconstruct")).to_be_hidden()  # the two are strangers
    page.get_by_label("Steps").fill("3")
    page.locator("#go-train").click()
    page.wait_for_url(lambda url: "run=" in url and merged not in url)
    trained = page.url.partition("run=")[2]
    run = served.ended(trained, 120)
    assert run.state == "done", run.error
    expect(page.locator("#run-result")).to_contain_text("3 steps of sft", timeout=60_000)
    expect(page.locator("#run-stages .name")).to_have_text(["Train"])
    # It has no control to beat, so nothing says that the source helps.
    expect(page.locator("#run-result .verdict")).to_contain_text("fter training")
    expect(page.locator("#go-train")).to_be_hidden()  # of a training no training is begun
    report = Run(run.folder).report()
    assert len(report.adaptation.loss_curve) == 3 and report.adaptation.objective == "sft"
    assert (served.context.seen(merged).folder / "model.safetensors").read_bytes() == before
    page.get_by_role("tab", name="Push").click()
    expect(page.locator("#push-verdict")).to_contain_text("3 steps of sft")


def test_what_cannot_be_trained_is_one_line(served, monkeypatch):
    store = served.context.store
    run = served.ended(store.start(served.recipe(seed=12), "someone else"))
    for steps in (0, -3, 10**9):
        with pytest.raises(RecipeError, match="choose from 1 to 1000"):
            store.train(run.id, steps, "sft", "someone else")
    for run_id in ("none", "example-relatives"):
        with pytest.raises(RunNotFoundError, match="no finished merge"):
            store.train(run_id, 5, "sft", "someone else")
    asked = (run.report, run.recipe, run.folder, 50)
    most = 6.0 * run.report.target.parameters * 50 * 8 * 256
    with pytest.raises(RecipeError, match=r"50 steps of sft take up to .* trillion operations, where this app takes"):
        refuse_training(*asked, "sft", AppSettings(public=True, max_operations=most - 1))
    refuse_training(*asked, "sft", AppSettings(public=True, max_operations=most))
    # The teacher reads all texts.
    with pytest.raises(RecipeError, match="steps of distill take up to"):
        refuse_training(*asked, "distill", AppSettings(public=True, max_operations=most))
    monkeypatch.setattr(limits, "available_memory", lambda device: 1000)
    with pytest.raises(NotEnoughMemoryError, match=r"needs about .* are free"):
        refuse_training(*asked, "sft", AppSettings())


def test_a_reconstruction_of_the_same_pair_is_set_up(visit, served, monkeypatch):
    from tmerge.ui.parts import going_on

    # The picos of these tests are strangers, of which it would not be proposed.
    monkeypatch.setattr(going_on, "RELATED", -1.0)
    run = served.ended(served.context.store.start(served.recipe(seed=13), "a third"))
    page = visit(f"&run={run.id}")
    page.locator("#go-reconstruct").click()
    expect(page.get_by_role("tab", name="Choose")).to_have_attribute("aria-selected", "true")
    page.get_by_role("button", name="Recipe (YAML)").click()
    expect(page.locator("#recipe-yaml .cm-content")).to_contain_text("what: reconstruct")
    expect(page.locator("#target-model input")).to_have_value(str(served.root / "target"))


@pytest.mark.slow
def test_two_models_are_asked_whether_they_are_related_and_nothing_is_kept(visit, served):
    page = visit()
    fill(page, served)
    page.locator("#relate").click()
    page.wait_for_url("**run=*", timeout=60_000)
    run = served.ended(page.url.partition("run=")[2])
    assert run.state == "done" and run.report is None and not run.folder.exists()
    assert run.relatedness.value < 0.5
    expect(page.locator("#run-result .verdict")).to_have_text("Not related")
    expect(page.locator("#run-head")).to_contain_text("are they related?")
    expect(page.locator("#run-result")).to_contain_text(f"Relatedness {run.relatedness.value:.2f}")
    expect(page.locator("#run-stages .name")).to_have_count(4)
    expect(page.locator("#go-train")).to_be_hidden()
    page.get_by_role("tab", name="Look").click()
    expect(page.locator("#look-nothing")).to_be_visible()
    assert page.request.get(f"{served.url}/run/{run.id}/model.zip").status == 404


@pytest.mark.parametrize(
    "more", [{}, {"save": {"form": "adapter"}, "fusion": {"what": "task-vector", "rank": 16}}, {"plan": "user/run"}]
)
def test_a_task_vectors_recipe_becomes_a_reconstruction_that_is_one(more):
    named = {"target": "a/small", "source": "a/big-tuned", "source_base": "a/big"}
    fitted = recipe_of(_fitted(Recipe.from_mapping({**named, "fusion": {"what": "task-vector"}, **more})))
    assert fitted.fusion.what == "reconstruct" and fitted.source_base is None and fitted.save.form == "merged"
    assert (fitted.target, fitted.source) == ("a/small", "a/big-tuned")
