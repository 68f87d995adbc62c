"""Fusing again from a finished run's transport: the same neurons, without the features."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

from tests.pico import save_pico
from tmerge.errors import PlanError, RunNotFoundError
from tmerge.fusion import StoredNeurons
from tmerge.hub import find_run
from tmerge.recipe import Recipe, load_recipe
from tmerge.stages.merge import merge


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    save_pico("llama", folder / "target", layers=3)
    save_pico("qwen2", folder / "source", layers=2, seed=1, hidden_size=48, intermediate_size=80)
    return folder


def recipe_for(pair, **sections):
    data = {
        "target": str(pair / "target"),
        "source": str(pair / "source"),
        "dtype": "float32",
        "calibration": {"dataset": "samples:english", "texts": 60, "max_tokens": 48, "held_out": 0.3},
        # Few entries, so that some rows and columns lose all of theirs.
        "transport": {"entries_kept": 2, **sections.pop("transport", {})},
        "fusion": {"alpha": 0.2, "top_k": 0.5, **sections.pop("fusion", {})},
        "evaluation": {"texts": 12, "bootstrap": 200},
    }
    return Recipe.from_mapping({**data, **sections})


@pytest.fixture(scope="module")
def finished(pair, tmp_path_factory):
    """A run, and what is left of it when it has been pushed: no cache."""
    folder = tmp_path_factory.mktemp("run")
    merge(recipe_for(pair), folder / "fused")
    shutil.copytree(folder / "fused", folder / "pushed", ignore=shutil.ignore_patterns("cache"))
    return folder


def swept(finished, out, *settings, **overrides):
    plan = str(finished / "pushed")
    recipe = load_recipe(None, {"plan": plan, **overrides}, settings, start=find_run(plan).recipe())
    steps = []
    return merge(recipe, out, listener=steps.append).to_dict(), steps


def transported(folder):
    items = StoredNeurons(folder / "tmerge" / "cache" / "transported")
    return {(item.layer, item.projection): item for item in items}


def test_the_plan_moves_what_its_run_moved(finished, tmp_path):
    report, steps = swept(finished, tmp_path / "again")
    first = json.loads((finished / "fused" / "tmerge" / "report.json").read_text())
    mine, theirs = transported(tmp_path / "again"), transported(finished / "fused")
    assert mine.keys() == theirs.keys()
    for place, item in mine.items():
        assert item.neurons.equal(theirs[place].neurons)
        # The plan's entries are of 16 bits: eleven of mantissa in each, and each weight is a mean over both plans.
        torch.testing.assert_close(
            item.weight, theirs[place].weight, rtol=0, atol=2e-3 * float(item.weight.abs().max())
        )
    assert report["evaluation"]["base"] == first["evaluation"]["base"]
    assert report["evaluation"]["fused"]["value"] == pytest.approx(first["evaluation"]["fused"]["value"], abs=1e-4)
    assert report["plan"] == str(finished / "pushed") and report["calibration"] == first["calibration"]
    # Nothing was captured and nothing solved.
    assert not (tmp_path / "again" / "tmerge" / "cache" / "features").exists()
    assert not {step.what for step in steps if "features" in step.what or "feature plans" in step.what}


def test_some_rows_lost_every_entry(finished):
    """Or the fixture would not show that their largest entry is found again."""
    record = find_run(str(finished / "pushed")).record()
    assert sum(len(record.plans(key).beyond) for key in record.keys) > 10


@pytest.mark.slow
def test_alpha_scale_projections_and_neurons_are_swept(pair, finished, tmp_path):
    settings = {"alpha": 0.5, "scale": "row-norm", "units": "feature", "projections": ["v", "o"], "top_k": 5}
    words = [f"fusion.{name}={json.dumps(value)}" for name, value in settings.items()]
    report, _ = swept(finished, tmp_path / "swept", *words)
    merge(recipe_for(pair, fusion=settings), tmp_path / "direct")
    mine, theirs = transported(tmp_path / "swept"), transported(tmp_path / "direct")
    assert {place[1] for place in mine} == {"v", "o"} and mine.keys() == theirs.keys()
    for place, item in mine.items():
        assert item.neurons.equal(theirs[place].neurons)
        torch.testing.assert_close(
            item.weight, theirs[place].weight, rtol=0, atol=4e-3 * float(item.weight.abs().max())
        )
    assert report["fusion"]["alpha"] == 0.5 and list(report["fusion"]["projections"]) == ["v", "o"]
    # And what was swept is a plan again, of what it still has.
    again = find_run(str(tmp_path / "swept"))
    assert again.record().projections == ["v", "o"]
    assert (
        load_file(tmp_path / "swept" / "model.safetensors").keys()
        == load_file(pair / "target" / "model.safetensors").keys()
    )


@pytest.mark.slow
def test_a_sweep_is_resumed_and_gives_the_same_bytes(finished, tmp_path):
    swept(finished, tmp_path / "one")
    before = (tmp_path / "one" / "model.safetensors").read_bytes()
    _, steps = swept(finished, tmp_path / "one")
    assert not steps
    swept(finished, tmp_path / "two")
    assert (tmp_path / "two" / "model.safetensors").read_bytes() == before


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (["fusion.projections=[q, gate]"], "holds no gate, only q, k, v, o"),
        (["transport.epsilon=0.2"], "another transport"),
        (["seed=3"], "another seed"),
        (["calibration.held_out=0.6"], "are among those that the plan"),
        (["calibration.rows=last"], "calibration.rows is last"),
        (["fusion.alpha=auto"], "give alpha a number"),
    ],
)
def test_a_plan_that_does_not_fit_is_refused_in_one_line(finished, tmp_path, settings, words):
    with pytest.raises(PlanError) as refused:
        swept(finished, tmp_path / "refused", *settings)
    assert words in str(refused.value) and "\n" not in str(refused.value)
    assert not (tmp_path / "refused" / "config.json").exists()


def test_a_plan_of_another_model_is_refused(finished, tmp_path):
    save_pico("llama", tmp_path / "other", layers=3, seed=7)
    with pytest.raises(PlanError, match=r"made for the target .* at \w{12}; .*other is at \w{12}"):
        swept(finished, tmp_path / "refused", target=str(tmp_path / "other"))
    assert not (tmp_path / "refused").exists()


def test_what_is_no_run_is_no_plan(tmp_path):
    for name in ("nothing-here", str(tmp_path), "./nothing"):
        with pytest.raises(RunNotFoundError) as refused:
            find_run(name)
        assert "\n" not in str(refused.value)
