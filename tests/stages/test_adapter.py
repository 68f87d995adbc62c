"""A task vector that is an adapter's: what PEFT's merged checkpoint has over its base, without such a checkpoint."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
import yaml

from tests.models.pico_gguf import save_pico_gguf
from tests.models.test_adapter import KINDS, made
from tests.pico import pico_model, pico_tokenizer, save_pico
from tests.pico_adapter import merged_by_peft, save_adapter
from tests.stages.test_task_vector import _deeper, _shaken, recipe_for, save_all, weights
from tmerge.errors import TmergeError, UnsupportedModelError
from tmerge.fusion import StoredNeurons
from tmerge.models import EMBEDDING, PROJECTIONS, Model, describe, load_model, save_checkpoint
from tmerge.models import model as handles
from tmerge.models.checkpoint import file_digest
from tmerge.preflight.check import check
from tmerge.preflight.learned import stream_names
from tmerge.recipe import Recipe
from tmerge.stages.learned_weights import LearnedWeights
from tmerge.stages.merge import advance, merge
from tmerge.stages.source_weights import SourceWeights
from tmerge.stages.step import Progress

SAID = Progress("fuse", lambda step: None)


@pytest.mark.parametrize("kind", sorted(KINDS.keys() - {"bias of B"}))
def test_what_is_carried_is_what_merging_adds_to_each_view(kind, tmp_path):
    base, adapter = made(kind, tmp_path)
    model = Model(str(base), device="cpu")
    plain = SourceWeights(model, list(PROJECTIONS), True, tmp_path / "kept.safetensors")
    learned = LearnedWeights(plain, Model(str(base), adapter=str(adapter), device="cpu"))
    found, nothing = learned.read(SAID), learned.nothing()
    merged, before = describe(merged_by_peft(base, adapter)), plain.read(SAID)
    views = 0
    for layer, own in enumerate(found.views):
        for name, view in own.items():
            expected = merged.views[layer][name].weight() - before.views[layer][name].weight()
            torch.testing.assert_close(view.weight(), expected, rtol=1e-4, atol=1e-5)
            assert not nothing.views[layer][name].weight().any()
            views += bool(expected.any())
    assert views


@pytest.mark.parametrize("dora", [False, True])
def test_of_a_packed_base_what_a_change_is_told_by_is_unpacked_once(dora, tmp_path):
    packed = save_pico_gguf(tmp_path / "base.gguf", seed=1)
    (tmp_path / "base").mkdir()
    save_checkpoint(load_model(str(packed), device="cpu", dtype="float32"), tmp_path / "base")
    adapter = save_adapter(tmp_path / "base", tmp_path / "lora", target_modules=["q_proj"], use_dora=dora)
    named = {"device": "cpu", "dtype": "float32"}
    plain = SourceWeights(Model(str(packed), **named), ["q"], False, tmp_path / "kept.safetensors")
    found = LearnedWeights(plain, Model(str(packed), adapter=str(adapter), **named)).read(SAID)
    assert (tmp_path / "kept.safetensors").exists() == dora
    merged = describe(merged_by_peft(tmp_path / "base", adapter))
    before = describe(load_model(str(tmp_path / "base"), device="cpu").model)
    for layer, own in enumerate(found.layers):
        expected = merged.layers[layer]["q"].weight() - before.layers[layer]["q"].weight()
        torch.testing.assert_close(own["q"].weight(), expected, rtol=1e-4, atol=1e-5)
        assert expected.any()


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A target; a deeper relative of one vocabulary; adapters of that one, the first of them merged by PEFT too."""
    folder = tmp_path_factory.mktemp("models")
    target = pico_model("llama")
    save_all(folder, target=target, base=_shaken(_deeper(target), 0.02, 1))
    whole = ["embed_tokens", "lm_head", "input_layernorm"]
    options = {"target_modules": ["q_proj", "v_proj", "down_proj"], "size": 0.05}
    # So little that the base's features match as those of base and adapter do.
    little = {**options, "size": 0.002, "use_dora": True, "modules_to_save": whole}
    save_adapter(folder / "base", folder / "lora", **options)
    save_adapter(folder / "base", folder / "whole", **little)
    for name in ("lora", "whole"):
        merged_by_peft(folder / "base", folder / name).save_pretrained(folder / f"{name}-merged")
        pico_tokenizer(folder / f"{name}-merged")
    return folder


def adapted(models, name="lora", **sections):
    data = recipe_for(models, **sections).model_dump(mode="json")
    return Recipe.from_mapping(data | {"source": str(models / "base"), "adapter": str(models / name)})


def transported(folder):
    return {(item.layer, item.projection): item for item in StoredNeurons(folder / "tmerge/cache/transported")}


