"""A pico llama as a GGUF file, written with llama.cpp's own Python package."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf.constants import GGMLQuantizationType

from tests.pico import pico_model, pico_tokenizer

__all__ = ["save_pico_gguf"]


def save_pico_gguf(
    path: Path,
    *,
    kind: GGMLQuantizationType = GGMLQuantizationType.Q8_0,
    tied: bool = True,
    tokenizer: bool = True,
    pad: bool = True,
    architecture: str = "llama",
    keys: dict[str, Any] | None = None,
    seed: int = 0,
    beyond: bool = False,
    extra: dict[str, torch.Tensor] | None = None,
    **config_keys: Any,
) -> Path:
    """Write a two-layer llama whose matrices are packed as `kind`; `keys` are added to the metadata.

    With `beyond`, a third block lies in the file, as of models that predict several tokens; `extra` are tensors by
    their names in the file, and `config_keys` the model's own.
    """
    model = pico_model("llama-tied" if tied else "llama", seed=seed, **{"head_dim": 16, **config_keys})
    config = model.config
    writer = gguf.GGUFWriter(str(path), architecture)
    writer.add_name("Pico")
    writer.add_license("mit")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base((config.rope_parameters or {}).get("rope_theta", 10000.0))
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    if tokenizer:
        _add_tokenizer(writer, pad)
    for key, value in (keys or {}).items():
        kinds = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
        kinds[type(value)](key, value)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        if tied and name == "lm_head.weight":
            continue
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            heads = config.num_attention_heads if "q_proj" in name else config.num_key_value_heads
            # llama.cpp keeps the two halves of each rotary pair side by side.
            tensor = tensor.view(heads, 2, -1, tensor.shape[1]).transpose(1, 2).reshape(tensor.shape)
        stem, suffix = name.rsplit(".", 1)
        _add_tensor(writer, f"{names.get_name(stem)}.{suffix}", tensor, kind)
    if beyond:
        writer.add_nextn_predict_layers(1)
        _add_tensor(writer, "blk.2.attn_norm.weight", torch.ones(config.hidden_size), kind)
    for name, tensor in (extra or {}).items():
        _add_tensor(writer, name, tensor, GGMLQuantizationType.F32)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add_tensor(writer: gguf.GGUFWriter, name: str, tensor: torch.Tensor, kind: GGMLQuantizationType) -> None:
    values = tensor.numpy().astype(np.float32)
    if values.ndim == 1 or kind == GGMLQuantizationType.F32:
        writer.add_tensor(name, values)
    else:
        writer.add_tensor(name, gguf.quants.quantize(values, kind), raw_dtype=kind)


def _add_tokenizer(writer: gguf.GGUFWriter, pad: bool) -> None:
    import json

    tokenizer = pico_tokenizer()
    described = json.loads(tokenizer.backend_tokenizer.to_str())
    vocabulary = sorted(tokenizer.get_vocab().items(), key=lambda entry: entry[1])
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([token for token, _ in vocabulary])
    # The first three, <s> </s> <pad>, are control tokens.
    writer.add_token_types([3 if index < 3 else 1 for _, index in vocabulary])
    merges = described["model"]["merges"]
    writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in merges])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    if pad:
        writer.add_pad_token_id(2)
    writer.add_chat_template("{% for message in messages %}{{ message['content'] }}{% endfor %}")
