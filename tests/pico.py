"""Pico models: one tiny, randomly initialised causal LM per architecture family, and a real tokenizer to match.

They are built from the configs of ``transformers`` itself, so a layout that changes there changes here.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from tests.pico_families import PICO_FAMILIES, PICO_POSITIONS, PICO_RARE, PICO_VOCAB

__all__ = ["PICO_FAMILIES", "PICO_RARE", "PICO_VOCAB", "pico_config", "pico_model", "pico_tokenizer", "save_pico"]

# How a config names its depth; all the others say `num_hidden_layers` (through the config's attribute_map).
_DEPTH_KEYS = {
    "gpt2": "n_layer",
    "gptj": "n_layer",
    "gpt_bigcode": "n_layer",
    "bloom": "n_layer",
    "mpt": "n_layers",
    "gpt_neo": "num_layers",
    "openai-gpt": "n_layer",
    "xglm": "num_layers",
}


def pico_config(family: str, *, layers: int = 2, **overrides: Any) -> PreTrainedConfig:
    """The config of a pico model; `overrides` are keys of that family's own config class."""
    model_type, keys = (PICO_FAMILIES | PICO_RARE)[family]
    if "hybrid_override_pattern" in keys:
        layers = len(keys["hybrid_override_pattern"])
    elif "layer_types" in keys:
        layers = max(layers, len(keys["layer_types"]))
    # A depth list (layer_types and the like) is derived from the depth by the config class itself.
    keys = {**keys, _DEPTH_KEYS.get(model_type, "num_hidden_layers"): layers}
    if model_type == "gpt_neo":
        keys["attention_types"] = [[["global"], layers]]
    return AutoConfig.for_model(model_type, **{**keys, **overrides})


def pico_model(family: str, *, layers: int = 2, seed: int = 0, **overrides: Any) -> PreTrainedModel:
    """A randomly initialised causal LM in float32 and eval mode; the same seed gives the same weights.

    Biases and norms are random too (``transformers`` starts them at 0 and 1): with zeros a lost or misplaced
    bias would go unseen.
    """
    config = pico_config(family, layers=layers, **overrides)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager")
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.dim() == 1 and parameter.is_floating_point():
                    shift = torch.randn_like(parameter) * (0.02 if name.endswith("bias") else 0.1)
                    parameter.add_(shift)
                else:
                    # Larger than the usual 0.02, so that attention is not uniform and activations not near-linear.
                    parameter.mul_(3.0)
    # from_config leaves the trainer's mode on.
    model.eval()
    model.generation_config = GenerationConfig(bos_token_id=0, eos_token_id=1, pad_token_id=2)
    return model


_SENTENCES = [
    "The cat sat on the mat while the rain fell softly on the old roof.",
    "A small model learns from a large one when their features agree.",
    "Kucing itu tidur di atas meja ketika hujan turun di kota.",
    "Saya membaca buku tentang sejarah Indonesia di perpustakaan kota.",
    "Mereka pergi ke pasar untuk membeli ikan, sayur, dan buah-buahan.",
    "What is the capital of France? The capital of France is Paris.",
    "Numbers such as 1, 2, 3, 10, 42 and 1984 are tokens as well.",
    "def add(a, b):\n    return a + b\n",
    "El perro corre por el parque y juega con los niños.",
    "Äpfel und Öl, naïve café, 你好, สวัสดี, привет!",
]
_CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>\n{{ message['content'] }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)


@functools.lru_cache(maxsize=1)
def _trained_bpe() -> str:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=PICO_VOCAB,
        # Ids 0, 1, 2: as the pico configs say.
        special_tokens=["<s>", "</s>", "<pad>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_SENTENCES, trainer)
    return tokenizer.to_str()


def pico_tokenizer(
    path: str | Path | None = None, *, bos: bool = False, pad: bool = True, chat: bool = False
) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of `PICO_VOCAB` tokens that reads any text without an unknown token.

    Args:
        path: Folder to save it in, if any.
        bos: Put `<s>` before every text.
        pad: Have a padding token; without one, batching needs the caller's own care.
        chat: Have a chat template.
    """
    tokenizer = Tokenizer.from_str(_trained_bpe())
    if bos:
        from tokenizers.processors import TemplateProcessing

        tokenizer.post_processor = TemplateProcessing(
            single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 0)]
        )
    special = {"bos_token": "<s>", "eos_token": "</s>"} | ({"pad_token": "<pad>"} if pad else {})
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)
    fast.model_max_length = PICO_POSITIONS
    if chat:
        fast.chat_template = _CHAT_TEMPLATE
    if path is not None:
        fast.save_pretrained(path)
    return fast


def save_pico(
    family: str,
    folder: str | Path,
    *,
    bos: bool = False,
    pad: bool = True,
    chat: bool = False,
    dtype: torch.dtype = torch.float32,
    max_shard_size: str = "5GB",
    **model_options: Any,
) -> Path:
    """Save a pico model and its tokenizer as a plain safetensors checkpoint; `model_options` go to `pico_model`."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    model = pico_model(family, **model_options).to(dtype)
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    pico_tokenizer(folder, bos=bos, pad=pad, chat=chat)
    assert json.loads((folder / "config.json").read_text())["model_type"] == (PICO_FAMILIES | PICO_RARE)[family][0]
    return folder
