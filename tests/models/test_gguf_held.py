"""What a GGUF file says and holds beyond what transformers reads of it: mended, let pass, named or refused."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf.constants import GGMLQuantizationType
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from tests.models.pico_gguf import save_pico_gguf
from tests.pico import pico_model
from tmerge.errors import CheckpointError
from tmerge.models import Model, ModelReference, load_model, read_facts, save_checkpoint
from tmerge.models.gguf import GgufHeader
from tmerge.models.gguf_completed import complete

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
# As published: 64 rotary pairs, or 32 of the 1B.
STRETCHED = {"hidden_size": 64, "num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": 64}


def _factors(config):
    """As llama.cpp's converter has them: what each frequency is divided by; here from transformers' own table."""
    stretched, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    plain = 1.0 / 500000.0 ** (torch.arange(0, 64, 2).double() / 64)
    return (plain / stretched.double()).float()


def _refusals(path):
    """The one line, from wherever the file is looked at first."""
    lines = []
    for call in (
        lambda: read_facts(str(path)),
        lambda: load_model(str(path), device="cpu"),
        lambda: Model(str(path), device="cpu", memory="blocks").open(),
    ):
        with pytest.raises(CheckpointError) as caught:
            call()
        lines.append(str(caught.value))
    assert len(set(lines)) == 1 and "\n" not in lines[0] and "use its safetensors" in lines[0]
    return lines[0]


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("blk.0.attn_q.bias", (64,)),
        ("blk.1.attn_k_norm.weight", (16,)),
        ("rope_factors_long.weight", (8,)),
        ("blk.0.ffn_down.scale", (1,)),
        ("position_embd.weight", (8, 64)),
        ("blk", (4,)),
    ],
)
def test_tensors_without_a_place_are_refused(tmp_path, name, shape):
    path = save_pico_gguf(tmp_path / "a.gguf", extra={name: torch.ones(shape)})
    assert f"holds tensors that LlamaForCausalLM has no place for ({name})" in _refusals(path)


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("attention.key_length", 32, "attention.key_length 32, and transformers makes a model with heads of 16"),
        ("attention.value_length", 32, "head_dim 16"),
        ("attention.sliding_window", 8, "sliding_window None"),
        ("attention.scale", 0.5, "none"),
        ("attention.clamp_kqv", 8.0, "none"),
        ("attention.causal", False, "none"),
        ("final_logit_softcapping", 30.0, "none"),
        ("logit_scale", 0.0625, "none"),
        ("embedding_scale", 12.0, "none"),
        ("residual_scale", 0.22, "none"),
        ("expert_count", 8, "none"),
        ("rope.scaling.type", "yarn", "rope_type default, factor 1"),
        ("rope.scaling.attn_factor", 1.5, "none"),
    ],
)
def test_metadata_that_make_it_another_model_are_refused(tmp_path, key, value, words):
    line = _refusals(save_pico_gguf(tmp_path / "a.gguf", keys={f"llama.{key}": value}))
    assert f"its metadata say llama.{key} " in line and words in line


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("attention.key_length", 16),
        ("attention.value_length", 16),
        ("attention.sliding_window", 4096),
        ("attention.causal", True),
        ("final_logit_softcapping", 0.0),
        ("logit_scale", 1.0),
        ("expert_count", 0),
        ("rope.scaling.type", "none"),
        ("vocab_size", 384),
    ],
)
def test_metadata_that_change_nothing_are_let_pass(tmp_path, key, value):
    assert read_facts(str(save_pico_gguf(tmp_path / "a.gguf", keys={f"llama.{key}": value}))).remarks == ()


def test_metadata_that_nobody_here_knows_are_named(tmp_path):
    path = save_pico_gguf(tmp_path / "a.gguf", keys={"llama.swin_norm": 3, "general.author": "x", "quantize.x": 4})
    (remark,) = read_facts(str(path)).remarks
    assert remark.startswith("metadata say llama.swin_norm 3, which is not read")
    load_model(str(path), device="cpu")


def test_as_many_blocks_beyond_the_models_as_are_said_to_predict_are_left_out_and_said(tmp_path):
    path = save_pico_gguf(tmp_path / "a.gguf", beyond=True)
    assert read_facts(str(path)).remarks == ("metadata count 1 layer of prediction (MTP), left out",)
    load_model(str(path), device="cpu")
    further = save_pico_gguf(tmp_path / "b.gguf", beyond=True, extra={"blk.3.attn_norm.weight": torch.ones(64)})
    assert "(blk.3.attn_norm.weight)" in _refusals(further)
    unsaid = save_pico_gguf(tmp_path / "c.gguf", extra={"blk.2.attn_norm.weight": torch.ones(64)})
    assert "(blk.2.attn_norm.weight)" in _refusals(unsaid)


def test_the_rotary_factors_of_llama_3_are_taken(tmp_path):
    """Their file holds them as a tensor, which transformers passes over: texts of any length read otherwise."""
    model = pico_model("llama-tied", rope_parameters=dict(LLAMA3), max_position_embeddings=256, **STRETCHED)
    path = save_pico_gguf(
        tmp_path / "a.gguf",
        kind=GGMLQuantizationType.F32,
        extra={"rope_freqs.weight": _factors(model.config)},
        rope_parameters=dict(LLAMA3),
        max_position_embeddings=256,
        **STRETCHED,
    )
    ids = torch.arange(200)[None] % 384
    with torch.inference_mode():
        expected = model(ids).logits
        for memory in ("resident", "blocks"):
            loaded = Model(str(path), device="cpu", dtype="float32", memory=memory).open()
            assert loaded.model.config.rope_parameters == LLAMA3
        loaded = load_model(str(path), device="cpu", dtype="float32")
        assert torch.allclose(loaded.model(ids).logits, expected, atol=1e-5)
    save_checkpoint(loaded, tmp_path / "out")
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written["rope_scaling"]["factor"] == 32.0 and written["rope_theta"] == 500000.0
    with torch.inference_mode():
        again = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
        assert torch.allclose(again(ids).logits, expected, atol=1e-5)


def test_rotary_factors_of_one_change_nothing(tmp_path):
    path = save_pico_gguf(tmp_path / "a.gguf", extra={"rope_freqs.weight": torch.ones(8)})
    assert load_model(str(path), device="cpu").model.config.rope_parameters["rope_type"] == "default"


@pytest.mark.parametrize(
    "keys",
    [
        {"rope.scaling.type": "linear", "rope.scaling.factor": 4.0},
        {"rope.scaling.factor": 4.0},  # llama.cpp takes it as linear
        {"rope.scale_linear": 4.0},
    ],
)
def test_linearly_scaled_positions_are_taken(tmp_path, keys):
    path = save_pico_gguf(
        tmp_path / "a.gguf",
        kind=GGMLQuantizationType.F32,
        keys={f"llama.{key}": value for key, value in keys.items()},
    )
    scaled = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}
    model = pico_model("llama-tied", head_dim=16, rope_parameters=dict(scaled))
    loaded = load_model(str(path), device="cpu", dtype="float32")
    assert loaded.model.config.rope_parameters == scaled and read_facts(str(path)).remarks == ()
    ids = torch.arange(100)[None]
    with torch.inference_mode():
        assert torch.allclose(loaded.model(ids).logits, model(ids).logits, atol=1e-5)


def _completed(architecture, model_type, said, **keys):
    """The config of a file of another architecture, as its metadata alone make it."""
    header = GgufHeader(Path("a.gguf"), architecture, {f"{architecture}.{key}": v for key, v in said.items()}, ())
    config = AutoConfig.for_model(model_type, **keys)
    complete(ModelReference.parse("user/name"), header, config)
    return config


def test_windows_scales_and_tables_that_transformers_leaves_out():
    assert _completed("phi3", "phi3", {"attention.sliding_window": 2047}, sliding_window=None).sliding_window == 2047
    scaled = _completed("gemma3", "gemma3_text", {"rope.scaling.type": "linear", "rope.scaling.factor": 8.0})
    assert scaled.rope_parameters["full_attention"]["factor"] == 8.0
    assert scaled.rope_parameters["sliding_attention"]["rope_type"] == "default"
    large = {"hidden_size": 4608, "num_attention_heads": 32}
    assert _completed("gemma2", "gemma2", {"block_count": 46}, **large).query_pre_attn_scalar == 144
    assert _completed("gemma2", "gemma2", {"block_count": 42}, **large).query_pre_attn_scalar == 256


def test_other_rotary_factors_are_refused(tmp_path):
    factors = torch.from_numpy(np.linspace(1, 8, 8, dtype=np.float32))
    path = save_pico_gguf(tmp_path / "a.gguf", extra={"rope_freqs.weight": factors})
    assert "holds rotary factors (rope_freqs.weight, up to 8)" in _refusals(path)
