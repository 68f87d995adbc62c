"""GGUF files: the same model and tokenizer as ``transformers`` makes of them, sooner, and errors in one line."""

from __future__ import annotations

import json
import struct

import gguf
import numpy as np
import pytest
import torch
import transformers
from gguf.constants import GGMLQuantizationType as Kind
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.models.pico_gguf import save_pico_gguf
from tests.pico import pico_model, pico_tokenizer
from tmerge.errors import (
    CheckpointError,
    MissingExtraError,
    ModelNotFoundError,
    NotEnoughMemoryError,
    TokenizerError,
    UnsupportedModelError,
)
from tmerge.models import (
    demo_path,
    load_model,
    load_tokenizer,
    model_commit,
    read_facts,
    save_checkpoint,
    verify_checkpoint,
)
from tmerge.models import device as device_module
from tmerge.models.gguf import read_header
from tmerge.models.gguf_reading import _dequantize, fast_reading

TEXTS = ["The cat sat on 3 mats in 2024.", "Saya membaca  buku.\n\nÄpfel, 你好!", "<s>a</s>"]


def _plain(path, dtype):
    """What transformers makes of the file when nothing of tmerge is in its way."""
    options = {"quantization_config": transformers.GgufConfig(dequantize=True)}
    model = AutoModelForCausalLM.from_pretrained(str(path.parent), gguf_file=path.name, dtype=dtype, **options)
    return model, AutoTokenizer.from_pretrained(str(path.parent), gguf_file=path.name)


def _assert_same(loaded, model, tokenizer):
    expected, found = model.state_dict(), loaded.model.state_dict()
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name
    assert found["lm_head.weight"].data_ptr() == found["model.embed_tokens.weight"].data_ptr()
    assert loaded.tokenizer.get_vocab() == tokenizer.get_vocab()
    assert loaded.tokenizer.chat_template == tokenizer.chat_template
    for text in TEXTS:
        assert loaded.tokenizer(text)["input_ids"] == tokenizer(text)["input_ids"]
    for name in ("bos_token", "eos_token", "pad_token", "unk_token"):
        assert getattr(loaded.tokenizer, name) == getattr(tokenizer, name)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("kind", [Kind.F32, Kind.F16, Kind.BF16, Kind.Q8_0, Kind.Q4_1])
def test_the_result_is_that_of_transformers_bit_for_bit(tmp_path, kind, dtype):
    path = save_pico_gguf(tmp_path / "pico.gguf", kind=kind)
    _assert_same(load_model(str(path), dtype=dtype, device="cpu"), *_plain(path, dtype))


@pytest.mark.real
@pytest.mark.slow
def test_a_real_model_is_that_of_transformers_bit_for_bit():
    try:
        path = demo_path("smollm2-135m-instruct")
    except MissingExtraError as error:
        pytest.skip(str(error))  # says which package is not installed, and how it is
    _assert_same(load_model("demo:smollm2-135m-instruct", device="cpu"), *_plain(path, torch.bfloat16))


@pytest.mark.parametrize("tied", [True, False])
def test_float32_in_the_file_is_the_model_it_was_written_from(tmp_path, tied):
    path = save_pico_gguf(tmp_path / "pico.gguf", kind=Kind.F32, tied=tied)
    loaded = load_model(str(path), dtype="float32", device="cpu")
    expected = pico_model("llama-tied" if tied else "llama", head_dim=16)
    torch.testing.assert_close(loaded.model.state_dict(), expected.state_dict(), rtol=0, atol=0)
    ids = torch.tensor([pico_tokenizer()(TEXTS[0])["input_ids"]])
    assert loaded.tokenizer(TEXTS[0])["input_ids"] == ids[0].tolist()
    expected.set_attn_implementation("sdpa")
    with torch.inference_mode():
        torch.testing.assert_close(loaded.model(ids).logits, expected(ids).logits, rtol=0, atol=0)


