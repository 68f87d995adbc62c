"""Loading from folders: formats, numbers, identity, and what is refused."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.pico import pico_model, pico_tokenizer, save_pico
from tmerge.errors import (
    CheckpointError,
    DeviceError,
    ModelNotFoundError,
    NotEnoughMemoryError,
    TokenizerError,
    UnsupportedModelError,
)
from tmerge.models import (
    ModelReference,
    load_model,
    load_tokenizer,
    meta_model,
    model_commit,
    pick_device,
    pick_dtype,
    read_facts,
)
from tmerge.models import device as device_module


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """A plain checkpoint that no test changes."""
    return save_pico("llama-tied", tmp_path_factory.mktemp("models") / "pico", bos=True, chat=True)


@pytest.fixture
def folder(stored, tmp_path):
    """A copy to spoil."""
    return shutil.copytree(stored, tmp_path / "pico")


def _edit(path, **changes):
    config = json.loads(path.read_text())
    config |= changes
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))


@pytest.mark.parametrize("family", ["llama", "llama-tied", "gpt2", "gemma3", "phi3", "mixtral"])
def test_the_model_is_the_one_that_was_saved(tmp_path, family):
    folder = save_pico(family, tmp_path, seed=7)
    loaded = load_model(str(folder), device="cpu")
    expected = pico_model(family, seed=7).state_dict()
    found = loaded.model.state_dict()
    assert found.keys() == expected.keys()
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    assert (loaded.dtype, loaded.device, loaded.model.training) == (torch.float32, torch.device("cpu"), False)
    assert not any(parameter.requires_grad for parameter in loaded.model.parameters())
    assert loaded.base is loaded.model.base_model and loaded.base is not loaded.model
    assert loaded.model.config._name_or_path == folder.name


@pytest.mark.parametrize("saved", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("asked", ["auto", "float32", "bfloat16", torch.float16])
def test_dtype_as_asked_or_as_stored(tmp_path, saved, asked):
    folder = save_pico("llama", tmp_path, dtype=saved)
    wanted = saved if asked == "auto" else pick_dtype(asked, saved)
    loaded = load_model(str(folder), dtype=asked, device="cpu")
    assert loaded.dtype == wanted
    assert {parameter.dtype for parameter in loaded.model.parameters()} == {wanted}
    assert read_facts(str(folder)).dtype == saved


def test_dtype_that_no_config_tells_is_read_from_the_weights(tmp_path):
    folder = save_pico("llama", tmp_path, dtype=torch.bfloat16)
    _edit(folder / "config.json", dtype=None, torch_dtype=None)
    assert load_model(str(folder), device="cpu").dtype == torch.bfloat16


def test_shards_load_as_one(tmp_path):
    folder = save_pico("llama", tmp_path, seed=3, max_shard_size="60KB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    torch.testing.assert_close(
        load_model(str(folder), device="cpu").model.state_dict(),
        pico_model("llama", seed=3).state_dict(),
        rtol=0,
        atol=0,
    )


@pytest.mark.parametrize("bos", [True, False])
@pytest.mark.parametrize("pad", [True, False])
def test_tokenizers_with_and_without_pad_and_bos(tmp_path, bos, pad):
    folder = save_pico("llama", tmp_path, bos=bos, pad=pad)
    loaded = load_model(str(folder), device="cpu")
    ids = loaded.tokenizer("hello")["input_ids"]
    assert (ids[0] == 0) == bos
    assert loaded.tokenizer.pad_token == ("<pad>" if pad else None)
    assert loaded.pad_id == (2 if pad else 1)
    assert load_tokenizer(str(folder))("hello")["input_ids"] == ids


def test_the_commit_is_of_the_contents(stored, folder):
    commit = model_commit(str(stored))
    assert commit.startswith("sha256:") and len(commit) == 71
    assert load_model(str(folder), device="cpu").commit == commit
    # Neither the card, a run's own folder nor the files' times are part of it...
    (folder / "README.md").write_text("# Card")
    (folder / "tmerge").mkdir()
    (folder / "tmerge" / "report.json").write_text("{}")
    (folder / "model.safetensors").touch()
    assert model_commit(str(folder)) == commit
    # ...and a changed weight, setting or token is.
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        before = (folder / name).read_bytes()
        # The last byte of the weights is part of a value, of the others the space after the end.
        (folder / name).write_bytes(before[:-1] + bytes([before[-1] ^ 1]) if name[0] == "m" else before + b" ")
        assert model_commit(str(folder)) != commit, name
        (folder / name).write_bytes(before)
    assert model_commit(str(folder)) == commit


@pytest.mark.parametrize(
    ("card", "licence"),
    [
        ("---\nlicense: apache-2.0\n---\n", "apache-2.0"),
        ("---\nlicense: other\nlicense_name: gemma\n---\n", "gemma"),
        ("# No front matter", None),
        ("---\nlicense: [unclosed\n---\n", None),
        (None, None),
    ],
)
def test_the_licence_is_the_cards(folder, card, licence):
    if card is not None:
        (folder / "README.md").write_text(card)
    assert load_model(str(folder), device="cpu").licence == licence
    assert read_facts(str(folder)).licence == licence


def test_facts_are_those_of_the_loaded_model(stored):
    facts, model = read_facts(str(stored)), load_model(str(stored), device="cpu").model
    assert facts.parameters == sum(parameter.numel() for parameter in model.parameters())
    assert facts.weight_bytes == (stored / "model.safetensors").stat().st_size
    assert (facts.layers, facts.hidden_size, facts.model_type) == (2, 64, "llama")
    assert facts.commit is None and not facts.gated and not facts.private
    shapes = {name: tensor.shape for name, tensor in meta_model(facts.config).state_dict().items()}
    assert shapes == {name: tensor.shape for name, tensor in model.state_dict().items()}


def _truncated(folder):
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[:-10])


def _headerless(folder):
    (folder / "model.safetensors").write_bytes(b"\x10\x00\x00\x00\x00\x00\x00\x00nonsense")


def _empty(folder):
    (folder / "model.safetensors").write_bytes(b"")


def _pointer(folder):
    (folder / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")


def _pickled(folder):
    (folder / "model.safetensors").unlink()
    # Would create a file if anything ever unpickled it.
    (folder / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'touch pickle-was-run'\ntR.")


def _gguf_only(folder):
    (folder / "model.safetensors").rename(folder / "pico.gguf")


def _no_weights(folder):
    (folder / "model.safetensors").unlink()


def _lacks_a_shard(folder):
    save_pico("llama", folder, max_shard_size="60KB")
    (folder / "model.safetensors").unlink(missing_ok=True)
    sorted(folder.glob("model-0*.safetensors"))[1].unlink()


def _bad_index(folder):
    (folder / "model.safetensors").rename(folder / "x.safetensors")
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../../x.safetensors"}}')


def _lacks_a_tensor(folder):
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def _other_shapes(folder):
    _edit(folder / "config.json", intermediate_size=128)


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (_truncated, ["model.safetensors", "truncated"]),
        (_headerless, ["model.safetensors", "truncated or no safetensors file"]),
        (_empty, ["model.safetensors", "0 bytes"]),
        (_pointer, ["git lfs pull"]),
        (_pickled, ["pytorch_model.bin", "convert it to safetensors"]),
        (_gguf_only, ["pico.gguf"]),
        (_no_weights, ["no model.safetensors"]),
        (_lacks_a_shard, ["lacks 1 of", "model-00002-of"]),
        (_bad_index, ["not an index of shards"]),
        (_lacks_a_tensor, ["model.layers.1.mlp.up_proj.weight", "not a whole causal LM"]),
        (_other_shapes, ["other shapes than its config.json says"]),
    ],
)
def test_spoiled_weights_are_named_before_they_are_used(folder, spoil, words, monkeypatch):
    monkeypatch.chdir(folder)
    spoil(folder)
    with pytest.raises(CheckpointError) as caught:
        load_model(str(folder), device="cpu")
    assert "\n" not in str(caught.value)
    for word in words:
        assert word in str(caught.value)
    assert not (folder / "pickle-was-run").exists()


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"model_type": "bert-next"}, UnsupportedModelError, "unknown to transformers"),
        ({"model_type": "t5"}, UnsupportedModelError, "not a causal language model"),
        ({"model_type": None}, UnsupportedModelError, "no model_type"),
        ({"num_attention_heads": "four"}, UnsupportedModelError, "cannot use its config.json"),
        ({"quantization_config": {"quant_method": "gptq"}}, UnsupportedModelError, r"quantised \(gptq\)"),
        (
            {"model_type": "own", "auto_map": {"AutoConfig": "m.C", "AutoModelForCausalLM": "m.M"}},
            UnsupportedModelError,
            r"trust_remote_code: \[",
        ),
    ],
)
def test_models_that_cannot_be_taken(folder, changes, error, words):
    _edit(folder / "config.json", **changes)
    for read in (load_model, read_facts):
        with pytest.raises(error, match=words) as caught:
            read(str(folder))
        assert "\n" not in str(caught.value)


def test_a_missing_or_damaged_config(folder):
    (folder / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match="not a JSON object"):
        load_model(str(folder))
    (folder / "config.json").unlink()
    with pytest.raises(CheckpointError, match="config.json' is missing"):
        load_model(str(folder))


def test_no_tokenizer_is_an_error_and_not_an_empty_one(folder):
    """transformers itself answers with a tokenizer that turns every text into nothing."""
    (folder / "tokenizer.json").unlink()
    with pytest.raises(TokenizerError, match="no tokenizer files"):
        load_model(str(folder), device="cpu")


def test_a_damaged_tokenizer(folder):
    (folder / "tokenizer.json").write_text('{"version": "1.0"}')
    with pytest.raises(TokenizerError, match="cannot be read") as caught:
        load_tokenizer(str(folder))
    assert "\n" not in str(caught.value)


def test_a_tokenizer_of_another_model(tmp_path):
    folder = save_pico("llama", tmp_path, vocab_size=300)
    with pytest.raises(TokenizerError, match="ids up to 383, its embedding 300 rows"):
        load_model(str(folder), device="cpu")


def test_added_tokens_beyond_the_embedding_are_let_pass(tmp_path):
    """As in Gemma 3's text models, whose image token has no row."""
    folder = save_pico("llama", tmp_path)
    tokenizer = pico_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    tokenizer.save_pretrained(folder)
    assert len(load_model(str(folder), device="cpu").tokenizer) == 385


