"""What models take in memory and on the disk, in a run."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from tmerge.fusion import COLUMN_PROJECTIONS, neuron_count
from tmerge.models import Architecture, ModelFacts, fits, trusts
from tmerge.models.blocks import STREAM_BYTES
from tmerge.recipe import Recipe, Shared
from tmerge.transport import working_dtype

__all__ = [
    "Place",
    "carried_bytes",
    "carrying_bytes",
    "comparing_bytes",
    "fit_together",
    "held_bytes",
    "itemsize",
    "kept_bytes",
    "read_bytes",
    "replaced_bytes",
    "solving_bytes",
    "unpacked_bytes",
]


@dataclass(frozen=True)
class Place:
    """Where a run computes.

    Attributes:
        device: A kind of device, which need not be on this machine where `free` is given.
        free: Bytes that can be taken there; None asks this machine.
        threads: That work beside each other; None takes as many as torch has here.
    """

    device: torch.device
    free: int | None = None
    threads: int | None = None

    def fits(self, needed: int, beside: int = 0) -> bool:
        """Whether a model leaves room for what is computed with it; as `tmerge.models.fits`."""
        return fits(needed, self.device, beside, self.free)

    @property
    def workers(self) -> int:
        """Threads; an accelerator is not shared."""
        return (self.threads or torch.get_num_threads()) if self.device.type == "cpu" else 1


def itemsize(facts: ModelFacts, recipe: Recipe, dtype: torch.dtype) -> int:
    """Bytes that a model's values are held in: with dtype auto those that they are stored in, if these are more."""
    if recipe.dtype != "auto" or facts.reference.kind == "gguf":
        return dtype.itemsize
    return max(dtype.itemsize, 4 if facts.weight_bytes > 3 * facts.parameters else 2)


def held_bytes(facts: ModelFacts, recipe: Recipe, dtype: torch.dtype) -> int:
    """Of a model that is all in memory."""
    return facts.parameters * itemsize(facts, recipe, dtype)


def fit_together(memory: str, both: int, place: Place) -> bool:
    """Whether target and source are to be in memory beside each other.

    Args:
        memory: As the recipe says it.
        both: Bytes of the two.
        place: Where.
    """
    return place.fits(both) if memory == "auto" else memory == "resident"


def unpacked_bytes(facts: ModelFacts) -> int:
    """Of a GGUF file's weights in float32, which they are unpacked in before they take the asked dtype."""
    return 4 * facts.parameters if facts.reference.kind == "gguf" else 0


def read_bytes(
    facts: ModelFacts,
    layout: Architecture,
    recipe: Recipe,
    dtype: torch.dtype,
    place: Place,
    streamed: int,
    beside: int = 0,
) -> int:
    """Of a model that is only read: all of it, or, as `Model.open` decides, its blocks one after the other.

    Args:
        facts: The model.
        layout: Its projections.
        recipe: Says how it is read.
        dtype: That it is computed in.
        place: Where.
        streamed: Bytes of the residual stream of all texts that it reads.
        beside: Bytes of a model that is in memory at the time.
    """
    whole = held_bytes(facts, recipe, dtype)
    own_code = trusts(recipe.trust_remote_code, facts.reference.text)
    if recipe.memory == "resident" or own_code or (recipe.memory == "auto" and place.fits(whole, beside)):
        return whole + unpacked_bytes(facts)
    head = layout.hidden_size * int(facts.config.get_text_config().vocab_size)
    ends = head if getattr(facts.config, "tie_word_embeddings", False) else 2 * head
    block = max(facts.parameters - ends, 0) // max(layout.num_layers, 1)
    # The block at work and the next one, or the last and the head, as they are held; and one of them as it is read.
    held = max(2 * block, block + head) * itemsize(facts, recipe, dtype)
    unpacked = 4 * max(block, head) if facts.reference.kind == "gguf" else 0
    # Models keep the stream as it entered the first block.
    return held + 2 * max(block, head) + unpacked + min(2 * streamed, STREAM_BYTES)


def solving_bytes(recipe: Recipe, sizes: list[int], weights: int, rows: int, place: Place) -> int:
    """Of the transport stage.

    Args:
        recipe: Says which problems there are.
        sizes: Entries of the widest problem of each feature.
        weights: Of either model's largest projection.
        rows: Of the features.
        place: Where.
    """
    if isinstance(recipe.transport, Shared):
        # In float32: the source's as read, its matched columns and they in order; or these and the target's twice.
        compared = 4 * 4 * weights if recipe.matches_by_weights else 0
        # Two similarities of the widest feature, and what its matching copies; the stream's sum and one more.
        similar = 4 * (3 * max(sizes) + 2 * sorted(sizes)[-2:][0]) + 16 * rows * math.isqrt(4 * max(sizes))
        return similar + compared
    # A cost and a kernel a worker, and what starts and sums take beside them.
    return 3 * max(sizes) * working_dtype(recipe.transport.epsilon).itemsize * place.workers


def carrying_bytes(
    recipe: Recipe, source: Architecture, projections: list[str], sizes: list[int], layer: int, place: Place
) -> int:
    """Of the fuse stage: each worker's maps of a target layer, and the source's weights that meet them.

    Args:
        recipe: Of the run.
        source: The source's projections.
        projections: That are fused.
        sizes: Entries of the widest problem of each feature.
        layer: Bytes of what is carried to a target layer.
        place: Where.
    """
    widest = max(view.in_features * view.out_features for view in source.projections(projections))
    # In float32: the weight, its base's and what lies between; what becomes of a layer, and of the one before.
    worker = 4 * 3 * widest + 2 * layer
    if not isinstance(recipe.transport, Shared):
        # Plans, and what leads through them out and in.
        worker += 8 * sum(sizes) * min(recipe.transport.layers_kept, source.num_layers)
    return worker * place.workers


def replaced_bytes(recipe: Recipe, target: ModelFacts, layout: Architecture, projections: list[str]) -> int:
    """Of what the target's neurons were while others are in their place: of a GGUF file, which is not read again."""
    if target.reference.kind != "gguf":
        return 0
    return carried_bytes(recipe, target, layout, projections) // 4 * itemsize(target, recipe, torch.float32)


def comparing_bytes(target: ModelFacts, layout: Architecture, recipe: Recipe, dtype: torch.dtype, place: Place) -> int:
    """Of the saved checkpoint beside the model: mapped, whole, or, where that does not fit, by blocks."""
    if place.device.type == "cpu" and target.reference.kind != "gguf" and target.dtype == dtype:
        return 0
    own = held_bytes(target, recipe, dtype)
    plain = recipe.model_copy(update={"memory": "auto"})
    return min(own, read_bytes(target, layout, plain, dtype, place, 0, own))


def kept_bytes(recipe: Recipe, layout: Architecture, projections: list[str]) -> int:
    """On the disk, of the weights that are fused from, where they cannot be read from the model's own files."""
    views = layout.projections(projections)
    if recipe.fusion.carries_stream or recipe.matches_by_weights:
        views += [view for layer in layout.stream for view in layer.values()]
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
