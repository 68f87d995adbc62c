"""Strengths of several sources, and those that are none of one base or bring nothing."""

from __future__ import annotations

import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from tests.pico import PICO_VOCAB, pico_model, save_pico
from tests.stages.test_sources import models, several  # noqa: F401 - a fixture
from tests.stages.test_task_vector import save_all
from tmerge.comparison.compare import compare
from tmerge.errors import FusionError, RecipeError, UnsupportedModelError
from tmerge.preflight.check import check
from tmerge.recipe import Recipe
from tmerge.stages.merge import merge
from tmerge.stages.several import neurons_of_report


def test_strengths_are_chosen_one_for_each(models, tmp_path):  # noqa: F811
    calibration = {"choosing": 0.4, "texts": 90}
    recipe = several(models, "first", "lora", calibration=calibration, fusion={"alpha": "auto", "alphas": [0.3, 1.0]})
    out = tmp_path / "fused"
    report = merge(recipe, out)
    choice = report.fusion.choice
    assert set(choice.alpha) == {"source 1", "source 2"}
    assert {trial.group for trial in choice.trials} >= {("source 1",), ("source 2",)}
    assert choice.difference.high <= 0  # better than the target there, or the target
    assert [each.strength for each in report.sources] == list(choice.alpha.values())
    if not any(choice.alpha.values()):
        assert report.evaluation.fused == report.evaluation.base
        assert all(alone.difference.value == 0 for alone in report.evaluation.alone.values())
        fused, target = (load_file(of / "model.safetensors") for of in (out, models / "target"))
        assert all(torch.equal(values, target[name]) for name, values in fused.items())


def test_of_strength_zero_a_source_is_the_target(models, tmp_path):  # noqa: F811
    report = merge(several(models, "first", "second", fusion={"alpha": 0.0}), tmp_path / "fused")
    assert report.evaluation.fused.value == report.evaluation.base.value
    assert [alone.value for alone in report.evaluation.alone.values()] == [report.evaluation.base.value] * 2
    assert report.verdict == "no difference"


def test_a_source_of_another_shape_or_vocabulary_is_named(models, tmp_path):  # noqa: F811
    for name in ("target", "base", "first"):
        shutil.copytree(models / name, tmp_path / name)
    save_pico("llama", tmp_path / "shallow", layers=2)
    with pytest.raises(UnsupportedModelError, match=r"source 2 .*shallow is not of source_base .*2 layers and not 3"):
        check(several(tmp_path, "first", "shallow"))
    save_all(tmp_path, longer=pico_model("llama", layers=3, vocab_size=PICO_VOCAB + 8))
    with pytest.raises(UnsupportedModelError, match=rf"source 1 .*longer .*vocabulary of {PICO_VOCAB + 8} and not"):
        check(several(tmp_path, "longer", "first"))
    path = tmp_path / "first/tokenizer.json"
    path.write_text(_swapped(path.read_text()))
    with pytest.raises(UnsupportedModelError, match=r"source 1 .*first has another vocabulary .*the token"):
        merge(several(tmp_path, "first"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def _swapped(text):
    """A tokenizer two of whose tokens have each other's ids."""
    data = json.loads(text)
    ids = data["model"]["vocab"]
    first, second = list(ids)[-2:]
    ids[first], ids[second] = ids[second], ids[first]
    return json.dumps(data)


def test_what_an_adapter_leaves_behind_and_one_that_brings_nothing(models):  # noqa: F811
    fusion = {"projections": ["q", "v", "down"]}
    found = check(several(models, "lora", "other", fusion=fusion))
    assert found.projections == ["q", "v", "down"]
    assert any("what source 2" in note and "up_proj" in note for note in found.notes)
    assert check(several(models, "lora", "other")).projections == ["q", "v", "up", "down"]
    with pytest.raises(UnsupportedModelError, match=r"source 2 .*other changes none of the projections v, down"):
        check(several(models, "lora", "other", fusion={"projections": ["v", "down"]}))


def test_the_base_itself_and_two_names_of_one_are_told(models, tmp_path):  # noqa: F811
    shutil.copytree(models / "first", tmp_path / "first")
    recipe = several(models, "base", "first")
    data = recipe.model_dump(mode="json")
    data["sources"].append({"source": str(tmp_path / "first")})
    notes = check(Recipe.from_mapping(data)).notes
    assert any("base is source_base itself" in note for note in notes)
    assert any("source 3" in note and "are the same: it counts twice" in note for note in notes)


def test_compare_says_that_it_holds_one(models, tmp_path):  # noqa: F811
    with pytest.raises(RecipeError, match="sources has 2, and compare holds one source"):
        compare(several(models, "first", "second"), tmp_path / "compared")
    assert not (tmp_path / "compared").exists()


def test_what_an_earlier_form_of_the_method_carried_is_not_read(models, tmp_path):  # noqa: F811
    recipe = several(models, "first", "second")
    assert recipe.fusion.carries_stream
    for before in (None, {"carrying beside the projections": 2}):
        with pytest.raises(
            FusionError, match="made by an earlier form of the method .*; run its recipe again into ano"
        ):
            neurons_of_report(tmp_path, recipe, SimpleNamespace(method=before))
