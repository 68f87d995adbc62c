"""A model's config: whether tmerge can take the model at all, asked before anything large is fetched."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from tmerge.errors import MissingExtraError, UnsupportedModelError
from tmerge.models.checkpoint import StoredTensor
from tmerge.models.door import check_stored_config
from tmerge.models.reference import ModelReference, one_line
from tmerge.models.remote import hub_errors

__all__ = [
    "check_config",
    "load_config",
    "meta_model",
    "said_dtype",
    "set_to_compute",
    "stored_dtype",
    "tidy_gguf_config",
]

# What transformers and torch raise of a config that is none: by far not all of it is theirs to foresee.
_NOT_TO_BE_USED = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    RuntimeError,
    TypeError,
    ValueError,
    StrictDataclassError,
)
_STORED_DTYPES = {"F64": torch.float32, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


def check_config(reference: ModelReference, config: dict[str, Any], trust_remote_code: bool) -> None:
    """Refuse a model that cannot be taken, from its raw ``config.json``.

    Raises:
        UnsupportedModelError: Its code would have to run and may not; not a causal LM; or stored quantised.
    """
    check_stored_config(reference, config)
    kind = config.get("model_type")
    own_code = config.get("auto_map") or {}
    known = kind in CONFIG_MAPPING_NAMES and kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    if own_code.get("AutoModelForCausalLM") and not known:
        if not trust_remote_code:
            raise UnsupportedModelError(
                f"{reference.text!r} runs Python code from its own repo; read that code, and if you trust it, set "
                f"trust_remote_code: [{reference.text}] in the recipe"
            )
    elif not kind:
        raise UnsupportedModelError(f"{reference.text!r}: its config.json has no model_type, so it is no causal LM")
    elif kind not in CONFIG_MAPPING_NAMES:
        raise UnsupportedModelError(
            f"{reference.text!r}: model_type {kind!r} is unknown to transformers {transformers.__version__}; "
            "upgrade it, or use another model"
        )
    elif not known:
        raise UnsupportedModelError(
            f"{reference.text!r}: model_type {kind!r} is not a causal language model; tmerge merges decoders such as "
            "llama, qwen3, gemma3 or gpt2"
        )
    held = (part.get("quantization_config") for part in (config, config.get("text_config") or {}))
    packed = next((settings for settings in held if settings is not None), None)
    if packed is not None:
        method = packed.get("quant_method", "an unknown method") if isinstance(packed, dict) else "an unknown method"
        raise UnsupportedModelError(
            f"{reference.text!r} is stored quantised ({method}), and packed weights cannot be merged; "
            "use the repo of the unquantised model, or a GGUF file"
        )


def load_config(
    reference: ModelReference,
    pretrained: str,
    options: dict[str, Any],
    trust_remote_code: bool = False,
) -> PreTrainedConfig:
    """The config object, by ``transformers``.

    Args:
        reference: Named in errors.
        pretrained: Repo id, or folder.
        options: ``revision`` and ``local_files_only`` of a repo, ``gguf_file`` of a GGUF file.
        trust_remote_code: Whether the repo's own code may run.

    Raises:
        UnsupportedModelError: ``transformers`` cannot make one, or has no causal LM for it.
        MissingExtraError: A package that the repo's own code needs is not installed.
    """
    try:
        with hub_errors(reference):
            config = AutoConfig.from_pretrained(pretrained, trust_remote_code=trust_remote_code, **options)
    except ImportError as error:
        raise MissingExtraError(
            f"{reference.text!r} needs a package that is not installed: {one_line(error)}"
        ) from None
    except _NOT_TO_BE_USED as error:
        what = "its GGUF metadata" if "gguf_file" in options else "its config.json"
        raise UnsupportedModelError(
            f"{reference.text!r}: transformers {transformers.__version__} cannot use {what}: {one_line(error)}"
        ) from None
    if not isinstance(config.get_text_config(decoder=True), PreTrainedConfig):
        raise UnsupportedModelError(
            f"{reference.text!r}: its config.json has a text_config, and a {config.model_type} model has no such part; "
            "take it out"
        )
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING and not trust_remote_code:
        raise UnsupportedModelError(
            f"{reference.text!r}: model_type {config.model_type!r} is not a causal language model; "
            "tmerge merges decoders such as llama, qwen3, gemma3 or gpt2"
        )
    return config


def set_to_compute(config: PreTrainedConfig) -> PreTrainedConfig:
    """Have a model give what is read of it here, in a form that all have: hidden states as an object, no attentions.

    Args:
        config: It is changed.
    """
    for part in (config, config.get_text_config(decoder=True)):
        part.return_dict, part.output_attentions, part.output_hidden_states = True, False, False
    return config


def meta_model(config: PreTrainedConfig, trust_remote_code: bool = False, where: str = "") -> PreTrainedModel:
    """The model of a config without weights: on the meta device, for its modules, names and shapes.

    Args:
        config: Of the model.
        trust_remote_code: Whether the repo's own code may run.
        where: Begins the error's message.

    Raises:
        UnsupportedModelError: ``transformers`` cannot build it from this config.
    """
    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    except (ImportError, *_NOT_TO_BE_USED) as error:
        if isinstance(error, AssertionError) and "adding_idx" in str(error):
            decoder = config.get_text_config(decoder=True)
            raise UnsupportedModelError(
                f"{where}its config has pad_token_id {decoder.pad_token_id}, and ids go up to "
                f"{decoder.vocab_size - 1} (vocab_size); set it to one of them in config.json, or to null"
            ) from None
        raise UnsupportedModelError(
            f"{where}a {config.model_type} model cannot be built from its config: {one_line(error)}"
        ) from None


def stored_dtype(config: dict[str, Any], headers: dict[str, StoredTensor]) -> torch.dtype:
    """The dtype that a checkpoint is stored in: that of most of its bytes, whatever its config says.

    Where nothing is known of the files it is the config's; float32 if that says nothing either.
    """
    sizes: Counter[str] = Counter()
    for tensor in headers.values():
        sizes[tensor.dtype] += tensor.nbytes
    for name, _ in sizes.most_common():
        if name in _STORED_DTYPES:
            return _STORED_DTYPES[name]
    return said_dtype(config) or torch.float32


def said_dtype(config: dict[str, Any]) -> torch.dtype | None:
    """The dtype that a config names; None where it names none."""
    text = config.get("text_config") or {}
    for said in (config.get("dtype"), config.get("torch_dtype"), text.get("dtype"), text.get("torch_dtype")):
        dtype = getattr(torch, str(said).removeprefix("torch."), None) if said else None
        if isinstance(dtype, torch.dtype) and dtype.is_floating_point:
            return torch.float32 if dtype == torch.float64 else dtype
    return None


def tidy_gguf_config(config: PreTrainedConfig) -> None:
    """Take out what a GGUF's metadata leaves in a config that is to be saved.

    Its numbers are float32 written as doubles: 9.999999747378752e-06 is the float32 1e-05, and computes the same.
    """
    # The converter's idea of a name; nothing reads it.
    config.__dict__.pop("_model_name_or_path", None)
    for name, value in list(config.__dict__.items()):
        if isinstance(value, float) and float(np.float32(value)) == value:
            setattr(config, name, float(str(np.float32(value))))