@pytest.mark.parametrize("name", ["lora", "whole"])
def test_the_same_neurons_as_of_the_merged_checkpoint(models, name, tmp_path, monkeypatch):
    loaded = []
    load = handles.load_model
    monkeypatch.setattr(handles, "load_model", lambda ref, **more: loaded.append(more["place"]) or load(ref, **more))
    fusion = {"projections": ["q", "v", "down"]}
    advance(adapted(models, name, fusion=fusion), tmp_path / "adapter", until="fuse")
    # The base is read for the features; with the adapter joined it is scored, and nothing else.
    folders = [(place.folder.name, place.adapter is not None) for place in loaded]
    assert folders == [("target", False), ("base", False), ("base", True)]
    assert not list((tmp_path / "adapter/tmerge/cache").glob("*-weights.safetensors"))
    merged = recipe_for(models, fusion=fusion, source=str(models / f"{name}-merged"))
    advance(merged, tmp_path / "merged", until="fuse")
    found, expected = transported(tmp_path / "adapter"), transported(tmp_path / "merged")
    # What the adapter leaves as it is beside the projections is not carried at all.
    assert not any(expected[place].weight.any() for place in expected.keys() - found.keys())
    assert found.keys() <= expected.keys()
    for place, item in found.items():
        torch.testing.assert_close(item.weight, expected[place].weight, rtol=1e-4, atol=1e-5)
        assert item.is_difference
    noted = json.loads((tmp_path / "adapter/tmerge/cache/fuse.json").read_text())["facts"]["stream"]
    assert set(noted) == {name for _, name in found} - set(PROJECTIONS)
    assert (EMBEDDING in noted) == (name == "whole")
    changed = {projection for (_, projection), item in found.items() if item.weight.any()}
    assert {"q", "v", "down"} <= changed and (EMBEDDING in changed) == (name == "whole")
    # A source's score is that of base and adapter together, however it came to be.
    scores = [
        json.loads((tmp_path / run / "tmerge/cache/source.json").read_text())["facts"]["scores"]["bits"]
        for run in ("adapter", "merged")
    ]
    assert scores[0] == pytest.approx(scores[1], rel=1e-4)


def test_by_blocks_it_is_the_same_to_the_bit(models, tmp_path):
    found = {}
    for memory in ("resident", "blocks"):
        advance(adapted(models, memory=memory), tmp_path / memory, until="fuse")
        facts = json.loads((tmp_path / memory / "tmerge/cache/source.json").read_text())["facts"]
        found[memory] = transported(tmp_path / memory), facts["scores"]
    assert found["resident"][1] == found["blocks"][1]
    for item, values in found["resident"][0].items():
        assert torch.equal(found["blocks"][0][item].weight, values.weight), item


def test_its_rank_stays(models, tmp_path):
    advance(adapted(models, fusion={"projections": ["q", "down"]}), tmp_path / "run", until="fuse")
    for (_, projection), item in transported(tmp_path / "run").items():
        if projection in PROJECTIONS:
            assert torch.linalg.matrix_rank(item.weight.double(), rtol=1e-5) == 4


@pytest.mark.slow
def test_the_whole_road_and_what_is_recorded(models, tmp_path):
    shutil.copytree(models / "lora", tmp_path / "lora")
    (tmp_path / "lora/README.md").write_text("---\nlicense: cc-by-nc-4.0\n---\n")
    data = adapted(models).model_dump(mode="json") | {"adapter": str(tmp_path / "lora")}
    recipe, out = Recipe.from_mapping(data), tmp_path / "fused"
    report = merge(recipe, out)
    assert report.adapter == str(tmp_path / "lora") and report.source.adapter.commit.startswith("sha256:")
    assert report.source.adapter.base_commit == report.source_base_model.commit == Model(str(models / "base")).commit
    assert report.source.commit == Model(str(models / "base"), adapter=str(tmp_path / "lora")).commit
    assert (report.source.adapter.rank, report.source.adapter.licence) == (4, "cc-by-nc-4.0")
    assert set(report.projections.fused) == {"q", "v", "down"}
    assert report.projections.skipped["k"] == f"the adapter {tmp_path / 'lora'} leaves it as it is"
    assert yaml.safe_load((out / "tmerge/recipe.yaml").read_text())["adapter"] == str(tmp_path / "lora")
    card = (out / "README.md").read_text()
    for words in ("the source's adapter | `lora`", "the source's adapter: `lora`, cc-by-nc-4.0", "adapter lora"):
        assert words in card, words
    # Another adapter of that base goes through the same transport.
    again = Recipe.from_mapping(
        adapted(models, "whole", fusion={"projections": ["q", "v", "down"]}).model_dump() | {"plan": str(out)}
    )
    other = merge(again, tmp_path / "other")
    assert other.plan == str(out) and weights(tmp_path / "other") != weights(out)
    # The same command with another adapter in the folder is not the finished run.
    shutil.copy(models / "whole/adapter_config.json", tmp_path / "lora/adapter_config.json")
    shutil.copy(models / "whole/adapter_model.safetensors", tmp_path / "lora/adapter_model.safetensors")
    before = file_digest(out / "model.safetensors")
    changed = merge(recipe, out)
    assert changed.source.adapter.commit != report.source.adapter.commit
    assert file_digest(out / "model.safetensors") != before


