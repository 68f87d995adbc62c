"""What tmerge knows of each ``config.model_type``: where blocks keep their projections, how fused ones are laid out.

Separate ``Linear`` modules are found by the names that causal LMs give them. Everything that a name cannot tell
(the order inside a fused module, names that mean different things in different models, which layers have rotary
embeddings) is listed here per model type, read off that model's forward pass. What is not listed is not guessed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import PreTrainedConfig

from tmerge.models.head_norms import normed_by
from tmerge.models.views import Rows

__all__ = [
    "ATTENTION_NAMES",
    "ATTENTION_PATHS",
    "CROSS_ATTENTION_NAMES",
    "FUSED_ATTENTION",
    "FUSED_MLP",
    "MAY_LACK",
    "MLP_NAMES",
    "MLP_PATHS",
    "OWN_NAMES",
    "HeadLayout",
    "head_layout",
]

# Where a block keeps its attention and its MLP, relative to the block; "" is the block itself (OPT's fc1, fc2).
ATTENTION_PATHS = (
    "self_attn",
    "attn.attention",  # gpt_neo, before its wrapper "attn"
    "attn",
    "attention",
    "self_attention",
    "temporal_block",  # recurrent_gemma
    "mixer",  # nemotron_h: one sublayer a block
)
MLP_PATHS = ("mlp", "feed_forward", "ffn", "mlp_block", "shared_mlp", "mixer", "")

# Names with one meaning in all models: each is a module of one projection alone.
ATTENTION_NAMES = {
    "q": ("q_proj",),
    "k": ("k_proj",),
    "v": ("v_proj",),
    "o": ("o_proj", "out_proj", "dense", "c_proj", "Wo"),
}
MLP_NAMES = {
    "gate": ("gate_proj",),
    "up": ("up_proj", "fc1", "fc_in", "c_fc", "dense_h_to_4h"),
    "down": ("down_proj", "fc2", "fc_out", "c_proj", "dense_4h_to_h"),
}
# Names that only that model type gives this meaning.
OWN_NAMES: dict[str, dict[str, tuple[str, ...]]] = {
    "lfm2": {"gate": ("w1",), "up": ("w3",), "down": ("w2",)},
    "lfm3": {"gate": ("w1",), "up": ("w3",), "down": ("w2",)},
    "modernbert-decoder": {"down": ("Wo",)},
    "granitemoehybrid": {"down": ("output_linear",)},
    "granitemoeshared": {"down": ("output_linear",)},
}
CROSS_ATTENTION_NAMES = ("encoder_attn", "cross_attn", "crossattention", "EncDecAttention")

# Projections that some attention layers of these go without: they reuse another layer's keys and values, or
# take the keys for values.
MAY_LACK: dict[str, frozenset[str]] = {
    "gemma3n_text": frozenset({"k", "v"}),
    "gemma4_text": frozenset({"k", "v"}),
    "gemma4_unified_text": frozenset({"k", "v"}),
}


@dataclass(frozen=True)
class HeadLayout:
    """How the rows of one layer's q, k, v and the columns of its o divide into heads.

    Row ``h * head_dim + i`` of q is dimension i of head h, and reads kv head ``h // (heads // kv_heads)``.

    Attributes:
        heads: Query heads.
        kv_heads: Key and value heads.
        head_dim: Dimensions of each.
        rotary_dim: How many of a head's first dimensions are rotated; 0 for a layer without rotary embeddings,
            None where tmerge has no description.
        rotary_pairs: Which dimensions rotate together: ``halves`` (i and i + rotary_dim / 2), ``neighbours``
            (2 i and 2 i + 1), or None where nothing rotates or tmerge has no description.
        scaling: What a product of q and k is multiplied by before the softmax; None where that is not known.
        normed: Those of q, k and v whose outputs are normed first, so that their size does not matter.
    """

    heads: int
    kv_heads: int
    head_dim: int
    rotary_dim: int | None = None
    rotary_pairs: str | None = None
    scaling: float | None = None
    normed: frozenset[str] = frozenset()


def _one_after_another(heads: HeadLayout) -> dict[str, Rows]:
    """``[q; k; v]``, each whole."""
    query, key = heads.heads * heads.head_dim, heads.kv_heads * heads.head_dim
    total = query + 2 * key
    return {
        "q": Rows(1, total, 0, query),
        "k": Rows(1, total, query, query + key),
        "v": Rows(1, total, query + key, total),
    }


def _by_kv_head(heads: HeadLayout) -> dict[str, Rows]:
    """Per kv head: its query heads, its key head, its value head.

    With as many kv heads as heads that is ``[q_h; k_h; v_h]`` for each head h (gpt_neox, bloom, old falcon); with
    one kv head, all queries, then the key, then the value (multi-query falcon).
    """
    query = heads.heads // heads.kv_heads * heads.head_dim
    stride = query + 2 * heads.head_dim
    return {
        "q": Rows(heads.kv_heads, stride, 0, query),
        "k": Rows(heads.kv_heads, stride, query, query + heads.head_dim),
        "v": Rows(heads.kv_heads, stride, query + heads.head_dim, stride),
    }


def _query_and_output_gate(heads: HeadLayout) -> dict[str, Rows]:
    """Per head: its query, then a gate on the head's output, which is none of q k v o."""
    return {"q": Rows(heads.heads, 2 * heads.head_dim, 0, heads.head_dim)}