@pytest.mark.parametrize("name", ["tpu", "cuda:99", "nonsense", "mps:7:1"])
def test_devices_that_are_not_here(name):
    with pytest.raises(DeviceError, match=name.partition(":")[0]):
        pick_device(name)


def test_a_dtype_that_is_none(stored):
    with pytest.raises(DeviceError, match="int4"):
        load_model(str(stored), dtype="int4")


def test_a_model_that_does_not_fit_is_refused_before_it_is_read(stored, monkeypatch):
    monkeypatch.setattr(device_module, "available_memory", lambda device: 1000)
    with pytest.raises(NotEnoughMemoryError, match="1 kB are free"):
        load_model(str(stored), device="cpu")


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
    ],
)
def test_running_out_of_memory_while_reading(stored, monkeypatch, error):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr("tmerge.models.loading.AutoModelForCausalLM.from_pretrained", fail)
    with pytest.raises(NotEnoughMemoryError, match="does not fit in memory on cpu"):
        load_model(str(stored), device="cpu")


def test_a_fault_that_is_not_the_users_keeps_its_class(stored, monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("a bug")

    monkeypatch.setattr("tmerge.models.loading.AutoModelForCausalLM.from_pretrained", fail)
    with pytest.raises(RuntimeError, match="a bug"):
        load_model(str(stored), device="cpu")


def test_a_folder_that_went_away(stored, tmp_path):
    reference = ModelReference.parse(str(stored))
    assert load_model(reference, device="cpu").reference is reference
    with pytest.raises(ModelNotFoundError):
        load_model(str(tmp_path / "gone"))


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({"adapter_model.safetensors": "", "config.json": '{"model_type": "llama"}'}, "is an adapter, not a model"),
        (
            {"adapter_config.json": "{}", "config.json": '{"model_type": "llama"}'},
            r"an adapter \(adapter_config.json\) beside a model \(config.json\), and which of the two is meant",
        ),
    ],
)
def test_an_adapter_in_a_folder_is_told_from_a_model(tmp_path, files, words):
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    with pytest.raises(CheckpointError, match=words) as caught:
        read_facts(str(tmp_path))
    assert "merge_and_unload" in str(caught.value) and "\n" not in str(caught.value)