def test_it_is_plain_afterwards(tmp_path):
    """Its config says nothing of packing or of this machine, so that it saves like any other model."""
    loaded = load_model(str(save_pico_gguf(tmp_path / "pico.gguf")), device="cpu")
    assert (loaded.dtype, loaded.licence, loaded.pad_id) == (torch.bfloat16, "mit", 2)
    assert loaded.commit == model_commit(str(tmp_path / "pico.gguf")) and loaded.commit.startswith("sha256:")
    config = loaded.model.config
    assert config.architectures == ["LlamaForCausalLM"] and config.dtype == torch.bfloat16
    assert config.rms_norm_eps == 1e-6 and config._name_or_path == "pico"
    assert not hasattr(config, "quantization_config") and not hasattr(loaded.model, "hf_quantizer")
    written = save_checkpoint(loaded, tmp_path / "saved")
    verify_checkpoint(tmp_path / "saved", loaded, TEXTS)
    for path in written:
        if path.suffix == ".json":
            assert str(tmp_path) not in path.read_text() and "gguf" not in path.read_text().lower(), path.name
    settings = json.loads((tmp_path / "saved" / "tokenizer_config.json").read_text())
    assert not settings.keys() & {"is_local", "local_files_only", "name_or_path"}
    assert (tmp_path / "saved" / "chat_template.jinja").is_file()


def test_settings_that_lie_beside_the_file_are_not_its_own(tmp_path):
    path = save_pico_gguf(tmp_path / "pico.gguf")
    expected = load_tokenizer(str(path))
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "BertTokenizer", "bos_token": "[CLS]"}')
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    loaded = load_model(str(path), device="cpu")
    assert type(loaded.tokenizer) is type(expected) and loaded.tokenizer.bos_token == "<s>"


def test_no_pad_token_in_the_file(tmp_path):
    loaded = load_model(str(save_pico_gguf(tmp_path / "pico.gguf", pad=False)), device="cpu")
    assert loaded.tokenizer.pad_token is None and loaded.pad_id == 1


def test_facts_come_from_the_header(tmp_path):
    path = save_pico_gguf(tmp_path / "pico.gguf")
    facts = read_facts(str(path))
    model = load_model(str(path), device="cpu").model
    assert facts.parameters == sum(parameter.numel() for parameter in model.parameters())
    assert (facts.layers, facts.hidden_size, facts.model_type, facts.licence) == (2, 64, "llama", "mit")
    # Eight bits a value and a half one per 32 for the matrices, and the norms in float32.
    matrices = sum(parameter.numel() for parameter in model.parameters() if parameter.dim() == 2)
    assert facts.weight_bytes == matrices * 34 // 32 + 4 * (facts.parameters - matrices)


@pytest.mark.parametrize(
    "kind",
    [Kind.Q4_0, Kind.Q4_1, Kind.Q5_0, Kind.Q5_1, Kind.Q8_0, Kind.Q2_K, Kind.Q4_K, Kind.Q6_K, Kind.BF16, Kind.IQ4_NL],
)
@pytest.mark.parametrize("rows", [1, 7, 64, 96])
def test_unpacking_regrouped_is_unpacking(kind, rows):
    _, size = gguf.GGML_QUANT_SIZES[kind]
    # Bytes below 60 keep the float16 scales finite.
    data = np.random.default_rng(rows).integers(0, 60, (rows, 3 * size), dtype=np.uint8)
    expected, found = gguf.dequantize(data, kind), _dequantize(data, kind)
    assert found.shape == expected.shape and found.dtype == expected.dtype
    np.testing.assert_array_equal(found.view(np.uint32), expected.view(np.uint32))


def test_what_is_unpacked_is_not_copied_and_what_lies_in_the_file_is():
    data = np.zeros((64, 34), dtype=np.uint8)
    unpacked = _dequantize(data, Kind.Q8_0)
    assert np.shares_memory(np.copy(unpacked), unpacked) and type(np.copy(unpacked)) is np.ndarray
    assert not np.shares_memory(np.copy(unpacked.T), unpacked)
    plain = np.zeros(4, dtype=np.float32)
    as_it_lies = _dequantize(plain, Kind.F32)
    assert np.shares_memory(as_it_lies, plain) and not np.shares_memory(np.copy(as_it_lies), plain)


