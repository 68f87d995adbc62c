"""What has to be mended stands at its field, once, and nothing of a recipe that is no more is shown as if it were."""

import pytest

pytest.importorskip("playwright.sync_api", reason="playwright is not installed")

from playwright.sync_api import expect

from tests.ui.test_choose import name_model, open_fold, write_yaml, yaml_text
from tmerge.ui.parts.form import from_preset, preset_of, with_value
from tmerge.ui.parts.problem import places_of
from tmerge.ui.server.pushes import PushUnderWay


@pytest.mark.parametrize(
    ("line", "place"),
    [
        ("fusion.alpha is -3: choose a number in [0, 1] or auto, with fusion.what: weights", "set-fusion-alpha"),
        ("fusion.what is task-vector, which needs source_base: the source before its fine-tuning", "set-fusion-what"),
        ("'source_base' is missing: the model that all sources were made from", "set-source_base"),
        ("source_base is only read when fusion.what is task-vector", "set-source_base"),
        ("name a target model first", "target-model"),
        ("source '/a/target' is a path, and the browser reads none", "source-model"),
        ("calibration.dataset is empty; upload a file of texts", "texts-dataset"),
        ("save.max_shard_size is '1KB', where this app takes 100MB at least", "set-save-max_shard_size"),
        # What no field holds.
        ("unknown key 'devise'; did you mean 'device'? All keys: tmerge recipe", "recipe-yaml"),
        ("trust_remote_code runs a repo's own code", "recipe-yaml"),
        ("line 3: not YAML", "recipe-yaml"),
    ],
)
def test_an_error_is_of_the_field_that_it_names_first(line, place):
    assert places_of(line)[0] == place


def test_a_preset_that_is_changed_is_that_preset_no_more():
    demo = from_preset("demo")
    assert preset_of(demo) == "demo"
    assert preset_of(with_value(demo, "fusion.alpha", 0.07)) is None
    assert preset_of(with_value(with_value(demo, "seed", 7), "seed", 0)) == "demo"


def test_an_error_stands_at_its_field_once(visit, served):
    page = visit()
    said = page.get_by_text("is a path, and the browser reads none")
    name_model(page, "source", str(served.root / "source"))
    name_model(page, "target", "/etc/hostname")
    expect(page.locator("#target-model #problem")).to_contain_text("/etc/hostname")
    expect(page.locator("#target-model input")).to_have_attribute("aria-invalid", "true")
    # Nor do the cards say it a second time.
    expect(page.locator("#expected")).to_contain_text("The recipe has a mistake", timeout=60_000)
    assert said.count() == 1
    field, line = page.locator("#target-model input").bounding_box(), said.bounding_box()
    assert 0 <= line["y"] - field["y"] - field["height"] < 30
    name_model(page, "target", str(served.root / "target"))
    expect(page.locator("#expected")).to_contain_text("llama", timeout=60_000)
    expect(page.locator("#target-model #problem")).to_have_count(0)
    expect(page.locator("#target-model input")).not_to_have_attribute("aria-invalid", "true")
    # What is written in a field that is in sight, and started with all the same: the page goes there.
    alpha = page.get_by_label("Strength (alpha)")
    alpha.press("Control+A")
    alpha.press_sequentially("7")
    expect(page.locator("#set-fusion-alpha #problem")).to_contain_text("fusion.alpha is 7")
    page.locator("#start").click()
    expect(page.locator("#start")).to_be_enabled()
    expect(page.locator("#set-fusion-alpha #problem")).to_be_in_viewport()


def test_a_recipe_that_cannot_be_read_has_no_old_answer_beside_it(visit, served):
    page = visit()
    for role in ("target", "source"):
        name_model(page, role, str(served.root / role))
    expect(page.locator("#expected")).to_contain_text("qwen3", timeout=60_000)
    open_fold(page, "Recipe (YAML)")
    whole = yaml_text(page)
    write_yaml(page, "target: a/b\nsource: [c\n")
    expect(page.locator("#recipe-yaml #problem")).to_contain_text("not YAML")
    expect(page.locator("#expected")).not_to_be_visible()
    expect(page.locator("#unread")).to_contain_text("The recipe cannot be read")
    # It goes where it can be seen when its editor is closed, and back.
    open_fold(page, "Recipe (YAML)")
    expect(page.locator("#problem-box #problem")).to_contain_text("not YAML")
    open_fold(page, "Recipe (YAML)")
    expect(page.locator("#recipe-yaml #problem")).to_contain_text("not YAML")
    # The same recipe as before is answered for as before.
    write_yaml(page, whole)
    expect(page.locator("#expected")).to_be_visible()
    expect(page.locator("#expected")).to_contain_text("qwen3")
    expect(page.locator("#unread")).not_to_be_visible()


def test_the_preset_is_empty_once_the_recipe_is_another(visit):
    page = visit()
    preset = page.get_by_label("Preset")
    # The tests' own beginning is none.
    expect(preset).to_have_value("")
    page.locator("#way-strangers").click()
    expect(preset).to_have_value("demo")
    alpha = page.get_by_label("Strength (alpha)")
    alpha.press("Control+A")
    alpha.press_sequentially("0.07")
    expect(preset).to_have_value("")


def test_an_old_push_that_failed_is_no_answer_to_a_new_one(visit, served):
    run_id = served.context.store.start(served.recipe(), "pusher")
    run = served.ended(run_id)
    run.push = PushUnderWay("a/b", error="the Hub said no", ended=0.0)
    page = visit(f"&run={run_id}")
    expect(page.locator("#run-head")).to_contain_text("Done", timeout=30_000)
    # Nothing is being solved any more.
    expect(page.locator("#run-feature input")).to_have_value("the latest")
    page.get_by_role("tab", name="Push", exact=True).click()
    expect(page.locator("#push-progress")).to_contain_text("Not pushed")
    page.locator("#push-go").click()
    expect(page.locator("#push-fault")).to_contain_text("Nobody is signed in")
    expect(page.locator("#push-progress")).not_to_contain_text("Not pushed")
