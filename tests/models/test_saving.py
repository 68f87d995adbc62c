"""Saving: a plain checkpoint that is the model in memory, and a check that notices when it is not."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from tests.pico import pico_tokenizer, save_pico
from tmerge.errors import NotEnoughDiskError, NotEnoughMemoryError, SavedModelMismatchError, UnsupportedModelError
from tmerge.models import load_model, save_checkpoint, saving, verify_checkpoint, verifying

TEXTS = ["The cat sat on the mat.", "Saya membaca buku.", "a"]


def _loaded(tmp_path, family="llama", **options):
    return load_model(str(save_pico(family, tmp_path / "in", **options)), device="cpu")


@pytest.fixture
def loaded(tmp_path):
    return _loaded(tmp_path, "llama-tied", chat=True)


@pytest.fixture
def saved(loaded, tmp_path):
    save_checkpoint(loaded, tmp_path / "out")
    return tmp_path / "out"


def _without_room(monkeypatch):
    """No second copy fits; of each comparison, whether the checkpoint was read by blocks."""
    taken, by_blocks = [], verifying._by_blocks

    def opened(*words):
        again = by_blocks(*words)
        taken.append(again is not None and again.block_weights is not None)
        return again

    monkeypatch.setattr(verifying, "_fits_beside", lambda *_: False)
    monkeypatch.setattr(verifying, "_by_blocks", opened)
    return taken


@pytest.mark.parametrize("room", ["room for a second copy", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["llama", "llama-tied", "gpt2", "gemma3", "phi3", "mixtral", "qwen3_moe", "falcon"])
def test_it_comes_back_bit_for_bit(tmp_path, family, dtype, room, monkeypatch):
    by_blocks = _without_room(monkeypatch) if room == "none" else None
    loaded = _loaded(tmp_path, family, dtype=dtype)
    with torch.no_grad():
        # Not what it was loaded as: as after a merge.
        loaded.model.get_input_embeddings().weight[5] += 0.5
    before = {name: tensor.clone() for name, tensor in loaded.model.state_dict().items()}
    written = save_checkpoint(loaded, tmp_path / "out")
    verify_checkpoint(tmp_path / "out", loaded, TEXTS)
    assert by_blocks in (None, [True])
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert again.dtype == dtype
    torch.testing.assert_close(again.state_dict(), before, rtol=0, atol=0)
    torch.testing.assert_close(loaded.model.state_dict(), before, rtol=0, atol=0)
    assert {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    } <= {path.name for path in written}
    assert all(path.is_file() for path in written)


def test_tied_embeddings_are_stored_once_and_stay_tied(saved):
    with safe_open(saved / "model.safetensors", "pt") as file:
        assert "model.embed_tokens.weight" in file.keys() and "lm_head.weight" not in file.keys()
    again = AutoModelForCausalLM.from_pretrained(saved)
    assert again.lm_head.weight.data_ptr() == again.model.embed_tokens.weight.data_ptr()


def test_over_the_limit_it_is_shards_with_an_index(tmp_path):
    loaded = _loaded(tmp_path, "llama")
    written = save_checkpoint(loaded, tmp_path / "out", max_shard_size="60KB")
    shards = [path for path in written if path.suffix == ".safetensors"]
    assert len(shards) > 2
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == {path.name for path in shards}
    # A tensor larger than the limit has a shard to itself; the embedding has 98 KB.
    assert all(path.stat().st_size < 60_000 + 4096 or len(load_file(path)) == 1 for path in shards)
    verify_checkpoint(tmp_path / "out", loaded, TEXTS)


def test_the_same_model_gives_the_same_bytes(loaded, tmp_path):
    for name in ("one", "two"):
        save_checkpoint(loaded, tmp_path / name)
        verify_checkpoint(tmp_path / name, loaded, TEXTS)
        # Used in between, as calibration does.
        loaded.tokenizer(TEXTS, truncation=True, max_length=3, padding=True)
    one, two = ({path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} for name in ("one", "two"))
    assert one == two


def test_what_batching_left_in_the_tokenizer_is_not_saved(loaded, tmp_path):
    """A fast tokenizer keeps the last call's truncation and padding, and would write them into its file."""
    loaded.tokenizer(TEXTS, truncation=True, max_length=3, padding=True)
    save_checkpoint(loaded, tmp_path / "out")
    described = json.loads((tmp_path / "out" / "tokenizer.json").read_text())
    assert described["truncation"] is None and described["padding"] is None
    text = " ".join(TEXTS * 9)
    assert AutoTokenizer.from_pretrained(tmp_path / "out")(text)["input_ids"] == loaded.tokenizer(text)["input_ids"]


