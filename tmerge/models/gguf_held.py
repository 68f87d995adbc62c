"""What a GGUF file says and holds, held against the model that ``transformers`` makes of it.

Its loader takes what it knows and passes over the rest without a word: a tensor that it has no name for, a scale of the
logits, a stretched rotary table. Without them it is another model. What changes nothing is let pass; what is known to
change the model is refused; keys that nobody here knows are named.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedModel

from tmerge.errors import CheckpointError
from tmerge.models.gguf import BLOCK, GgufHeader
from tmerge.models.gguf_completed import ROTARY_FACTORS, rotary_scaling, rotary_tables
from tmerge.models.gguf_reading import one_name_map
from tmerge.models.reference import ModelReference
from tmerge.quantities import count_words

__all__ = ["DECIDING_KEYS", "HELD_ALONE", "hold_gguf"]

_REMEDY = "so it would be another model; use its safetensors"


@dataclass(frozen=True)
class _Key:
    """A key of the metadata that decides what the model computes.

    Attributes:
        names: Of a config, under any of which it may be.
        neutral: Values that change nothing.
    """

    names: tuple[str, ...] = ()
    neutral: tuple[Any, ...] = ()


DECIDING_KEYS = {
    "attention.value_length": _Key(("v_head_dim", "head_dim")),
    "attention.clamp_kqv": _Key(("clip_qkv",), (0.0,)),
    "attention.max_alibi_bias": _Key((), (0.0,)),
    "attention.causal": _Key((), (True,)),
    "attention.scale": _Key(("attention_multiplier",), (0.0,)),
    "attention.output_scale": _Key((), (0.0, 1.0)),
    "attention.temperature_scale": _Key((), (0.0,)),
    "attention.shared_kv_layers": _Key(("num_kv_shared_layers",), (0,)),
    "attn_logit_softcapping": _Key(("attn_logit_softcapping",), (0.0,)),
    "final_logit_softcapping": _Key(("final_logit_softcapping", "logits_soft_cap"), (0.0,)),
    "logit_scale": _Key(("logit_scale", "logits_scaling"), (0.0, 1.0)),
    "residual_scale": _Key(("residual_multiplier",), (0.0, 1.0)),
    "embedding_scale": _Key(("embedding_multiplier",), (0.0, 1.0)),
    "use_parallel_residual": _Key(("use_parallel_residual",)),
    "expert_count": _Key(("num_experts", "num_local_experts"), (0,)),
    "expert_used_count": _Key(("num_experts_per_tok",), (0,)),
    "expert_feed_forward_length": _Key(("moe_intermediate_size", "intermediate_size")),
    "expert_shared_feed_forward_length": _Key(("shared_expert_intermediate_size",)),
    "expert_weights_scale": _Key(("routed_scaling_factor",), (0.0, 1.0)),
    "expert_weights_norm": _Key(("norm_topk_prob",)),
    "rope.scaling.attn_factor": _Key((), (0.0, 1.0)),
}
# Of what is read, of what is held by its own function below, and of what says nothing of the language model.
_SAID_ELSEWHERE = {
    "context_length",
    "vocab_size",
    "tensor_data_layout",
    "nextn_predict_layers",
    "attention.sliding_window_pattern",
    "rope.dimension_sections",
    "rope.scaling.original_context_length",
    "rope.scaling.finetuned",
    "rope.scaling.yarn_log_multiplier",
    "rope.scaling.yarn_ext_factor",
    "rope.scaling.yarn_attn_factor",
    "rope.scaling.yarn_beta_fast",
    "rope.scaling.yarn_beta_slow",
}


def hold_gguf(reference: ModelReference, header: GgufHeader, model: PreTrainedModel) -> tuple[str, ...]:
    """Hold a file against the model that is made of it.

    Args:
        reference: Named in errors.
        header: Of the file.
        model: On the meta device.

    Returns:
        Remarks on what is not read and may matter.

    Raises:
        CheckpointError: Something is not read without which it is another model; one line.
    """
    config = model.config.get_text_config(decoder=True)
    if unread := _unread_tensors(header, model):
        more = f" and {len(unread) - 1} more" if len(unread) > 1 else ""
        raise CheckpointError(
            f"{reference.text!r} holds tensors that {type(model).__name__} has no place for ({unread[0]}{more}), "
            f"{_REMEDY}"
        )
    prefix = f"{header.architecture}."
    said = {key.removeprefix(prefix): value for key, value in header.metadata.items() if key.startswith(prefix)}
    read = _keys_read(header.architecture)
    for key, value in said.items():
        if key not in read and (made := _otherwise(key, value, said, config)) is not None:
            raise CheckpointError(
                f"{reference.text!r}: its metadata say {prefix}{key} {_shown(value)}, and transformers makes a model "
                f"with {made} of it, {_REMEDY}"
            )
    known = {*read, *_keys_known(header.architecture), *DECIDING_KEYS, *HELD_ALONE, *_SAID_ELSEWHERE}
    unknown = [key for key in said if key not in known]
    predicting = int(said.get("nextn_predict_layers", 0) or 0)
    left_out = (
        [] if not predicting else [f"metadata count {count_words(predicting, 'layer')} of prediction (MTP), left out"]
    )
    return tuple(left_out) + tuple(
        f"metadata say {prefix}{key} {_shown(said[key])}, which is not read: whether it matters is not known here"
        for key in unknown
    )


def _shown(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)[:40]


def _otherwise(key: str, value: Any, said: Mapping[str, Any], config: Any) -> str | None:
    """What the config has in the place of what the file says; None where it has that."""
    if key in HELD_ALONE:
        return HELD_ALONE[key](value, said, config)
    if (deciding := DECIDING_KEYS.get(key)) is None or isinstance(value, str):
        return None
    if any(_same(value, neutral) for neutral in deciding.neutral):
        return None
    held = {name: there for name in deciding.names if (there := _of(config, name)) is not None}
    if any(_same(value, there) for there in held.values()):
        return None
    return ", ".join(f"{name} {there}" for name, there in held.items()) or "none"


def _same(value: Any, other: Any) -> bool:
    try:
        return math.isclose(float(value), float(other), rel_tol=1e-5)
    except (TypeError, ValueError):
        return bool(value == other)


def _of(config: Any, name: str) -> Any:
    """A value of a config; None where it has none, or another for each kind of layer."""
    try:
        return getattr(config, name, None)
    except Exception:  # noqa: BLE001 - transformers has an error of its own for that
        return None


def _head_dim(config: Any) -> int | None:
    """Of all its layers; None where they differ."""
    if _of(config, "global_head_dim") is not None:
        return None
    return int(_of(config, "head_dim") or config.hidden_size // config.num_attention_heads)


def _main_table(config: Any) -> Mapping[str, Any]:
    tables = rotary_tables(config)
    return tables.get("full_attention") or next(iter(tables.values()), {})


def _key_length(value: Any, said: Mapping[str, Any], config: Any) -> str | None:
    width = _head_dim(config)
    return None if width is None or _same(value, width) else f"heads of {width}"


def _rotary_width(value: Any, said: Mapping[str, Any], config: Any) -> str | None:
    table, head = _main_table(config), _head_dim(config)
    if not table or head is None:
        return None
    width = int(head * (table.get("partial_rotary_factor") or _of(config, "partial_rotary_factor") or 1.0))
    return None if _same(value, width) else f"{width} rotary dimensions"


def _rotary_base(value: Any, said: Mapping[str, Any], config: Any) -> str | None:
    theta = _main_table(config).get("rope_theta")
    return None if theta is None or _same(value, theta) else f"rope_theta {theta:g}"


def _window(value: Any, said: Mapping[str, Any], config: Any) -> str | None:
    # A window as wide as the texts may be, or none, lets everything in.
    if isinstance(value, int) and (value <= 0 or value >= said.get("context_length", math.inf)):
        return None
    window = _of(config, "sliding_window")
    return None if _same(value, window) else f"sliding_window {window}"


def _scaling(value: Any, said: Mapping[str, Any], config: Any) -> str | None:
    kind, factor = rotary_scaling(said)
    table = _main_table(config)
    made = table.get("rope_type", "default"), table.get("factor", 1.0)
    if kind == "none" or (kind == made[0] and _same(factor, made[1])):
        return None
    return f"rope_type {made[0]}, factor {made[1]:g}"


HELD_ALONE = {
    "attention.key_length": _key_length,
    "attention.key_length_swa": _key_length,
    "attention.value_length_swa": _key_length,
    "attention.sliding_window": _window,
    "rope.dimension_count": _rotary_width,
    "rope.freq_base": _rotary_base,
    "rope.scaling.type": _scaling,
    "rope.scaling.factor": _scaling,
    "rope.scale_linear": _scaling,
}


def _keys_read(architecture: str) -> set[str]:
    """Keys that ``transformers`` takes into the config."""
    return {key for key, name in _mapping(architecture).items() if name is not None}


def _keys_known(architecture: str) -> set[str]:
    """Keys that it has looked at, and need not be read."""
    return set(_mapping(architecture))


def _mapping(architecture: str) -> dict[str, Any]:
    from transformers.integrations import GGUF_CONFIG_MAPPING

    mapping: dict[str, Any] = {}
    for name in (architecture, architecture.replace("-", "_"), architecture.replace("moe", "_moe")):
        mapping |= dict(GGUF_CONFIG_MAPPING.get(name, {}))  # type: ignore[call-overload]
    return mapping


def _unread_tensors(header: GgufHeader, model: PreTrainedModel) -> list[str]:
    placed = _placed(header, model)
    blocks = int(model.config.get_text_config(decoder=True).num_hidden_layers)
    predicting = int(header.metadata.get(f"{header.architecture}.nextn_predict_layers", 0) or 0)
    unread = []
    for tensor in header.tensors:
        block = BLOCK.match(tensor.name)
        # As many blocks beyond the model's as are said to predict further tokens, and no more.
        predicts = block is not None and blocks <= int(block[1]) < blocks + predicting
        if tensor.name not in placed and not predicts and tensor.name != ROTARY_FACTORS:
            unread.append(tensor.name)
    return unread


def _placed(header: GgufHeader, model: PreTrainedModel) -> set[str]:
    """Names of the tensors that ``transformers`` has a place for in this model."""
    names = {tensor.name for tensor in header.tensors}
    try:
        from transformers.integrations.gguf.utils import get_gguf_conversion_mapping, is_gguf_arch_supported
    except ImportError:
        pass
    else:
        if is_gguf_arch_supported(header.architecture):
            return _renamed_into(model, names, get_gguf_conversion_mapping(header.architecture, model.config))
    from transformers.modeling_gguf_pytorch_utils import TENSOR_PROCESSORS, TensorProcessor, get_gguf_hf_weights_map

    processor = TENSOR_PROCESSORS.get(header.architecture, TensorProcessor)(config=model.config.to_dict())
    with one_name_map():
        placed = set(get_gguf_hf_weights_map(model, processor))
    # Experts are taken apart by the processor; a head is stored beside the embedding that it is tied to.
    return placed | {name for name in names if "_exps." in name or name == "output.weight"}


def _renamed_into(model: PreTrainedModel, names: set[str], mapping: Any) -> set[str]:
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    entries = copy.deepcopy(mapping)  # asking marks an entry as used
    renamings = [entry for entry in entries if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in entries if isinstance(entry, WeightConverter)]
    own = model.state_dict().keys()
    return {
        name
        for name in names
        if (into := rename_source_key(name, renamings, converters)[0]) in own or into.startswith("mtp.")
    }
