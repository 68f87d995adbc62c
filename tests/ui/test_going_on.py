"""Ways on in the app: a finished merge trained on top of, or compared with trainings; a reconstruction of its pair."""

import pytest

pytest.importorskip("playwright.sync_api", reason="playwright is not installed")

from playwright.sync_api import expect

from tests.ui.test_running import fill, start
from tmerge.comparison.inputs import merge_recipe
from tmerge.comparison.result import read_comparison
from tmerge.comparison.tables import added_words, row_cells
from tmerge.errors import NotEnoughMemoryError, RecipeError, RunNotFoundError
from tmerge.recipe import Recipe
from tmerge.run import Run
from tmerge.ui.parts.form import recipe_of
from tmerge.ui.parts.going_on import _fitted
from tmerge.ui.server import further
from tmerge.ui.server.further import refuse_for_memory, refuse_further
from tmerge.ui.server.limits import AppSettings


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
    expect(page.locator("#run-result")).to_contain_text("3 steps of distill", timeout=60_000)
    expect(page.locator("#run-stages .name")).to_have_text(["Train"])
    # It has no control to beat, so nothing says that the source helps.
    expect(page.locator("#run-result .verdict")).to_contain_text("fter training")
    expect(page.locator("#go-train")).to_be_hidden()  # of a training no training is begun
    report = Run(run.folder).report()
    assert len(report.adaptation.loss_curve) == 3 and report.adaptation.objective == "distill"
    assert (served.context.seen(merged).folder / "model.safetensors").read_bytes() == before
    page.get_by_role("tab", name="Push").click()
    expect(page.locator("#push-verdict")).to_contain_text("3 steps of distill")


def test_what_cannot_be_trained_is_one_line(served, monkeypatch):
    store = served.context.store
    run = served.ended(store.start(served.recipe(seed=12), "someone else"))
    for steps in (0, -3, 10**9):
        with pytest.raises(RecipeError, match="choose from 1 to 1000"):
            store.go_on(run.id, steps, "sft", "someone else")
    for run_id in ("none", "example-relatives"):
        with pytest.raises(RunNotFoundError, match="no finished merge to go on from"):
            store.go_on(run_id, 5, "sft", "someone else")
    asked = (run.report, run.recipe, 50)
    most = 6.0 * run.report.target.parameters * 50 * 8 * 256
    with pytest.raises(RecipeError, match=r"training of 50 steps takes up to .* operations, where this app takes"):
        refuse_further(*asked, "sft", AppSettings(public=True, max_operations=most - 1))
    refuse_further(*asked, "sft", AppSettings(public=True, max_operations=most))
    # The teacher reads all texts.
    with pytest.raises(RecipeError, match="a training of .* steps takes up to"):
        refuse_further(*asked, "distill", AppSettings(public=True, max_operations=most))
    monkeypatch.setattr(further, "available_memory", lambda device: 1000)
    with pytest.raises(NotEnoughMemoryError, match=r"a training needs about .* are free"):
        refuse_for_memory(run.report, run.recipe, run.folder, "sft")


@pytest.mark.slow
def test_a_merge_is_compared_with_trainings_stopped_and_continued(visit, served, gate):
    store = served.context.store
    merged = served.ended(store.start(served.recipe(seed=14), "a fourth"))
    before = (merged.folder / "model.safetensors").read_bytes()
    page = visit(f"&run={merged.id}")
    gate.close_at("compare")
    page.get_by_label("Steps").fill("2")
    page.locator("#go-compare").click()
    page.wait_for_url(lambda url: "run=" in url and merged.id not in url)
    run = store.get(page.url.partition("run=")[2])
    # The merge is not done again, but for what it was not asked: whether it points where the loss falls.
    expect(page.locator("#run-stages .step.now .name")).to_have_text("Compare", timeout=60_000)
    assert not {"texts", "target", "source", "transport", "fuse"} & {*run.stages}
    expect(page.locator("#run-head")).to_contain_text("the merge beside trainings")
    expect(page.get_by_role("progressbar", name="The whole run")).to_be_visible()
    page.locator("#cancel").click()
    expect(page.locator("#run-head")).to_contain_text("Cancelled")
    gate.open()
    expect(page.locator("#cancel")).to_have_text("Continue this run")
    page.locator("#cancel").click()
    expect(page.locator("#run-head")).not_to_contain_text("Cancelled")
    assert served.ended(run.id, 240).state == "done", run.error
    expect(page.locator("#run-head")).to_contain_text("Done", timeout=60_000)
    expect(page.locator("#go-compare")).to_be_hidden()
    found = read_comparison(run.folder.parent / "compare.json")
    assert [row.name for row in found.rows if row.kind == "trained"] == ["sft", "distill", "fused+sft", "fused+distill"]
    assert {row.steps for row in found.rows if row.kind == "trained"} == {2}
    assert found.rows[1].score.value == pytest.approx(merged.report.evaluation.fused.value)
    page.get_by_role("tab", name="Look").click()
    shown = page.locator("#look-table tbody tr")
    expect(shown).to_have_count(len(found.rows))
    sft = next(row for row in found.rows if row.name == "sft")
    assert page.locator("#look-table tr", has_text="sft").first.locator("td, th").all_inner_texts() == list(
        row_cells(sft)
    )
    expect(page.locator("#look-table")).to_contain_text(added_words(found.added[0]))
    for name in ("ways", "losses", "sweep"):
        box = page.locator(f"#look-{name} .tm-plot")
        box.locator(".main-svg").first.wait_for()
        box.scroll_into_view_if_needed()
        place = box.bounding_box()
        assert place["width"] > 300 and place["height"] > 200 and 0 <= place["y"] < page.viewport_size["height"]
    table = page.request.get(f"{served.url}/run/{run.id}/compare.html")
    assert table.status == 200 and str(served.context.store.root) not in table.text()
    assert page.request.get(f"{served.url}/run/{merged.id}/compare.html").status == 404
    assert (merged.folder / "model.safetensors").read_bytes() == before
    # Another run of this page is no comparison.
    page.goto(f"{served.url}/?run={merged.id}")
    page.get_by_role("tab", name="Look").click()
    page.locator("#look-scores .main-svg").first.wait_for()
    expect(page.locator("#look-compared")).to_be_hidden()