@pytest.mark.parametrize("bos", [True, False])
@pytest.mark.parametrize("pad", [True, False])
def test_tokenizers_are_saved_as_they_were(tmp_path, bos, pad):
    loaded = _loaded(tmp_path, bos=bos, pad=pad, chat=True)
    save_checkpoint(loaded, tmp_path / "out")
    verify_checkpoint(tmp_path / "out", loaded, TEXTS)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.pad_token == ("<pad>" if pad else None)
    assert (tokenizer("a")["input_ids"][0] == 0) == bos
    messages = [{"role": "user", "content": "Hi"}]
    assert tokenizer.apply_chat_template(messages, tokenize=False) == "<|user|>\nHi</s>\n"


def test_the_generation_config_is_kept(tmp_path):
    folder = save_pico("llama", tmp_path / "in")
    GenerationConfig(do_sample=True, temperature=0.6, top_k=20, eos_token_id=[1, 2]).save_pretrained(folder)
    save_checkpoint(load_model(str(folder), device="cpu"), tmp_path / "out")
    kept = GenerationConfig.from_pretrained(tmp_path / "out")
    assert (kept.temperature, kept.top_k, kept.eos_token_id, kept.do_sample) == (0.6, 20, [1, 2], True)


def test_a_generation_config_that_transformers_refuses_to_write_is_kept(loaded, tmp_path):
    """Llama 2's repos have a temperature and no sampling; refusing it would lose the whole merge."""
    odd = GenerationConfig()
    odd.temperature, odd.do_sample = 0.6, False
    loaded.model.generation_config = odd
    with pytest.raises(ValueError, match="temperature"):
        loaded.model.save_pretrained(tmp_path / "refused")
    loaded.place = None  # unpacked: there is no file of it to copy
    save_checkpoint(loaded, tmp_path / "out")
    assert json.loads((tmp_path / "out" / "generation_config.json").read_text())["temperature"] == 0.6
    assert loaded.model.generation_config is odd


@pytest.mark.parametrize("family", ["llama", "llama-tied"])
def test_another_dtype_in_the_file(tmp_path, family):
    loaded = _loaded(tmp_path, family)
    save_checkpoint(loaded, tmp_path / "out", dtype=torch.bfloat16)
    verify_checkpoint(tmp_path / "out", loaded, TEXTS)
    assert loaded.model.dtype == loaded.model.config.dtype == torch.float32
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert again.dtype == torch.bfloat16
    expected = {name: tensor.bfloat16() for name, tensor in loaded.model.state_dict().items()}
    torch.testing.assert_close(again.state_dict(), expected, rtol=0, atol=0)
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as file:
        assert ("lm_head.weight" in file.keys()) == (family == "llama")


def test_a_full_disk_is_noticed_before_anything_is_written(loaded, tmp_path, monkeypatch):
    monkeypatch.setattr(saving.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 10**6})())
    with pytest.raises(NotEnoughDiskError, match=r"needs 67\.\d MB in .*out'.*1 MB are free"):
        save_checkpoint(loaded, tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())


def _edit(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def _weight(folder):
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.down_proj.weight"][3, 3] += 0.5
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def _not_a_number(folder):
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.0.mlp.down_proj.weight"][:] = float("nan")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def _lost(folder):
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def _extra(folder):
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.9.extra"] = torch.zeros(2)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def _twice(folder):
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def _untied(folder):
    _twice(folder)
    _edit(folder / "config.json", tie_word_embeddings=False)


def _setting(folder):
    _edit(folder / "config.json", rms_norm_eps=0.1)


def _tokenizer(folder):
    pico_tokenizer(folder, bos=True, chat=True)


def _template(folder):
    (folder / "chat_template.jinja").unlink()


def _more_tokens(folder):
    tokenizer = pico_tokenizer(chat=True)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<new>"]})
    tokenizer.save_pretrained(folder)


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (_weight, "logits differ .* first tensor that differs is model.layers.1.mlp.down_proj.weight"),
        (_not_a_number, "logits differ .* model.layers.0.mlp.down_proj.weight|down_proj.weight are not finite"),
        (_lost, r"1 missing keys in its weights: model.norm.weight|lacks 1 of the weights .*\(model.norm.weight\)"),
        (_extra, r"1 unexpected keys in its weights: model.layers.9.extra|stores 10 layers \(model.layers.9.extra\)"),
        (_twice, "one tied tensor is stored under several names: lm_head.weight, model.embed_tokens.weight"),
        (_untied, "embeddings are tied in memory and not tied in the checkpoint"),
        (_setting, "no tensor differs, so what is lost is a setting"),
        (_tokenizer, "reads text 1 as other tokens"),
        (_template, "chat template"),
        (_more_tokens, "ids beyond the 384 rows"),
    ],
)
@pytest.mark.parametrize("room", ["room for a second copy", "none"])
def test_a_difference_fails_and_is_named(loaded, saved, spoil, words, room, monkeypatch):
    by_blocks = _without_room(monkeypatch) if room == "none" else None
    verify_checkpoint(saved, loaded, TEXTS)
    assert by_blocks in (None, [True])
    spoil(saved)
    with pytest.raises(SavedModelMismatchError, match=words) as caught:
        verify_checkpoint(saved, loaded, TEXTS)
    assert "\n" not in str(caught.value) and caught.value.exit_code == 1


