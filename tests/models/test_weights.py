"""Weights read from a model's files are those of the loaded model, bit for bit; and what cannot be read so is not."""

from __future__ import annotations

import gc
import json
import weakref

import gguf
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import conversion_mapping

from tests.models.pico_gguf import save_pico_gguf
from tests.pico import PICO_FAMILIES, PICO_RARE, save_pico
from tests.pico_adapter import save_adapter
from tmerge.errors import CheckpointError
from tmerge.models import PROJECTIONS, Model
from tmerge.models.weights import MappedWeights, read_weights_file, write_weights


def same(read, loaded):
    """Whether every view of one architecture has the other's bits, and how many there are."""
    assert len(read.views) == len(loaded.views)
    count = 0
    for ours, theirs in zip(read.views, loaded.views, strict=True):
        assert list(ours) == list(theirs)
        for name, view in ours.items():
            for got, wanted in ((view.weight(), theirs[name].weight()), (view.bias(), theirs[name].bias())):
                assert (got is None) == (wanted is None)
                if got is not None:
                    # The loaded one may be widened, which changes no value.
                    assert torch.equal(got.float(), wanted.float()), str(view)
                    count += 1
    return count


def read(model):
    """A model's projections, read from its files."""
    return model.layout.reading(model.weights)


@pytest.mark.parametrize("family", [*PICO_FAMILIES, *PICO_RARE])
def test_every_view_of_every_family_is_that_of_the_loaded_model(family, tmp_path):
    save_pico(family, tmp_path / "pico", layers=2)
    model = Model(str(tmp_path / "pico"), device="cpu")
    names = model.layout.parameters(PROJECTIONS, stream=True)
    assert set(names) <= model.weights.keys()
    assert not model.is_loaded
    assert same(read(model), model.views) == len(
        [name for layer in model.views.views for view in layer.values() for name in view.parameters]
    )
    assert read(model).embedding_scale == model.views.embedding_scale
    assert read(model).attention == model.views.attention


@pytest.mark.parametrize("dtype", ["auto", "float32", "bfloat16", "float16"])
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shards", ["5GB", "40KB"])
def test_values_are_rounded_as_loading_rounds_them(dtype, stored, shards, tmp_path):
    save_pico("phi3", tmp_path / "pico", dtype=stored, max_shard_size=shards)
    assert (tmp_path / "pico/model.safetensors.index.json").is_file() == (shards == "40KB")
    model = Model(str(tmp_path / "pico"), dtype=dtype, device="cpu")
    assert same(read(model), model.views)
    kinds = {view.weight().dtype for layer in read(model).views for view in layer.values()}
    assert kinds == {model.load().dtype}


def test_a_tied_embedding_and_a_checkpoint_of_the_base_model_are_found(tmp_path):
    save_pico("gpt2", tmp_path / "gpt2")
    tensors = {
        name.removeprefix("transformer."): value
        for name, value in load_file(tmp_path / "gpt2/model.safetensors").items()
    }
    assert "h.0.attn.c_attn.weight" in tensors
    save_file(tensors, tmp_path / "gpt2/model.safetensors", {"format": "pt"})
    model = Model(str(tmp_path / "gpt2"), device="cpu")
    assert set(model.layout.parameters(PROJECTIONS, stream=True)) <= model.weights.keys()
    assert same(read(model), model.views)


def test_what_is_not_stored_as_the_model_has_it_is_not_offered(tmp_path, monkeypatch):
    save_pico("mixtral", tmp_path / "pico")
    weights = Model(str(tmp_path / "pico"), device="cpu").weights
    # The experts are stored one by one, and stacked when they are loaded.
    assert "model.layers.0.self_attn.q_proj.weight" in weights
    assert not any("experts" in name for name in weights)
    save_pico("gpt_oss", tmp_path / "oss", dtype=torch.bfloat16)
    model = Model(str(tmp_path / "oss"), dtype="float16", device="cpu")
    # transformers holds this family's norms in float32 whatever is asked for.
    assert "model.layers.0.self_attn.q_proj.weight" in model.weights and "model.norm.weight" not in model.weights
    # A release of transformers that cannot be asked.
    monkeypatch.delattr(conversion_mapping, "get_model_conversion_mapping")
    assert not Model(str(tmp_path / "pico"), device="cpu").weights


@pytest.mark.parametrize("kind", [gguf.GGMLQuantizationType.Q8_0, gguf.GGMLQuantizationType.F32])
@pytest.mark.parametrize("dtype", ["auto", "float16"])
def test_a_gguf_file_is_written_once_and_read_like_any_other(kind, dtype, tmp_path):
    path = save_pico_gguf(tmp_path / "pico.gguf", kind=kind)
    model = Model(str(path), dtype=dtype, device="cpu")
    assert not model.weights
    names = model.layout.parameters(PROJECTIONS, stream=True)
    write_weights(model.load(), names, tmp_path / "weights.safetensors", "key")
    assert [file.name for file in sorted(tmp_path.iterdir())] == ["pico.gguf", "weights.safetensors"]
    assert read_weights_file(tmp_path / "weights.safetensors", "another") is None
    assert read_weights_file(tmp_path / "none.safetensors", "key") is None
    weights = read_weights_file(tmp_path / "weights.safetensors", "key")
    assert set(weights) == set(names)
    assert same(model.layout.reading(weights), model.views)
    # In the two bytes that it will be saved in, though it was widened to be computed with.
    expected = torch.bfloat16 if dtype == "auto" else torch.float16
    assert {weights[name].dtype for name in weights} == {expected} == {model.load().dtype}
    # Any reader of safetensors takes it.
    with safe_open(tmp_path / "weights.safetensors", "pt") as file:
        assert set(file.keys()) == set(names)