@pytest.mark.slow
def test_adapters_as_target_and_source_and_by_blocks(models, tmp_path):
    save_adapter(models / "target", tmp_path / "of the target", seed=3, target_modules=["q_proj"])
    merged = merged_by_peft(models / "target", tmp_path / "of the target")
    save_all(tmp_path, plain=merged)
    found = {}
    for name, target, source, memory in (
        ("joined", tmp_path / "of the target", models / "lora", "resident"),
        ("blocks", tmp_path / "of the target", models / "lora", "blocks"),
        ("merged", tmp_path / "plain", models / "lora-merged", "resident"),
    ):
        recipe = recipe_for(models, target=str(target), source=str(source), memory=memory)
        found[name] = merge(recipe, tmp_path / name)
    assert weights(tmp_path / "joined") == weights(tmp_path / "blocks")
    assert found["joined"].target.adapter is not None and found["joined"].adapter is None
    values = [found[name].evaluation.fused.value for name in ("joined", "merged")]
    assert values[0] == pytest.approx(values[1], rel=1e-3)


def test_what_cannot_travel_is_named(tmp_path):
    base = save_pico("qwen3", tmp_path / "base", layers=3)
    save_pico("llama", tmp_path / "target")
    save_adapter(base, tmp_path / "lora", target_modules=["q_proj", "o_proj"], modules_to_save=["q_norm", "model.norm"])
    recipe = Recipe(target=str(tmp_path / "target"), source=str(base), adapter=str(tmp_path / "lora"))
    found = check(recipe)
    # No weights of a llama's q do what those behind a norm do.
    assert found.projections == ["o"]
    left = [f"model.layers.*.self_attn.{name}.weight (3)" for name in ("q_norm", "q_proj")]
    assert found.left_out == tuple(left)
    assert any(f"leaves behind: {', '.join(left)}" in note for note in found.notes)
    assert found.document().source.adapter.left_out == list(found.left_out)
    with pytest.raises(UnsupportedModelError, match=r"changes none of the projections k, v .*; it changes .*q_norm"):
        check(Recipe.from_mapping(recipe.model_dump() | {"fusion": {"what": "task-vector", "projections": ["k", "v"]}}))


def test_a_norm_goes_with_what_it_norms_and_to_its_namesake(tmp_path):
    base = save_pico("qwen3", tmp_path / "base", layers=3)
    trained = {"modules_to_save": ["q_norm", "k_norm", "input_layernorm", "model.norm", "lm_head"]}
    save_adapter(base, tmp_path / "first", target_modules=["q_proj"], **trained)
    save_adapter(base, tmp_path / "second", target_modules=["k_proj"])
    target = save_pico("qwen3", tmp_path / "target", tie_word_embeddings=True)
    recipe = Recipe.from_mapping(
        {"target": str(target), "source": str(base), "adapter": str(tmp_path / "first"), "fusion": {"stream": True}}
    )
    # There is no head to write to, and no correspondence of k.
    left = ("lm_head.weight", "model.layers.*.self_attn.k_norm.weight (3)")
    found = check(recipe)
    assert found.left_out == left
    # What a run says beside that can only be what is lacking of a vocabulary.
    parameters, layouts = found.source.adapter.parameters, (found.target_layout, found.source_layout)
    going = stream_names(parameters, *layouts, found.projections)
    assert going == ["norm:attention", "norm:last", "norm:q"]
    # Of two that are joined the other one brings k.
    both = [{"adapter": str(tmp_path / name)} for name in ("first", "second")]
    data = {"target": str(target), "source_base": str(base), "sources": both, "fusion": {"stream": True}}
    joined = check(Recipe.from_mapping(data))
    assert [relative.left_out for relative in joined.sources] == [left[:1], ()]


def test_an_adapter_of_another_model(models, tmp_path):
    other = save_pico("llama", tmp_path / "other", layers=5)
    save_adapter(other, tmp_path / "lora", target_modules=["q_proj"])
    recipe = Recipe.from_mapping(adapted(models).model_dump() | {"adapter": str(tmp_path / "lora")})
    with pytest.raises(TmergeError, match="it changes model.layers.3.self_attn.q_proj, which .* has not"):
        merge(recipe, tmp_path / "out")
    assert not (tmp_path / "out").exists()
