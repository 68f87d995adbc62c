"""What a source is fused from: its files and never the loaded model, which is let go once it has been read."""

from __future__ import annotations

import gc
import shutil
import weakref

import pytest
import torch
from safetensors.torch import load_file

from tests.models.pico_gguf import save_pico_gguf
from tests.pico import save_pico
from tests.stages.test_merge import digest, recipe_for
from tmerge.models import load_model, save_checkpoint
from tmerge.models import model as handles
from tmerge.models.weights import MappedWeights
from tmerge.recipe import Recipe
from tmerge.stages.merge import advance, merge

VECTOR = {"what": "task-vector", "alpha": 1.0, "stream": True, "projections": ["q", "v", "o", "up"]}
KEPT = "source-weights.safetensors"
SHARED = {"transport": {"structure": "shared"}, "calibration": {"rows": "tokens"}}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    save_pico("llama", folder / "target", layers=3)
    for seed, name in enumerate(("source", "base"), start=1):
        save_pico_gguf(folder / f"{name}.gguf", seed=seed)
        # The same model as plain files, in the dtype that the packed one is unpacked to.
        (folder / name).mkdir()
        save_checkpoint(load_model(str(folder / f"{name}.gguf"), device="cpu"), folder / name)
    return folder


def recipe(models, suffix="", **sections):
    sections = {"dtype": "auto", "source": str(models / f"source{suffix}"), **sections}
    if sections.get("fusion") == VECTOR:
        sections["source_base"] = str(models / f"base{suffix}")
    data = recipe_for(models).model_dump(mode="json") | sections
    return Recipe.from_mapping(data | {"evaluation": {"texts": 8, "bootstrap": 100, "controls": ["shrink"]}})


@pytest.fixture
def loaded(monkeypatch):
    """The references that were loaded, with the stage in which they were."""
    found, stage = [], [""]

    def remembered(reference, **options):
        found.append((reference.rpartition("/")[2], stage[0]))
        return load_model(reference, **options)

    def listen(step):
        stage[0] = step.stage

    monkeypatch.setattr(handles, "load_model", remembered)
    return found, listen


@pytest.mark.slow
@pytest.mark.parametrize("sections", [{}, pytest.param({"fusion": VECTOR, **SHARED}, marks=pytest.mark.slow)])
def test_no_source_is_loaded_to_fuse_from_it_but_what_is_packed_once(models, tmp_path, loaded, sections):
    merge(recipe(models, ".gguf", **sections), tmp_path / "packed", listener=loaded[1])
    bases = [("base.gguf", "fuse")] if sections else []
    assert loaded[0] == [("target", "target"), ("source.gguf", "source"), *bases]
    loaded[0].clear()
    merge(recipe(models, **sections), tmp_path / "plain", listener=loaded[1])
    assert loaded[0] == [("target", "target"), ("source", "source")]
    assert digest(tmp_path / "packed")["model.safetensors"] == digest(tmp_path / "plain")["model.safetensors"]
    kept = {
        name: sorted(path.name for path in (tmp_path / name / "tmerge/cache").glob("*-weights.safetensors"))
        for name in ("packed", "plain")
    }
    assert kept == {"packed": ["source-base-weights.safetensors", KEPT][-1 - len(bases) :], "plain": []}
    names = load_file(tmp_path / "packed/tmerge/cache" / KEPT)
    assert {tensor.dtype for tensor in names.values()} == {torch.bfloat16}
    # What is not fused is not kept.
    assert ("model.embed_tokens.weight" in names) == bool(bases) and not any("gate" in name for name in names)
    if sections:
        loaded[0].clear()
        again = recipe(models, **sections, plan=str(tmp_path / "plain"))
        merge(again, tmp_path / "again", listener=loaded[1])
        assert loaded[0] == [("target", "target"), ("source", "source")]


@pytest.mark.slow
def test_a_resumed_run_reads_what_was_kept_or_makes_it_again(models, tmp_path, loaded):
    asked = recipe(models, ".gguf")
    advance(asked, tmp_path / "there", until="source")
    shutil.copytree(tmp_path / "there", tmp_path / "gone")
    (tmp_path / "gone/tmerge/cache" / KEPT).unlink()
    for name, times in (("there", 0), ("gone", 1)):
        loaded[0].clear()
        merge(asked, tmp_path / name, listener=loaded[1])
        assert [reference for reference, _ in loaded[0]].count("source.gguf") == times, name
        assert (tmp_path / name / "tmerge/cache" / KEPT).is_file()
    assert digest(tmp_path / "there") == digest(tmp_path / "gone")


def test_what_is_read_of_a_source_at_once_does_not_grow_with_its_layers(tmp_path, monkeypatch, quick_collection):
    plain, most = MappedWeights.__getitem__, {}
    for layers in (2, 8):
        save_pico("llama", tmp_path / f"target-{layers}", layers=layers)
        save_pico("llama", tmp_path / f"source-{layers}", layers=layers, seed=1, hidden_size=48)
        seen: list[weakref.ref[torch.Tensor]] = []
        most[layers] = 0

        def counted(self, name, seen=seen, layers=layers):
            tensor = plain(self, name)
            gc.collect()
            seen.append(weakref.ref(tensor))
            most[layers] = max(most[layers], sum(item() is not None for item in seen))
            return tensor

        with monkeypatch.context() as patched:
            patched.setattr(MappedWeights, "__getitem__", counted)
            pair = {name: str(tmp_path / f"{name}-{layers}") for name in ("target", "source")}
            # One thread, so one layer at a time.
            advance(recipe_for(tmp_path, **pair), tmp_path / f"fused-{layers}", until="fuse")
        assert len(seen) >= 4 * layers
    assert most[2] == most[8] <= 2


def test_of_the_embeddings_that_are_matched_by_the_common_tokens_alone_are_read(models, tmp_path, monkeypatch):
    whole, rows = [], []
    get, get_rows = MappedWeights.__getitem__, MappedWeights.rows
    monkeypatch.setattr(MappedWeights, "__getitem__", lambda self, name: whole.append(name) or get(self, name))
    monkeypatch.setattr(
        MappedWeights, "rows", lambda self, name, index: rows.append(name) or get_rows(self, name, index)
    )
    shared = recipe(models, **SHARED)
    assert shared.matches_by_weights
    advance(shared, tmp_path / "fused", until="target")
    # In a process that has read nothing yet, both models' weights come out of their files.
    advance(shared, tmp_path / "fused", until="transport")
    name = "model.embed_tokens.weight"
    assert rows.count(name) == 2 and name not in whole and whole
