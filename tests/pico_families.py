"""The configs of the pico models: one entry per architecture family, see `tests.pico`.

Widths are small, and distinct where that catches a mixed-up axis: 64 hidden, 96 MLP, 4 heads of 12, 2 kv heads.
"""

from __future__ import annotations

from typing import Any

__all__ = ["PICO_FAMILIES", "PICO_POSITIONS", "PICO_RARE", "PICO_VOCAB"]

PICO_VOCAB = 384
"""Rows of every pico embedding: at least the pico tokenizer's vocabulary."""

PICO_POSITIONS = 256
"""Longest sequence that every pico model reads."""

_HIDDEN, _MLP, _HEADS, _KV, _HEAD_DIM = 64, 96, 4, 2, 12

# Llama-like configs share their key names; `head_dim` is not hidden / heads on purpose, where the family has it.
_COMMON = {
    "vocab_size": PICO_VOCAB,
    "hidden_size": _HIDDEN,
    "intermediate_size": _MLP,
    "num_attention_heads": _HEADS,
    "num_key_value_heads": _KV,
    "max_position_embeddings": PICO_POSITIONS,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}
_WITH_HEAD_DIM = {**_COMMON, "head_dim": _HEAD_DIM}
_GPT2_NAMES = {
    "vocab_size": PICO_VOCAB,
    "n_embd": _HIDDEN,
    "n_head": _HEADS,
    "n_positions": PICO_POSITIONS,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}
_MOE = {"moe_intermediate_size": 24, "num_experts": 4, "num_experts_per_tok": 2}