def test_a_value_that_the_stored_dtype_cannot_hold_is_written_as_it_is(tmp_path):
    save_pico("llama", tmp_path / "pico", dtype=torch.bfloat16)
    model = Model(str(tmp_path / "pico"), device="cpu")
    loaded, name = model.load(), "model.norm.weight"
    loaded.model.float().get_parameter(name).add_(1e-4)
    write_weights(loaded, [name, "model.layers.0.mlp.up_proj.weight"], tmp_path / "w.safetensors", "key")
    weights = read_weights_file(tmp_path / "w.safetensors", "key")
    assert torch.equal(weights[name], loaded.model.get_parameter(name)) and weights[name].dtype == torch.float32
    assert weights["model.layers.0.mlp.up_proj.weight"].dtype == torch.bfloat16


@pytest.mark.parametrize("family", ["llama", "gpt2", "phi3", "gpt_neox", "falcon"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_some_rows_are_those_of_the_whole(family, dtype, tmp_path):
    save_pico(family, tmp_path / "pico", layers=1)
    model = Model(str(tmp_path / "pico"), device="cpu", dtype=dtype)
    for of in (read(model), model.views):
        for layer in of.views:
            for view in layer.values():
                rows = torch.randperm(view.out_features)[:5]
                assert torch.equal(view.weight_rows(rows), view.weight()[rows]), str(view)


def test_of_rows_no_others_are_converted_or_judged(tmp_path, monkeypatch):
    save_pico("llama", tmp_path / "pico", layers=1)
    path, name = tmp_path / "pico/model.safetensors", "model.embed_tokens.weight"
    tensors = load_file(path)
    tensors[name][7] = torch.nan
    save_file(tensors, path, {"format": "pt"})
    model = Model(str(tmp_path / "pico"), device="cpu", dtype="bfloat16")
    weights, converted, to = model.weights, [], torch.Tensor.to

    def counted(tensor, *words, **named):
        converted.append(tensor.numel())
        return to(tensor, *words, **named)

    monkeypatch.setattr(torch.Tensor, "to", counted)
    rows = weights.rows(name, torch.tensor([9, 2, 9]))
    assert max(converted) == rows.numel() == 3 * tensors[name].shape[1]
    assert torch.equal(rows, to(tensors[name], torch.bfloat16)[[9, 2, 9]])
    for asked in (lambda: weights.rows(name, torch.tensor([7])), lambda: weights[name]):
        with pytest.raises(CheckpointError, match="not finite"):
            asked()


def test_rows_of_what_an_adapter_changes_are_joined(tmp_path):
    save_pico("llama", tmp_path / "base", layers=1)
    save_adapter(tmp_path / "base", tmp_path / "lora", target_modules=["q_proj", "embed_tokens"])
    weights = Model(str(tmp_path / "base"), device="cpu", adapter=str(tmp_path / "lora")).weights
    plain, index = Model(str(tmp_path / "base"), device="cpu").weights, torch.tensor([3, 1])
    changed = 0
    for name in ("model.embed_tokens.weight", "model.layers.0.self_attn.k_proj.weight"):
        assert torch.equal(weights.rows(name, index), weights[name][index])
        changed += not torch.equal(weights.rows(name, index), plain.rows(name, index))
    assert changed == 1


def test_a_tensor_is_gone_when_it_is_let_go(tmp_path, quick_collection):
    save_pico("llama", tmp_path / "pico", layers=4)
    architecture = read(Model(str(tmp_path / "pico"), device="cpu"))
    seen = []
    for view in architecture.projections():
        seen.append(weakref.ref(view.weight()))
        gc.collect()
        assert not any(tensor() is not None for tensor in seen)
    assert len(seen) == 28


def test_what_is_read_from_a_file_cannot_be_written_to(tmp_path):
    save_pico("llama", tmp_path / "pico")
    view = read(Model(str(tmp_path / "pico"), device="cpu")).layers[0]["q"]
    with pytest.raises(ValueError, match="load the model to write"):
        view.write(view.weight())


def test_files_that_change_meanwhile_are_refused(tmp_path):
    save_pico("llama", tmp_path / "pico")
    model = Model(str(tmp_path / "pico"), device="cpu")
    weights, name = model.weights, "model.norm.weight"
    assert isinstance(weights, MappedWeights) and len(weights[name]) == 64
    late = Model(str(tmp_path / "pico"), device="cpu")
    assert late.commit == model.commit
    save_pico("llama", tmp_path / "pico", seed=1)
    with pytest.raises(CheckpointError, match="changed while it was read"):
        weights[name]
    with pytest.raises(CheckpointError, match="changed while it was being used"):
        late.weights  # noqa: B018 - it is read when asked for
    assert json.loads((tmp_path / "pico/config.json").read_text())["model_type"] == "llama"
