"""A run again, from its own folder: the same bytes, and what is said when they are not."""

from __future__ import annotations

import json
import shutil

import pytest

from tests import forked
from tests.pico import pico_model, save_pico
from tests.stages.test_task_vector import _shaken, save_all
from tests.stages.test_task_vector import recipe_for as pair_recipe
from tmerge.comparison import reproduce as reproducing
from tmerge.comparison.reproduce import difference_words, reproduce
from tmerge.errors import ModelNotFoundError, OutputExistsError, UnsupportedModelError
from tmerge.hub import find_run
from tmerge.recipe import CARRYING, CARRYING_BESIDE, MATCHING_BY_WEIGHTS, READING_AT_ENDS, Recipe
from tmerge.run import Run
from tmerge.stages.merge import merge


def reproducible(folder, **sections):
    """Saves two models, and gives the recipe of a short merge of them."""
    for name, family, seed in (("target", "llama", 1), ("source", "gpt2", 2)):
        save_pico(family, folder / name, seed=seed)
    return Recipe(
        target=str(folder / "target"),
        source=str(folder / "source"),
        calibration={"dataset": "samples:english", "texts": 90},
        fusion={"top_k": 16},
        **sections,
    )


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("reproduce")
    recipe = reproducible(folder, adaptation={"steps": 2, "batch_size": 2})
    merge(recipe, folder / "fused")
    return folder


def test_the_same_bytes(finished, tmp_path):
    result = reproduce(str(finished / "fused"), tmp_path / "again")
    assert result.same is True and result.differs == {} and result.others == ()
    pair = result.weights["model.safetensors"]
    assert pair.there == pair.published == pair.here
    assert result.scores.there == result.scores.here
    written = (tmp_path / "again/model.safetensors").read_bytes()
    assert written == (finished / "fused/model.safetensors").read_bytes()


def test_what_a_recipe_of_before_does_not_say_is_told(finished, tmp_path):
    shutil.copytree(finished / "fused", tmp_path / "fused")
    path = tmp_path / "fused/tmerge/recipe.yaml"
    text = path.read_text()
    # As if these had come since.
    assert text.count("  units: none\n") == text.count("memory: auto\n") == 1
    path.write_text(text.replace("  units: none\n", "").replace("memory: auto\n", ""))
    heard = []
    reproduce(str(tmp_path / "fused"), tmp_path / "again", listener=lambda step: heard.append(step.what))
    said = [words for words in heard if "was written before there was" in words]
    # Where a model is held decides nothing.
    assert len(said) == 1 and 'before there was fusion.units ("none" by now): with today' in said[0]


@pytest.fixture(scope="module")
def matched_by_weights(tmp_path_factory):
    folder = tmp_path_factory.mktemp("relatives")
    base = pico_model("llama")
    save_all(folder, target=_shaken(base, 0.02, 1), base=base, source=_shaken(base, 0.05, 2))
    merge(pair_recipe(folder), folder / "fused")
    return folder / "fused"


@pytest.mark.parametrize(
    ("before", "forms"),
    [({"matching by weights": 3}, "form 3 there"), ({}, "not said there"), (None, "not said there")],
)
def test_that_the_method_has_changed_is_told_before_and_after(matched_by_weights, tmp_path, monkeypatch, before, forms):
    report = json.loads((matched_by_weights / "tmerge/report.json").read_text())
    carrying = {"reading at tokens' ends": READING_AT_ENDS, "carrying beside the projections": CARRYING_BESIDE}
    carrying["carrying"] = CARRYING
    assert report["method"] == {"matching by weights": MATCHING_BY_WEIGHTS, **carrying}
    shutil.copytree(matched_by_weights, tmp_path / "fused")
    report |= {
        "method": None if before is None else {**before, **carrying},
        "weights": dict.fromkeys(report["weights"], "0" * 64),
    }
    if before is None:
        del report["method"]
    (tmp_path / "fused/tmerge/report.json").write_text(json.dumps(report))
    heard = []

    def merged(*_, **__):
        heard.append("merging")
        return Run(matched_by_weights).report()

    monkeypatch.setattr(reproducing, "merge", merged)
    result = reproduce(str(tmp_path / "fused"), tmp_path / "again", listener=lambda step: heard.append(step.what))
    said = f"matching by weights: {forms}, form {MATCHING_BY_WEIGHTS} here"
    told = [number for number, words in enumerate(heard) if said in words]
    assert len(told) == 1 and told[0] < heard.index("merging")
    assert not result.same
    words = difference_words(result).partition("what differs: ")[2]
    assert f"matching by weights {forms}, form {MATCHING_BY_WEIGHTS} here" in words
    assert ("carrying beside the projections" in words) == (before is None)


def test_of_one_form_nothing_is_said(matched_by_weights, tmp_path):
    heard = []
    result = reproduce(str(matched_by_weights), tmp_path / "again", listener=lambda step: heard.append(step.what))
    assert result.same and result.differs == {} and not any("form of the method" in words for words in heard)


@pytest.mark.slow
def test_other_bytes_end_with_1_and_say_what_differs(finished, tmp_path):
    shutil.copytree(finished / "fused", tmp_path / "fused")
    path = tmp_path / "fused/tmerge/report.json"
    report = json.loads(path.read_text())
    report["weights"] = dict.fromkeys(report["weights"], "0" * 64)
    report["versions"]["torch"] = "1.0"
    path.write_text(json.dumps(report))
    ended = forked.run(["reproduce", tmp_path / "fused", "--out", tmp_path / "o"])
    assert ended.returncode == 1, ended.stderr
    line = ended.stderr.strip().splitlines()[-1]
    assert line.startswith("error: the weights differ from those of") and "torch 1.0 there" in line
    assert "the report names another file than is published" in line
    assert "Traceback" not in ended.stderr


