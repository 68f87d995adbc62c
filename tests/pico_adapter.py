"""LoRA adapters of pico models, as PEFT itself saves them, with random factors."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, PreTrainedModel

__all__ = ["merged_by_peft", "save_adapter"]


def save_adapter(base: Path, folder: Path, *, seed: int = 0, size: float = 0.3, **options: Any) -> Path:
    """Save an adapter that changes each of its base's weights by about `size` of their own.

    Args:
        base: Folder of the model that it is of, which it names.
        folder: Where it goes.
        seed: Of its factors.
        size: Of the factors' entries.
        **options: Of ``LoraConfig``.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's, of what is unusual and meant here
        return _saved(base, folder, seed, size, options)


def _saved(base: Path, folder: Path, seed: int, size: float, options: dict[str, Any]) -> Path:
    model = AutoModelForCausalLM.from_pretrained(base)
    generator = torch.Generator().manual_seed(seed)
    peft_model = get_peft_model(model, LoraConfig(**{"r": 4, "lora_alpha": 6, "task_type": "CAUSAL_LM", **options}))
    with torch.no_grad():
        for name, parameter in peft_model.named_parameters():
            if "magnitude" in name:
                parameter *= 1 + size * torch.rand(parameter.shape, generator=generator)
            elif parameter.requires_grad:
                # A begins at random and B at zero, which would be no change.
                parameter += size * torch.randn(parameter.shape, generator=generator)
    peft_model.save_pretrained(folder)
    return folder


def merged_by_peft(base: Path, adapter: Path, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """The base with the adapter merged into it, by PEFT."""
    from peft import PeftModel

    model = AutoModelForCausalLM.from_pretrained(base, dtype=dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        merged: PreTrainedModel = PeftModel.from_pretrained(model, str(adapter)).merge_and_unload()
    return merged