def test_everything_is_put_back(tmp_path):
    path, other = save_pico_gguf(tmp_path / "pico.gguf"), save_pico_gguf(tmp_path / "other.gguf", seed=1)
    from transformers import modeling_gguf_pytorch_utils as loader

    def state():
        return gguf.GGUFReader, gguf.dequantize, gguf.get_tensor_name_map, loader.tqdm

    before = state()
    with pytest.raises(KeyError), fast_reading(path):
        assert gguf.GGUFReader is not before[0]
        assert gguf.GGUFReader(path) is gguf.GGUFReader(str(path))
        # Another file is read by the original reader, with all of its fields.
        assert "tokenizer.ggml.merges" in gguf.GGUFReader(other).fields
        raise KeyError
    assert state() == before


def _header_cut(data):
    return data[:200]


def _weights_cut(data):
    return data[:-1]


def _magic(data):
    return b"GGML" + data[4:]


def _version(data):
    return data[:4] + struct.pack("<I", 1) + data[8:]


def _swapped(data):
    return data[:4] + struct.pack(">I", 3) + data[8:]


def _endless(data):
    return data[:8] + struct.pack("<QQ", 2**60, 2**60) + data[24:]


def _kind(data):
    name = b"token_embd.weight"
    at = data.index(name) + len(name) + 4 + 16
    return data[:at] + struct.pack("<I", 999) + data[at + 4 :]


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (_header_cut, "truncated or damaged"),
        (_weights_cut, "truncated or damaged"),
        (lambda data: b"", "not a GGUF file"),
        (lambda data: b"GGUF", "truncated or damaged"),
        (_magic, "not a GGUF file"),
        (_version, "version 1"),
        (_swapped, "big-endian"),
        (_endless, "truncated or damaged"),
        (_kind, "packed as type 999"),
    ],
)
def test_spoiled_files(tmp_path, spoil, words):
    path = save_pico_gguf(tmp_path / "pico.gguf")
    path.write_bytes(spoil(path.read_bytes()))
    for read in (load_model, read_facts, load_tokenizer):
        with pytest.raises(CheckpointError, match=words) as caught:
            read(str(path))
        assert "\n" not in str(caught.value) and "pico.gguf" in str(caught.value)


def test_a_part_of_a_split_model(tmp_path):
    path = save_pico_gguf(tmp_path / "pico-00001-of-00002.gguf", keys={"split.count": 2})
    with pytest.raises(CheckpointError, match="llama-gguf-split --merge"):
        load_model(str(path))


def test_an_architecture_that_transformers_does_not_know(tmp_path):
    path = save_pico_gguf(tmp_path / "pico.gguf", architecture="rwkv7")
    for read in (load_model, read_facts):
        with pytest.raises(UnsupportedModelError, match="rwkv7") as caught:
            read(str(path))
        assert "\n" not in str(caught.value)


def test_a_file_without_a_tokenizer(tmp_path):
    path = save_pico_gguf(tmp_path / "pico.gguf", tokenizer=False, keys={"llama.vocab_size": 384})
    with pytest.raises(TokenizerError, match="no tokenizer in it"):
        load_model(str(path))
    assert not read_header(path).has_tokenizer


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(ModelNotFoundError, match="no such file"):
        load_model(str(tmp_path / "pico.gguf"))


def test_room_for_unpacking_is_asked_for_before_it_begins(tmp_path, monkeypatch):
    path = save_pico_gguf(tmp_path / "pico.gguf")
    values = sum(tensor.values for tensor in read_header(path).tensors)
    # Enough for the model in bfloat16, which was all that was asked for, and not for its values in float32 as well.
    monkeypatch.setattr(device_module, "available_memory", lambda device: 5 * values)
    with pytest.raises(NotEnoughMemoryError, match="kB are free"):
        load_model(str(path), dtype="bfloat16", device="cpu")
    monkeypatch.setattr(device_module, "available_memory", lambda device: 10 * values)
    assert load_model(str(path), dtype="bfloat16", device="cpu").model.dtype == torch.bfloat16