@pytest.mark.parametrize("room", ["room for a second copy", "none"])
def test_one_bit_is_enough(loaded, saved, room, monkeypatch):
    """On the CPU in one dtype nothing is tolerated: here one value's last bit of 24."""
    monkeypatch.setattr(verifying, "_fits_beside", lambda *_: room != "none")
    tensors = load_file(saved / "model.safetensors")
    weight = tensors["model.layers.0.mlp.up_proj.weight"]
    weight.view(torch.int32)[0, 0] ^= 1
    save_file(tensors, saved / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(SavedModelMismatchError, match="model.layers.0.mlp.up_proj.weight"):
        verify_checkpoint(saved, loaded, TEXTS)


def test_a_model_in_memory_that_gives_no_numbers(loaded, tmp_path):
    with torch.no_grad():
        loaded.model.model.norm.weight.fill_(float("nan"))
    save_checkpoint(loaded, tmp_path / "out")
    with pytest.raises(SavedModelMismatchError, match="not finite"):
        verify_checkpoint(tmp_path / "out", loaded, TEXTS)


def test_the_second_copy_does_not_fit(loaded, saved, monkeypatch):
    def fail(*_, **__):
        raise MemoryError

    monkeypatch.setattr("tmerge.models.loading.AutoModelForCausalLM.from_pretrained", fail)
    with pytest.raises(NotEnoughMemoryError, match="reading out again"):
        verify_checkpoint(saved, loaded, TEXTS)


@pytest.mark.parametrize("texts", [[], [""]])
def test_texts_without_a_token_are_made_up_for(loaded, saved, texts):
    verify_checkpoint(saved, loaded, texts)
    _weight(saved)
    with pytest.raises(SavedModelMismatchError, match="logits differ"):
        verify_checkpoint(saved, loaded, texts)


def test_the_models_mode_is_left_as_it_was(loaded, saved):
    loaded.model.train()
    verify_checkpoint(saved, loaded, TEXTS)
    assert loaded.model.training


def test_code_of_another_repo_is_not_passed_on(tmp_path):
    """A config may point to code that was not used; what is saved would run it for whoever trusts the merge."""
    folder = save_pico("llama", tmp_path / "in")
    _edit(folder / "config.json", auto_map={"AutoModelForCausalLM": "user/other--modeling.Own"})
    loaded = load_model(str(folder), device="cpu")
    save_checkpoint(loaded, tmp_path / "out")
    verify_checkpoint(tmp_path / "out", loaded, TEXTS)
    assert "auto_map" not in json.loads((tmp_path / "out" / "config.json").read_text())


def test_own_code_that_was_trusted_travels_along(tmp_path, monkeypatch):
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    folder = save_pico("llama", tmp_path / "in")
    (folder / "modeling_own.py").write_text(
        "from transformers import LlamaConfig, LlamaForCausalLM\n"
        "class OwnConfig(LlamaConfig):\n    model_type = 'own'\n"
        "class OwnForCausalLM(LlamaForCausalLM):\n    config_class = OwnConfig\n"
    )
    names = {"AutoConfig": "modeling_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnForCausalLM"}
    _edit(folder / "config.json", model_type="own", auto_map=names)
    loaded = load_model(str(folder), device="cpu", trust_remote_code=True)
    save_checkpoint(loaded, tmp_path / "out")
    shutil.rmtree(folder)
    verify_checkpoint(tmp_path / "out", loaded, TEXTS)
    assert (tmp_path / "out" / "modeling_own.py").is_file()


def test_a_model_that_cannot_be_run_by_blocks_is_read_whole(loaded, saved, monkeypatch):
    by_blocks, run = _without_room(monkeypatch), verifying.run_passes

    def refuse(read, *words):
        if read.block_weights is not None:
            raise UnsupportedModelError("it does not run its blocks in order")
        run(read, *words)

    monkeypatch.setattr(verifying, "run_passes", refuse)
    verify_checkpoint(saved, loaded, TEXTS)
    assert by_blocks == [True]