# Family name -> (model_type, config keys). A family is a model_type, or a variant of one after a dash.
PICO_FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", _WITH_HEAD_DIM),
    "llama-bias": ("llama", {**_WITH_HEAD_DIM, "attention_bias": True, "mlp_bias": True}),
    "llama-tied": ("llama", {**_WITH_HEAD_DIM, "tie_word_embeddings": True}),
    "mistral": ("mistral", {**_WITH_HEAD_DIM, "sliding_window": 16}),
    "qwen2": ("qwen2", _COMMON),
    "qwen3": ("qwen3", _WITH_HEAD_DIM),
    "gemma": ("gemma", _WITH_HEAD_DIM),
    "gemma2": ("gemma2", {**_WITH_HEAD_DIM, "query_pre_attn_scalar": _HEAD_DIM, "sliding_window": 16}),
    "gemma3": ("gemma3_text", {**_WITH_HEAD_DIM, "query_pre_attn_scalar": _HEAD_DIM, "sliding_window": 16}),
    "phi3": ("phi3", _COMMON),
    "olmo": ("olmo", _COMMON),
    "olmo2": ("olmo2", _COMMON),
    "granite": ("granite", _COMMON),
    "smollm3": ("smollm3", {**_COMMON, "no_rope_layer_interval": 2}),
    "stablelm": ("stablelm", _COMMON),
    "stablelm-norms": ("stablelm", {**_COMMON, "qk_layernorm": True, "use_qkv_bias": True}),
    "cohere": ("cohere", {**_COMMON, "use_qk_norm": True}),
    "cohere2": ("cohere2", {**_WITH_HEAD_DIM, "sliding_window": 16}),
    "glm": ("glm", _WITH_HEAD_DIM),
    "glm4": ("glm4", _WITH_HEAD_DIM),
    "nemotron": ("nemotron", _WITH_HEAD_DIM),
    "starcoder2": ("starcoder2", _COMMON),
    "seed_oss": ("seed_oss", _WITH_HEAD_DIM),
    "exaone4": ("exaone4", {**_WITH_HEAD_DIM, "sliding_window": 16, "sliding_window_pattern": 2}),
    "helium": ("helium", {**_COMMON, "head_dim": _HIDDEN // _HEADS}),
    "ernie4_5": ("ernie4_5", _WITH_HEAD_DIM),
    "hunyuan": ("hunyuan_v1_dense", _WITH_HEAD_DIM),
    "apertus": (
        "apertus",
        {**_COMMON, "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}},
    ),
    "arcee": ("arcee", _WITH_HEAD_DIM),
    "phi": ("phi", {**_COMMON, "qk_layernorm": False}),
    "gpt2": ("gpt2", _GPT2_NAMES),
    "gptj": ("gptj", {**_GPT2_NAMES, "rotary_dim": 8}),
    "gpt_neo": (
        "gpt_neo",
        {
            "vocab_size": PICO_VOCAB,
            "hidden_size": _HIDDEN,
            "num_heads": _HEADS,
            "max_position_embeddings": PICO_POSITIONS,
            "window_size": 16,
            "bos_token_id": 0,
            "eos_token_id": 1,
        },
    ),
    "gpt_bigcode": ("gpt_bigcode", {**_GPT2_NAMES, "multi_query": True}),
    "gpt_bigcode-mha": ("gpt_bigcode", {**_GPT2_NAMES, "multi_query": False}),
    "gpt_neox": ("gpt_neox", {**_COMMON, "num_key_value_heads": _HEADS}),
    "falcon": (
        "falcon",
        {**_COMMON, "ffn_hidden_size": _MLP, "multi_query": False, "new_decoder_architecture": False, "bias": True},
    ),
    "falcon-mq": ("falcon", {**_COMMON, "ffn_hidden_size": _MLP, "multi_query": True}),
    "falcon-new": (
        "falcon",
        {**_COMMON, "ffn_hidden_size": _MLP, "new_decoder_architecture": True, "num_kv_heads": _KV},
    ),
    "falcon-alibi": (
        "falcon",
        {**_COMMON, "ffn_hidden_size": _MLP, "multi_query": False, "alibi": True, "parallel_attn": False, "bias": True},
    ),
    "bloom": ("bloom", {"vocab_size": PICO_VOCAB, "hidden_size": _HIDDEN, "n_head": _HEADS, "pad_token_id": 2}),
    "mpt": ("mpt", {"vocab_size": PICO_VOCAB, "d_model": _HIDDEN, "n_heads": _HEADS, "max_seq_len": PICO_POSITIONS}),
    "opt": (
        "opt",
        {
            "vocab_size": PICO_VOCAB,
            "hidden_size": _HIDDEN,
            "word_embed_proj_dim": 32,
            "ffn_dim": _MLP,
            "num_attention_heads": _HEADS,
            "max_position_embeddings": PICO_POSITIONS,
            "bos_token_id": 0,
            "eos_token_id": 1,
            "pad_token_id": 2,
        },
    ),
    "mixtral": ("mixtral", {**_WITH_HEAD_DIM, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen2_moe": ("qwen2_moe", {**_COMMON, **_MOE, "shared_expert_intermediate_size": 48}),
    "qwen3_moe": ("qwen3_moe", {**_WITH_HEAD_DIM, **_MOE}),
    "olmoe": ("olmoe", {**_COMMON, "num_experts": 4, "num_experts_per_tok": 2}),
}

_LINEAR_ATTENTION = {
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_conv_kernel_dim": 4,
}
_MHA = {key: value for key, value in _COMMON.items() if key != "num_key_value_heads"}
_PER_LAYER_INPUTS = {"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": PICO_VOCAB, "sliding_window": 16}

# Families whose layers are not all alike, and ones that few people run: apart, so that a test over PICO_FAMILIES
# stays short and may take q k v o for granted in every layer. Depths other than the default need layer lists.
PICO_RARE: dict[str, tuple[str, dict[str, Any]]] = {
    "olmo3": ("olmo3", {**_COMMON, "sliding_window": 16}),
    "nanochat": ("nanochat", _COMMON),
    "jais2": ("jais2", _COMMON),
    "persimmon": ("persimmon", _MHA),
    "gpt_neox_japanese": ("gpt_neox_japanese", {**_MHA, "intermediate_multiple_size": 2}),
    "openai-gpt": ("openai-gpt", {key: value for key, value in _GPT2_NAMES.items() if not key.endswith("token_id")}),
    "modernbert-decoder": (
        "modernbert-decoder",
        {**_MHA, "local_attention": 32, "cls_token_id": 0, "sep_token_id": 1},
    ),
    "biogpt": ("biogpt", _MHA),
    "xglm": (
        "xglm",
        {
            "vocab_size": PICO_VOCAB,
            "d_model": _HIDDEN,
            "ffn_dim": _MLP,
            "attention_heads": _HEADS,
            "max_position_embeddings": PICO_POSITIONS,
            "bos_token_id": 0,
            "eos_token_id": 1,
            "pad_token_id": 2,
        },
    ),
    "granitemoeshared": (
        "granitemoeshared",
        {**_COMMON, "num_local_experts": 4, "num_experts_per_tok": 2, "shared_intermediate_size": 48},
    ),
    "gpt_oss": (
        "gpt_oss",
        {
            **_WITH_HEAD_DIM,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "sliding_window": 16,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        },
    ),
    # Every second layer of experts, the others dense.
    "llama4": (
        "llama4_text",
        {
            **_WITH_HEAD_DIM,
            "num_local_experts": 4,
            "intermediate_size_mlp": 80,
            "interleave_moe_layer_step": 2,
            "no_rope_layers": [1, 0],
        },
    ),
    "qwen3_moe-partly": ("qwen3_moe", {**_WITH_HEAD_DIM, **_MOE, "mlp_only_layers": [0]}),
    # Every second layer without plain attention.
    "qwen3_5": (
        "qwen3_5_text",
        {**_WITH_HEAD_DIM, **_LINEAR_ATTENTION, "layer_types": ["linear_attention", "full_attention"]},
    ),
    "qwen3_next": (
        "qwen3_next",
        {
            **_WITH_HEAD_DIM,
            **_LINEAR_ATTENTION,
            **_MOE,
            "layer_types": ["linear_attention", "full_attention"],
            "shared_expert_intermediate_size": 24,
        },
    ),
    "lfm2": ("lfm2", {**_COMMON, "layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False}),
    "granitemoehybrid": (
        "granitemoehybrid",
        {
            **_COMMON,
            "layer_types": ["mamba", "attention"],
            "num_local_experts": 0,
            "shared_intermediate_size": _MLP,
            "mamba_n_heads": 4,
            "mamba_d_state": 8,
            "mamba_d_head": 32,
        },
    ),
    "recurrent_gemma": (
        "recurrent_gemma",
        {**_COMMON, "attention_window_size": 16, "lru_width": _HIDDEN, "block_types": ["recurrent", "attention"]},
    ),
    "nemotron_h": (
        "nemotron_h",
        {
            **_WITH_HEAD_DIM,
            "hybrid_override_pattern": "M*-*",
            "mamba_num_heads": 4,
            "mamba_head_dim": 32,
            "ssm_state_size": 8,
            "n_groups": 2,
        },
    ),
    # Attention and a state-space model side by side.
    "falcon_h1": (
        "falcon_h1",
        {**_WITH_HEAD_DIM, "mamba_d_ssm": 128, "mamba_n_heads": 4, "mamba_d_head": 32, "mamba_d_state": 8},
    ),
    # Layers that reuse the keys and values of others.
    "gemma3n": (
        "gemma3n_text",
        {
            **_WITH_HEAD_DIM,
            **_PER_LAYER_INPUTS,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
            "num_kv_shared_layers": 2,
            "laurel_rank": 4,
            "activation_sparsity_pattern": [0.0] * 4,
        },
    ),
    "gemma4": (
        "gemma4_text",
        {
            **_WITH_HEAD_DIM,
            **_PER_LAYER_INPUTS,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
            "num_kv_shared_layers": 2,
            "global_head_dim": 32,
        },
    ),
    "gemma4-keys": (
        "gemma4_text",
        {
            **_WITH_HEAD_DIM,
            **_PER_LAYER_INPUTS,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
            "num_kv_shared_layers": 0,
            "global_head_dim": 32,
            "num_global_key_value_heads": 1,
            "attention_k_eq_v": True,
        },
    ),
}
