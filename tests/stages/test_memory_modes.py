"""``memory: blocks``: a merge whose models are read from their files block by block gives the bytes of any other."""

from __future__ import annotations

import pytest
import torch

from tests.models.pico_gguf import save_pico_gguf
from tests.pico import pico_model
from tests.stages.test_merge import digest, recipe_for
from tests.stages.test_task_vector import _deeper, _shaken, save_all
from tmerge.comparison.evaluate import evaluate_models
from tmerge.errors import UnsupportedModelError
from tmerge.models import Model, device, loading
from tmerge.models import model as handles
from tmerge.recipe import Recipe
from tmerge.stages.merge import advance, merge
from tmerge.stages.step import Step

TOKENS = {"dataset": "samples:indonesian", "texts": 70, "max_tokens": 48, "held_out": 0.3, "token_rows": 200}
KINDS = {
    "weights": {},
    "task-vector": {"transport": {"structure": "shared"}, "calibration": {**TOKENS, "rows": "tokens"}},
    "reconstruct": {"transport": {"structure": "shared"}, "calibration": {**TOKENS, "rows": "tokens"}},
}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    target = pico_model("llama")
    base = _deeper(target)
    save_all(folder, target=target, base=base, source=_shaken(base, 0.15, 2))
    save_pico_gguf(folder / "source.gguf", seed=1)
    return folder


@pytest.fixture
def loads(monkeypatch):
    """What was loaded whole."""
    found = []

    def remembered(reference, **options):
        found.append(reference.rpartition("/")[2])
        return loading.load_model(reference, **options)

    monkeypatch.setattr(handles, "load_model", remembered)
    return found


def recipe(models, memory, what="weights", source="source", **sections):
    data = recipe_for(models).model_dump(mode="json") | KINDS[what]
    data |= {"target": str(models / "target"), "source": str(models / source), "memory": memory, **sections}
    data["fusion"] = {"what": what, "alpha": 1.0 if what != "weights" else 0.1}
    if what == "task-vector":
        data["source_base"] = str(models / "base")
    if what == "reconstruct":
        data["fusion"]["keep"] = None
    return Recipe.from_mapping(data | {"evaluation": {"texts": 8, "bootstrap": 100, "controls": ["shrink"]}})


@pytest.mark.parametrize(
    "what",
    [
        "weights",
        *(pytest.param(name, marks=pytest.mark.slow) for name in KINDS if name != "weights" and name != "reconstruct"),
        "reconstruct",
    ],
)
def test_the_bytes_and_the_scores_are_the_same(models, tmp_path, loads, what):
    whole = merge(recipe(models, "resident", what), tmp_path / "whole")
    assert "source" in loads
    loads.clear()
    notes = []
    blocks = merge(
        recipe(models, "blocks", what),
        tmp_path / "blocks",
        listener=lambda step: notes.append(step.what) if step.unit == "notes" else None,
    )
    # To be scored and saved, the target is loaded; the source never is.
    assert set(loads) == {"target"}
    assert any("source is read block by block" in note for note in notes)
    assert digest(tmp_path / "blocks") == digest(tmp_path / "whole")
    assert blocks.evaluation.source == whole.evaluation.source
    assert blocks.evaluation.fused == whole.evaluation.fused


@pytest.mark.slow
def test_a_packed_source_is_never_unpacked_whole(models, tmp_path, loads):
    merge(recipe(models, "resident", source="source.gguf", dtype="auto"), tmp_path / "whole")
    loads.clear()
    merge(recipe(models, "blocks", source="source.gguf", dtype="auto"), tmp_path / "blocks")
    assert set(loads) == {"target"}
    assert digest(tmp_path / "blocks") == digest(tmp_path / "whole")


def test_the_choice_may_change_in_the_middle_of_a_run(models, tmp_path, loads):
    advance(recipe(models, "resident"), tmp_path / "fused", until="source")
    loads.clear()
    merge(recipe(models, "blocks"), tmp_path / "fused")
    assert "source" not in loads  # its features are there


def test_what_does_not_fit_is_read_by_blocks_by_itself(models, monkeypatch):
    model = Model(str(models / "source"), device="cpu")
    assert model.open().block_weights is None
    model.release()
    monkeypatch.setattr(device, "available_memory", lambda there: model.held_bytes)
    assert model.open().block_weights is not None
    # Who needs its weights gets all of it.
    assert model.load().block_weights is None and model.is_loaded
    assert torch.equal(model.views.layers[0]["q"].weight(), model.weights["model.layers.0.self_attn.q_proj.weight"])


def test_what_does_not_fit_is_scored_by_blocks(models, monkeypatch):
    references = [str(models / "target"), str(models / "source")]
    steps: list[Step] = []
    resident = evaluate_models(references, dataset="samples:malay", texts=12, device="cpu", listener=steps.append)
    assert {step.unit for step in steps} == {"models", "texts"}
    steps.clear()
    monkeypatch.setattr(handles, "fits", lambda needed, there, free: False)
    by_blocks = evaluate_models(references, dataset="samples:malay", texts=12, device="cpu", listener=steps.append)
    assert {step.unit for step in steps} == {"models", "blocks", "notes"}
    assert by_blocks == resident


def test_a_model_that_cannot_be_read_in_parts_says_so_or_is_loaded(models, tmp_path, monkeypatch):
    monkeypatch.setattr(loading, "empty_model", lambda config, dtype: None)
    with pytest.raises(UnsupportedModelError, match=r"a llama model cannot be read block by block .* memory: resident"):
        Model(str(models / "source"), device="cpu", memory="blocks").open()
    monkeypatch.setattr(handles, "fits", lambda needed, there, free: False)
    assert Model(str(models / "source"), device="cpu").open().block_weights is None


def test_it_decides_nothing_that_is_kept(models):
    assert recipe(models, "blocks").digest() == recipe(models, "resident").digest()
