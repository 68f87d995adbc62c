"""How a loaded model's attention divides into heads, with its rotary frequencies, as JSON values that outlive it."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from tmerge.models.projections import Architecture

__all__ = ["head_facts"]

_FREQUENCIES = "inv_freq"


def head_facts(model: nn.Module, architecture: Architecture) -> dict[str, dict[str, Any]]:
    """The heads of every layer with plain attention.

    Args:
        model: The model, loaded: frequencies are read from its buffers.
        architecture: Of that very model.

    Returns:
        Layer (as text) -> ``heads``, ``kv_heads``, ``head_dim``, ``pairs`` (the two dimensions of a head that rotate
        together, in the order of their frequencies) and ``frequencies`` (radians a position), or None where they are
        not found. Where tmerge does not know what a model rotates, every dimension counts as tied to its place.
    """
    tables = {
        name.rpartition(".")[2]: buffer.detach().cpu().double()
        for name, buffer in model.named_buffers()
        if name.endswith(_FREQUENCIES) and "original" not in name and buffer.device.type != "meta"
    }
    kinds = getattr(model.config, "layer_types", None) or ()
    facts = {}
    for layer, heads in enumerate(architecture.attention):
        if heads is None:
            continue
        rotated = heads.head_dim if heads.rotary_dim is None else heads.rotary_dim
        kind = kinds[layer] if layer < len(kinds) else ""
        # One table for all layers, or one for each kind of layer (gemma3).
        table = tables.get(f"{kind}_{_FREQUENCIES}", tables.get(_FREQUENCIES))
        half = rotated // 2
        neighbours = heads.rotary_pairs == "neighbours"
        pairs = [[2 * pair, 2 * pair + 1] if neighbours else [pair, pair + half] for pair in range(half)]
        known = table is not None and len(table) == half and bool((table > 0).all())
        facts[str(layer)] = {
            "heads": heads.heads,
            "kv_heads": heads.kv_heads,
            "head_dim": heads.head_dim,
            "pairs": pairs,
            "frequencies": [float(value) for value in torch.as_tensor(table)] if known and table is not None else None,
        }
    return facts
