"""What models take in memory and on the disk, in a run."""

from __future__ import annotations

import torch

from tmerge.fusion import COLUMN_PROJECTIONS, neuron_count
from tmerge.models import Architecture, ModelFacts, fits, trusts
from tmerge.models.blocks import STREAM_BYTES
from tmerge.recipe import Recipe

__all__ = ["carried_bytes", "fit_together", "held_bytes", "itemsize", "kept_bytes", "read_bytes", "unpacked_bytes"]


def itemsize(facts: ModelFacts, recipe: Recipe, dtype: torch.dtype) -> int:
    """Bytes that a model's values are held in: with dtype auto those that they are stored in, if these are more."""
    if recipe.dtype != "auto" or facts.reference.kind == "gguf":
        return dtype.itemsize
    return max(dtype.itemsize, 4 if facts.weight_bytes > 3 * facts.parameters else 2)


def held_bytes(facts: ModelFacts, recipe: Recipe, dtype: torch.dtype) -> int:
    """Of a model that is all in memory."""
    return facts.parameters * itemsize(facts, recipe, dtype)


def fit_together(memory: str, both: int, device: torch.device) -> bool:
    """Whether target and source are to be in memory beside each other.

    Args:
        memory: As the recipe says it.
        both: Bytes of the two.
        device: Where.
    """
    return fits(both, device) if memory == "auto" else memory == "resident"


def unpacked_bytes(facts: ModelFacts) -> int:
    """Of a GGUF file's weights in float32, which they are unpacked in before they take the asked dtype."""
    return 4 * facts.parameters if facts.reference.kind == "gguf" else 0


def read_bytes(
    facts: ModelFacts,
    layout: Architecture,
    recipe: Recipe,
    dtype: torch.dtype,
    device: torch.device,
    streamed: int,
    beside: int = 0,
) -> int:
    """Of a model that is only read: all of it, or, as `Model.open` decides, its blocks one after the other.

    Args:
        facts: The model.
        layout: Its projections.
        recipe: Says how it is read.
        dtype: That it is computed in.
        device: Where.
        streamed: Bytes of the residual stream of all texts that it reads.
        beside: Bytes of a model that is in memory at the time.
    """
    whole = held_bytes(facts, recipe, dtype)
    own_code = trusts(recipe.trust_remote_code, facts.reference.text)
    if recipe.memory == "resident" or own_code or (recipe.memory == "auto" and fits(whole, device, beside)):
        return whole + unpacked_bytes(facts)
    head = layout.hidden_size * int(facts.config.get_text_config().vocab_size)
    ends = head if getattr(facts.config, "tie_word_embeddings", False) else 2 * head
    block = max(facts.parameters - ends, 0) // max(layout.num_layers, 1)
    # The block at work and the next one, or the last and the head, as they are held; and one of them as it is read.
    held = max(2 * block, block + head) * itemsize(facts, recipe, dtype)
    unpacked = 4 * max(block, head) if facts.reference.kind == "gguf" else 0
    # Models keep the stream as it entered the first block.
    return held + 2 * max(block, head) + unpacked + min(2 * streamed, STREAM_BYTES)


def kept_bytes(recipe: Recipe, layout: Architecture, projections: list[str]) -> int:
    """On the disk, of the weights that are fused from, where they cannot be read from the model's own files."""
    views = layout.projections(projections)
    views += [view for layer in layout.stream for view in layer.values()] if recipe.fusion.carries_stream else []
    modules = {view.module_name: view.module.get_parameter("weight").numel() for view in views}
    return sum(modules.values()) * (4 if recipe.dtype == "float32" else 2)


def carried_bytes(recipe: Recipe, target: ModelFacts, layout: Architecture, projections: list[str]) -> int:
    """What is transported, in float32."""
    values = 0
    for view in layout.projections(projections):
        by_columns = view.name in COLUMN_PROJECTIONS
        neurons, across = (view.in_features, view.out_features) if by_columns else (view.out_features, view.in_features)
        values += neuron_count(getattr(recipe.fusion, "top_k", 1.0), neurons) * across
    if recipe.fusion.carries_stream:
        values += layout.hidden_size * int(target.config.get_text_config().vocab_size)
    return 4 * values