# Modules of an attention that store more than one projection, and how; read off each model's forward pass.
FUSED_ATTENTION: dict[str, tuple[str, Callable[[HeadLayout], dict[str, Rows]]]] = {
    "bloom": ("query_key_value", _by_kv_head),
    "falcon": ("query_key_value", _by_kv_head),
    "gpt2": ("c_attn", _one_after_another),
    # Both of its kinds are per kv head: one kv head (multi_query), or as many as heads.
    "gpt_bigcode": ("c_attn", _by_kv_head),
    "gpt_neox": ("query_key_value", _by_kv_head),
    "gpt_neox_japanese": ("query_key_value", _by_kv_head),
    "mpt": ("Wqkv", _one_after_another),
    "openai-gpt": ("c_attn", _one_after_another),
    "persimmon": ("query_key_value", _by_kv_head),
    "phi3": ("qkv_proj", _one_after_another),
    "qwen3_5_moe_text": ("q_proj", _query_and_output_gate),
    "qwen3_5_text": ("q_proj", _query_and_output_gate),
    "qwen3_next": ("q_proj", _query_and_output_gate),
}

# Modules of an MLP that store ``[gate; up]``: the first half of the outputs goes through the activation.
FUSED_MLP: dict[str, str] = {
    "glm": "gate_up_proj",
    "glm4": "gate_up_proj",
    "granitemoehybrid": "input_linear",
    "granitemoeshared": "input_linear",
    # Its forward pass calls the halves "input" and "gate", but it is the first that is activated.
    "modernbert-decoder": "Wi",
    "phi3": "gate_up_proj",
}

_ROTARY_NEIGHBOURS = frozenset(
    {"cohere", "cohere2", "ernie4_5", "ernie4_5_moe", "glm", "glm4", "gptj", "helium", "llama4_text"}
)
_ROTARY_HALVES = frozenset(
    {
        *("apertus", "arcee", "exaone4", "falcon", "gemma", "gemma2", "gemma3_text", "gpt_neox", "granite"),
        *(
            "hunyuan_v1_dense",
            "llama",
            "mistral",
            "mixtral",
            "nemotron",
            "olmo",
            "olmo2",
            "olmo3",
            "olmoe",
            "persimmon",
        ),
        *("phi", "phi3", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "qwen3_next", "qwen3_5_text", "seed_oss"),
        *("smollm3", "stablelm", "starcoder2"),
    }
)
_NO_ROTARY = frozenset({"biogpt", "bloom", "gpt2", "gpt_bigcode", "gpt_neo", "mpt", "openai-gpt", "opt", "xglm"})
# Layers that go without it in models whose other layers have it.
_LAYER_ROTATES: dict[str, Callable[[nn.Module], bool]] = {
    "cohere2": lambda attention: attention.sliding_window is not None,
    "exaone4": lambda attention: attention.sliding_window is None or bool(attention.is_sliding),
    "llama4_text": lambda attention: bool(attention.use_rope),
    "smollm3": lambda attention: bool(attention.use_rope),
}


def _rotary(config: PreTrainedConfig, attention: nn.Module, head_dim: int) -> tuple[int | None, str | None]:
    kind = config.model_type
    if kind in _NO_ROTARY or (kind == "falcon" and config.alibi):
        return 0, None
    if kind not in _ROTARY_NEIGHBOURS | _ROTARY_HALVES:
        return None, None
    if kind in _LAYER_ROTATES and not _LAYER_ROTATES[kind](attention):
        return 0, None
    pairs = "neighbours" if kind in _ROTARY_NEIGHBOURS else "halves"
    if kind == "gptj":
        return config.rotary_dim or head_dim, pairs
    parameters: dict[str, Any] = getattr(config, "rope_parameters", None) or {}
    fraction = parameters.get("partial_rotary_factor") or getattr(config, "partial_rotary_factor", None) or 1.0
    return int(head_dim * fraction), pairs


def _kv_heads(config: PreTrainedConfig, heads: int) -> int:
    if config.model_type == "falcon":
        if config.new_decoder_architecture:
            return config.num_kv_heads
        return 1 if config.multi_query else heads
    if config.model_type == "gpt_bigcode":
        return 1 if config.multi_query else heads
    return getattr(config, "num_key_value_heads", None) or heads


def head_layout(config: PreTrainedConfig, layer: int, attention: nn.Module) -> HeadLayout | None:
    """The heads of one layer, from the config and, for their size, from the attention module where it says.

    Args:
        config: The model's config.
        layer: Index of the layer: a few models have a config for each.
        attention: The layer's attention module.

    Returns:
        What the config promises, for the caller to hold against the weights; None where it speaks of no heads.
    """
    if getattr(config, "is_heterogeneous", False):
        config = config.per_layer_config[layer]
    heads = getattr(config, "num_attention_heads", None)
    if not isinstance(heads, int):
        return None
    head_dim = getattr(attention, "head_dim", None) or getattr(config, "head_dim", None) or config.hidden_size // heads
    rotary_dim, pairs = _rotary(config, attention, head_dim)
    kv_heads, scaling = _kv_heads(config, heads), _scaling(config, attention, head_dim)
    return HeadLayout(heads, kv_heads, head_dim, rotary_dim, pairs, scaling, normed_by(attention))


# Names of a module's own number.
_SCALING_NAMES = ("scaling", "softmax_scale")
_UNSCALED = frozenset({"gpt_neo"})


def _scaling(config: PreTrainedConfig, attention: nn.Module, head_dim: int) -> float:
    """As `HeadLayout.scaling`: the module's own number, or one over the square root of the head's width."""
    if config.model_type in _UNSCALED:
        return 1.0
    numbers = (getattr(attention, name, None) for name in _SCALING_NAMES)
    return next((float(number) for number in numbers if isinstance(number, (int, float))), head_dim**-0.5)