def test_a_model_that_is_another_by_now_is_refused_before_it_is_merged(finished, tmp_path):
    shutil.copytree(finished / "fused", tmp_path / "fused")
    save_pico("llama", tmp_path / "target", seed=9)
    path = tmp_path / "fused/tmerge/recipe.yaml"
    path.write_text(path.read_text().replace(str(finished / "target"), str(tmp_path / "target")))
    with pytest.raises(ModelNotFoundError, match="is not the target that .* was made from"):
        reproduce(str(tmp_path / "fused"), tmp_path / "again")
    assert not (tmp_path / "again").exists()


@pytest.mark.slow
def test_a_trained_run_is_merged_and_trained_again(finished, tmp_path):
    pytest.importorskip("trl", reason="the adapt extra is not installed")
    from tmerge.stages.adapt import adapt_run

    trained = adapt_run(finished / "fused", finished / "trained", {})
    result = reproduce(str(finished / "trained"), tmp_path / "again")
    assert result.same is True, difference_words(result)
    assert result.weights["model.safetensors"].here == trained.weights["model.safetensors"]
    assert result.folder == str(tmp_path / "again/trained")


@pytest.mark.slow
def test_the_weights_that_lie_there_count_and_not_what_the_report_says(finished, tmp_path):
    shutil.copytree(finished / "fused", tmp_path / "fused")
    weights = tmp_path / "fused/model.safetensors"
    data = weights.read_bytes()
    weights.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    (tmp_path / "fused/original").mkdir()
    (tmp_path / "fused/original/other.safetensors").write_bytes(data)
    steps = []
    result = reproduce(str(tmp_path / "fused"), tmp_path / "again", listener=steps.append)
    assert result.same is False and result.others == ("original/other.safetensors",)
    words = difference_words(result)
    assert "model.safetensors: the published file is another than its report names" in words
    assert "original/other.safetensors is published and not named" in words and "\n" not in words
    # Said before the hours that the recipe may take, too.
    assert steps[0].stage == "note" and "is not the file that its report names" in steps[0].what


def test_the_reproduction_goes_into_a_folder_of_its_own(finished, tmp_path):
    before = sorted(path for path in (finished / "fused").rglob("*"))
    for out in (finished / "fused", finished / "fused/again"):
        with pytest.raises(OutputExistsError, match="choose another --out"):
            reproduce(str(finished / "fused"), out)
    (tmp_path / "done/tmerge").mkdir(parents=True)
    (tmp_path / "done/tmerge/report.json").write_text("{}")
    with pytest.raises(OutputExistsError, match="holds a finished run already") as caught:
        reproduce(str(finished / "fused"), tmp_path / "done")
    assert caught.value.exit_code == 2 and "\n" not in str(caught.value)
    assert sorted(path for path in (finished / "fused").rglob("*")) == before


def _in_place_of_the_merge(monkeypatch, run):
    """The recipes that would have been run."""
    heard = []
    monkeypatch.setattr(reproducing, "merge", lambda recipe, *_, **__: heard.append(recipe) or Run(run).report())
    return heard


def test_code_of_others_runs_for_who_trusts_it_alone(finished, tmp_path, monkeypatch):
    shutil.copytree(finished / "fused", tmp_path / "fused")
    path = tmp_path / "fused/tmerge/recipe.yaml"
    path.write_text(
        path.read_text().replace("trust_remote_code: []\n", "trust_remote_code: [some/coded, other/coded]\n")
    )
    found = find_run(str(tmp_path / "fused"))
    assert found.trusted == ("some/coded", "other/coded") and found.recipe().trust_remote_code == ()
    heard = _in_place_of_the_merge(monkeypatch, finished / "fused")
    with pytest.raises(UnsupportedModelError, match="other/coded run; .*: --trust-remote-code other/coded$"):
        reproduce(str(tmp_path / "fused"), tmp_path / "again", trust_remote_code=["some/coded"])
    assert not heard
    both = ["other/coded", "some/coded"]
    reproduce(str(tmp_path / "fused"), tmp_path / "again", trust_remote_code=both)
    assert heard[0].trust_remote_code == tuple(both)


def test_another_device_than_the_recipes(finished, tmp_path, monkeypatch):
    heard = _in_place_of_the_merge(monkeypatch, finished / "fused")
    reproduce(str(finished / "fused"), tmp_path / "again", device="cpu")
    reproduce(str(finished / "fused"), tmp_path / "again")
    assert [recipe.device for recipe in heard] == ["cpu", "auto"]


def test_another_source_base_is_refused_before_anything_is_read(matched_by_weights, tmp_path, monkeypatch):
    heard = _in_place_of_the_merge(monkeypatch, matched_by_weights)
    path = matched_by_weights.parent / "base/model.safetensors"
    before = path.read_bytes()
    path.write_bytes(before[:-1] + bytes([before[-1] ^ 1]))
    try:
        with pytest.raises(ModelNotFoundError, match="base here is not the source_base that .* was made from"):
            reproduce(str(matched_by_weights), tmp_path / "again")
    finally:
        path.write_bytes(before)
    assert not heard
    reproduce(str(matched_by_weights), tmp_path / "again")
    assert len(heard) == 1
