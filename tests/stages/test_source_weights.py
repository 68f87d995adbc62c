"""What a source is fused from: its files and never the loaded model, which is let go once it has been read."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from safetensors.torch import load_file

from tests.models.pico_gguf import save_pico_gguf
from tests.pico import save_pico
from tests.test_pipeline import digest, recipe_for
from tmerge.errors import Cancelled
from tmerge.models import Model, load_model, save_checkpoint
from tmerge.models import model as handles
from tmerge.models.weights import MappedWeights
from tmerge.recipe import Recipe
from tmerge.stages.merge import advance, merge

VECTOR = {"what": "task-vector", "alpha": 1.0, "stream": True, "projections": ["q", "v", "o", "up"]}
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
    return Recipe.from_mapping(data | {"evaluation": {"texts": 8, "bootstrap": 100}})


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


def weights(folder):
    return load_file(folder / "model.safetensors")


def equal(one, other):
    return all(tensor.equal(other[name]) for name, tensor in one.items()) and one.keys() == other.keys()


def test_neither_source_nor_base_is_loaded_to_fuse_from_plain_files(models, tmp_path, loaded):
    merge(recipe(models, fusion=VECTOR, **SHARED), tmp_path / "plain", listener=loaded[1])
    assert loaded[0] == [("target", "target"), ("source", "source")]
    assert not list((tmp_path / "plain/tmerge/cache").glob("*-weights.safetensors"))


@pytest.mark.parametrize("sections", [{}, {"fusion": VECTOR, **SHARED}, {"dtype": "float16"}])
def test_what_is_packed_is_written_once_and_gives_the_same_merge(models, tmp_path, loaded, sections):
    merge(recipe(models, ".gguf", **sections), tmp_path / "packed", listener=loaded[1])
    bases = [("base.gguf", "fuse")] if "fusion" in sections else []
    assert loaded[0] == [("target", "target"), ("source.gguf", "source"), *bases]
    merge(recipe(models, **sections), tmp_path / "plain")
    assert equal(weights(tmp_path / "packed"), weights(tmp_path / "plain"))
    kept = sorted(path.name for path in (tmp_path / "packed/tmerge/cache").glob("*-weights.safetensors"))
    assert kept == ["source-base-weights.safetensors", "source-weights.safetensors"][-1 - len(bases) :]
    dtype = torch.float16 if "dtype" in sections else torch.bfloat16
    names = load_file(tmp_path / "packed/tmerge/cache/source-weights.safetensors")
    assert {tensor.dtype for tensor in names.values()} == {dtype}
    # What is not fused is not kept.
    assert ("model.embed_tokens.weight" in names) == bool(bases) and not any("gate" in name for name in names)


def test_a_resumed_run_reads_what_was_kept_or_makes_it_again(models, tmp_path, loaded):
    asked = recipe(models, ".gguf")
    kept = "tmerge/cache/source-weights.safetensors"
    for name in ("there", "gone", "another"):
        advance(asked, tmp_path / name, until="source")
    (tmp_path / "gone" / kept).unlink()
    (tmp_path / "another" / kept).write_bytes(b"of something else")
    for name, times in (("there", 0), ("gone", 1), ("another", 1)):
        loaded[0].clear()
        merge(asked, tmp_path / name, listener=loaded[1])
        assert [reference for reference, _ in loaded[0]].count("source.gguf") == times, name
        assert (tmp_path / name / kept).is_file()
    assert digest(tmp_path / "there") == digest(tmp_path / "gone") == digest(tmp_path / "another")


def test_a_run_that_is_stopped_while_it_fuses_begins_the_layers_anew(models, tmp_path):
    asked, seen = recipe(models), []

    def stop(step):
        if step.stage == "fuse" and step.unit == "layers":
            seen.append(step)
            if len(seen) == 2:
                raise Cancelled("stopped by the test")

    with pytest.raises(Cancelled):
        merge(asked, tmp_path / "stopped", listener=stop)
    folder = tmp_path / "stopped/tmerge/cache/transported"
    assert list(folder.glob("*.safetensors")) and not (folder / "index.json").exists()
    merge(asked, tmp_path / "stopped")
    merge(asked, tmp_path / "straight")
    assert digest(tmp_path / "stopped") == digest(tmp_path / "straight")


def test_another_runs_transport_is_fused_from_without_loading_either(models, tmp_path, loaded):
    merge(recipe(models, fusion=VECTOR, **SHARED), tmp_path / "first")
    loaded[0].clear()
    again = recipe(models, fusion=VECTOR, **SHARED, plan=str(tmp_path / "first"))
    merge(again, tmp_path / "again", listener=loaded[1])
    assert loaded[0] == [("target", "target"), ("source", "source")]


@pytest.mark.parametrize("packed", [False, True])
def test_what_is_read_of_a_source_at_once_does_not_grow_with_its_layers(tmp_path, monkeypatch, packed):
    plain, most = MappedWeights.__getitem__, {}
    for layers in (2, 8):
        save_pico("llama", tmp_path / "target", layers=layers)
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
            if packed:  # as if transformers put everything together while it loads
                patched.setattr(Model, "weights", MappedWeights({}))
            source = str(tmp_path / f"source-{layers}")
            merge(recipe_for(tmp_path, source=source, evaluation={"texts": 8}), tmp_path / f"fused-{layers}")
        assert len(seen) >= 4 * layers
    assert most[2] == most[8] <= 2
