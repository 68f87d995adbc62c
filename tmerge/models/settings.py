"""What is written beside the weights: config, generation config, tokenizer.

A checkpoint's own files are taken as they are, but for what its config said of parts that the model does not have: what
read the target reads the merge. Where there are none (a GGUF file's are made of its metadata) they are written by
``transformers``, and what its releases before 5 call otherwise is written in both ways, as vLLM, llama.cpp and others
read those names too.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from tmerge.models.announced import is_announcement
from tmerge.models.checkpoint import is_licence_file
from tmerge.models.loading import LoadedModel, runs_own_code
from tmerge.models.place import Place
from tmerge.models.tokenizers import restore_limits

__all__ = [
    "CONFIG",
    "READ_BY_BOTH",
    "least_release",
    "own_place",
    "write_config",
    "write_generation_config",
    "write_tokenizer",
]

CONFIG = "config.json"
"""Name of the file without which a folder is no checkpoint."""

_GENERATION, _TOKENIZER = "generation_config.json", "tokenizer_config.json"
# Kinds of rotary positions that releases before 5 compute.
_OLDER_ROTARY = ("default", "linear", "dynamic", "yarn", "longrope", "llama3")
# Types of models whose files, written by today's releases, those before 5 read in the same way (test_older.py).
READ_BY_BOTH = frozenset(
    """
    arcee biogpt bloom cohere cohere2 ernie4_5 exaone4 falcon falcon_h1 gemma gemma2 gemma3_text gemma3n_text glm glm4
    gpt2 gpt_bigcode gpt_neo gpt_neox gpt_neox_japanese gptj granite granitemoeshared helium hunyuan_v1_dense lfm2 llama
    llama4_text mistral mixtral mpt nemotron olmo olmo2 olmo3 olmoe openai-gpt opt persimmon phi phi3 qwen2 qwen2_moe
    qwen3 qwen3_moe qwen3_next seed_oss smollm3 stablelm starcoder2 xglm
    """.split()
)
# What other code than the model's own is not to be pointed to, and what the reading of the files left behind.
_NOT_WRITTEN = ("auto_map", "_name_or_path")


def own_place(loaded: LoadedModel) -> Place | None:
    """The files that a model was loaded from, where they are a checkpoint of this very kind of model.

    They are not where the model runs code of its own, is the part of a larger one that reads text, or was unpacked.
    """
    place = loaded.place
    if not isinstance(place, Place) or runs_own_code(loaded.model):
        return None
    return place if place.stored_config.get("model_type") == loaded.model.config.model_type else None


def least_release(loaded: LoadedModel) -> str | None:
    """The first ``transformers`` that reads what is written; None where the target's own files do not tell either.

    Of files that a release before 5 has written, or that are of a kind that both read in the same way, nothing is said.
    """
    place = own_place(loaded)
    own = str((place.stored_config if place is not None else {}).get("transformers_version", ""))
    written_before = place is not None and not own.startswith("5.")
    return None if written_before or loaded.model.config.model_type in READ_BY_BOTH else "5.0"


def write_config(loaded: LoadedModel, folder: Path, dtype: torch.dtype, place: Place | None) -> None:
    """Write config.json.

    Args:
        loaded: The model that it is of.
        folder: That it is written to.
        dtype: Of the weights beside it.
        place: Whose config is to be kept; None writes the one that ``transformers`` makes of the model's.
    """
    path = folder / CONFIG
    if place is None:
        loaded.model.config.save_pretrained(folder)
        made = json.loads(path.read_text(encoding="utf-8"))
        path.write_text(_json(_read_by_both(_with_dtype(made, dtype, always=True))), encoding="utf-8")
        return
    kept = _as_it_is(place.stored_config, loaded.model.config)
    if place.apart is not None:
        kept["tie_word_embeddings"] = False  # said by no key, most kinds of models are tied
    kept = _read_by_both(kept) | {"architectures": [type(loaded.model).__name__]}
    if dtype != place.dtype:
        kept = _with_dtype(kept, dtype, always=True)
    if kept == place.stored_config:
        shutil.copyfile(place.folder / CONFIG, path)
    else:
        path.write_text(_json(kept), encoding="utf-8")


def _as_it_is(stored: Mapping[str, Any], config: Any) -> dict[str, Any]:
    """A stored config, but for what it said of parts that are not written and of ties that are none."""
    kept = {name: value for name, value in stored.items() if name not in _NOT_WRITTEN}
    for name, value in kept.items():
        if isinstance(value, dict) and name == "text_config":
            kept[name] = _as_it_is(value, config.get_text_config(decoder=True))
        elif is_announcement(name, value) or (name == "tie_word_embeddings" and value):
            kept[name] = getattr(config, name, value)
    if getattr(config, "id2label", None) is None:
        for name in ("id2label", "label2id", "problem_type"):
            kept.pop(name, None)
    return kept


def _with_dtype(config: dict[str, Any], dtype: torch.dtype, *, always: bool) -> dict[str, Any]:
    """Under today's key and the older one."""
    name = str(dtype).removeprefix("torch.")
    text = config.get("text_config")
    inner = {"text_config": _with_dtype(text, dtype, always=False)} if isinstance(text, dict) else {}
    return config | inner | {key: name for key in ("dtype", "torch_dtype") if always or key in config}