def test_a_comparison_that_does_not_fit_is_one_line(served, monkeypatch):
    run = served.ended(served.context.store.start(served.recipe(seed=15), "a fifth"))
    asked, report = (run.recipe, 50, "compare"), run.report
    texts, tokens = report.calibration.texts, 256
    # Four trainings, two with a teacher; base, fused, three controls, fifteen of the sweep and the trained ones scored.
    most = 4 * 6.0 * report.target.parameters * 50 * 8 * tokens + 2 * 2.0 * report.source.parameters * texts * tokens
    scored = (2 + 3 + 15 + 4) * report.target.parameters + report.source.parameters
    # The merge was not asked whether it points downhill: its fused model and controls are scored again, and the target
    # is differentiated on the texts of that.
    assert run.recipe.evaluation.descent == 0
    scored += (1 + 3) * report.target.parameters
    downhill = 6.0 * report.target.parameters * merge_recipe(run.recipe).evaluation.descent
    most += (2.0 * scored * report.evaluation.texts + downhill) * run.recipe.calibration.max_tokens
    refuse_further(report, *asked, AppSettings(public=True, max_operations=most))
    with pytest.raises(RecipeError, match=r"comparison .* of 50 steps takes up to .* tmerge compare$"):
        refuse_further(report, *asked, AppSettings(public=True, max_operations=most - 1))
    # One that was asked is not evaluated again.
    evaluation = run.recipe.evaluation.model_copy(update={"descent": 64})
    known = run.recipe.model_copy(update={"evaluation": evaluation})
    less = 8.0 * report.target.parameters * report.evaluation.texts + downhill
    less *= run.recipe.calibration.max_tokens
    refuse_further(report, known, 50, "compare", AppSettings(public=True, max_operations=most - less))
    several = report.model_copy(update={"sources": (report.source,) * 2})
    with pytest.raises(RecipeError, match="takes one source, and this merge has 2"):
        refuse_further(several, *asked, AppSettings())
    monkeypatch.setattr(further, "available_memory", lambda device: 16 * report.target.parameters)
    with pytest.raises(NotEnoughMemoryError, match=r"a comparison with trainings needs about .* are free"):
        refuse_for_memory(report, run.recipe, run.folder, "compare")


def test_kept_models_are_let_go_for_what_may_be_done_alone(served, monkeypatch, tmp_path):
    store, asked = served.context.store, []
    run = served.ended(store.start(served.recipe(seed=16), "a sixth"))
    monkeypatch.setattr(store, "_make_room", lambda: asked.append("room"))
    several = run.report.model_copy(update={"sources": (run.report.source,) * 2})
    for changed, value, words in (
        (run, run.report, (10**9, "sft")),
        (run, several, (5, "compare")),
    ):
        with monkeypatch.context() as patch, pytest.raises(RecipeError):
            patch.setattr(changed, "report", value)
            store.go_on(run.id, *words, "a sixth")
    with monkeypatch.context() as patch, pytest.raises(RecipeError, match="trillion operations"):
        patch.setattr(store, "settings", AppSettings(public=True, max_operations=1.0))
        store.go_on(run.id, 5, "sft", "a sixth")
    assert asked == []
    # Its files may be swept between two looks at it.
    with monkeypatch.context() as patch, pytest.raises(RunNotFoundError, match="cannot be read .*; start it again"):
        patch.setattr(run, "folder", tmp_path / "gone")
        store.go_on(run.id, 5, "sft", "a sixth")
    assert asked == ["room"]


def test_a_reconstruction_of_the_same_pair_is_set_up(visit, served, monkeypatch):
    from tmerge.ui.parts import going_on

    # The picos of these tests are strangers, of which it would not be proposed.
    monkeypatch.setattr(going_on, "is_related", lambda related: True)
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