def _read_by_both(config: dict[str, Any]) -> dict[str, Any]:
    """Rotary positions where releases before 5 look for them, beside where today's write them and read both."""
    text = config.get("text_config")
    if isinstance(text, dict):
        config = config | {"text_config": _read_by_both(text)}
    if config.get("model_type") == "qwen3_moe" and "num_local_experts" in config:
        config = {"num_experts": config["num_local_experts"]} | config
    rotary = config.get("rope_parameters")
    if not isinstance(rotary, dict) or config.get("model_type") not in READ_BY_BOTH:
        return config
    kinds = {name: value for name, value in rotary.items() if isinstance(value, dict)}
    if any(kind.get("rope_type", "default") not in _OLDER_ROTARY for kind in (kinds.values() or [rotary])):
        return config
    older = _older_rotary(kinds.get("full_attention", {}) if kinds else rotary)
    if "rope_theta" in kinds.get("sliding_attention", {}):
        older["rope_local_base_freq"] = kinds["sliding_attention"]["rope_theta"]
    return older | config


def _older_rotary(rotary: Mapping[str, Any]) -> dict[str, Any]:
    apart = {key: rotary[key] for key in ("rope_theta", "partial_rotary_factor") if key in rotary}
    scaling = {key: value for key, value in rotary.items() if key not in apart}
    return apart if scaling.get("rope_type", "default") == "default" else apart | {"rope_scaling": scaling}


def write_generation_config(loaded: LoadedModel, folder: Path) -> None:
    """Write how the model likes to be sampled: as its checkpoint says it, where it does.

    One that ``transformers`` reads but refuses to write, such as Llama 2's, is written too: the merged model should be
    sampled as the target is.
    """
    if isinstance(loaded.place, Place):
        stored = loaded.place.beside().get(_GENERATION)
        if stored is not None:
            shutil.copyfile(stored, folder / _GENERATION)
    elif loaded.model.generation_config is not None:
        loaded.model.generation_config.to_json_file(folder / _GENERATION)


def write_tokenizer(loaded: LoadedModel, folder: Path) -> None:
    """Write the tokenizer and its chat templates: the files that it was read from, where it is a checkpoint's."""
    if isinstance(loaded.place, Place) and not runs_own_code(loaded.tokenizer):
        named = type(loaded.tokenizer).vocab_files_names.values()
        for name, path in loaded.place.beside(tuple(named)).items():
            if name != _GENERATION and not is_licence_file(name):
                (folder / name).parent.mkdir(exist_ok=True)
                shutil.copyfile(path, folder / name)
    else:
        restore_limits(loaded.tokenizer)
        loaded.tokenizer.save_pretrained(folder)
    path = folder / _TOKENIZER
    said = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    written = _tokenizer_read_by_both(said, runs_own_code(loaded.tokenizer))
    if written != said:
        path.write_text(_json(written), encoding="utf-8")


def _tokenizer_read_by_both(said: dict[str, Any], own_code: bool) -> dict[str, Any]:
    """What today's releases write of a tokenizer, under names that those before 5 know as well."""
    written = dict(said)
    if not own_code:
        written.pop("auto_map", None)
    if written.get("tokenizer_class") == "TokenizersBackend":
        written["tokenizer_class"] = "PreTrainedTokenizerFast"
    if isinstance(written.get("extra_special_tokens"), list):
        written["additional_special_tokens"] = written.pop("extra_special_tokens")
    return written


def _json(document: Mapping[str, Any]) -> str:
    return json.dumps(document, indent=2, ensure_ascii=False) + "\n"
