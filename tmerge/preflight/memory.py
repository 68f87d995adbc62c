"""The most memory that a run takes at once, on this machine or on another."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from tmerge.calibration import batch_limit
from tmerge.evaluation import MOST_KEPT_BYTES
from tmerge.models import Architecture, ModelFacts, multiplies_fast, rows_at_once
from tmerge.preflight.counts import TextCounts
from tmerge.preflight.fitting import fitting_bytes
from tmerge.preflight.holding import (
    Place,
    carried_bytes,
    carrying_bytes,
    comparing_bytes,
    fit_together,
    held_bytes,
    itemsize,
    read_bytes,
    replaced_bytes,
    solving_bytes,
    unpacked_bytes,
)
from tmerge.preflight.joining import joining_bytes
from tmerge.preflight.saved_adapter import factoring_bytes
from tmerge.recipe import Recipe

__all__ = ["computed_dtype", "feature_bytes", "peak_bytes", "widths_of"]

# Freed blocks that the C library keeps for itself; measured on the demo, where the peak was a tenth above the sum.
_ALLOCATOR_SLACK = 1.1


def computed_dtype(facts: ModelFacts, recipe: Recipe, device: torch.device) -> torch.dtype:
    """That a model is computed in on a device."""
    dtype = {"float32": torch.float32, "float16": torch.float16}.get(recipe.dtype, torch.bfloat16)
    slow = not multiplies_fast(dtype, device) or itemsize(facts, recipe, dtype) == 4
    return torch.float32 if recipe.dtype == "auto" and slow else dtype


def widths_of(layout: Architecture, projections: list[str]) -> dict[str, list[int]]:
    """Feature key -> the width in every layer that has it."""
    widths: dict[str, list[int]] = {}
    for tap in layout.taps(projections):
        widths.setdefault(tap.key, []).append(tap.features)
    return widths


def feature_bytes(
    recipe: Recipe,
    models: tuple[ModelFacts, ModelFacts, ModelFacts | None],
    layouts: tuple[Architecture, Architecture],
    projections: list[str],
    counts: TextCounts,
    device: torch.device,
) -> int:
    """Of both models' features: single tokens' are stored as they come, means in float32. Arguments as `peak_bytes`."""
    if recipe.plan is not None:
        return 0
    by_token = recipe.calibration.rows == "tokens"
    pooled = sum(
        sum(map(sum, widths_of(layout, projections).values()))
        * (computed_dtype(facts, recipe, device).itemsize if by_token else 4)
        for facts, layout in zip(models[:2], layouts, strict=True)
        if facts is not None
    )
    return counts.rows * pooled


def peak_bytes(
    recipe: Recipe,
    models: tuple[ModelFacts, ModelFacts, ModelFacts | None],
    layouts: tuple[Architecture, Architecture],
    projections: list[str],
    counts: TextCounts,
    place: Place,
    sources: Sequence[ModelFacts] = (),
) -> int:
    """Bytes that a run takes where it computes, at the most at once, beside what a process takes that does nothing.

    Args:
        recipe: Of the run.
        models: The target, the source, and the source before its fine-tuning, if there is one.
        layouts: The target's projections and the source's.
        projections: That are fused.
        counts: The texts.
        place: Where it runs.
        sources: Several that are carried, which have files of their own.
    """
    target, source, _ = models
    target_layout, source_layout = layouts
    device = place.device
    dtype = computed_dtype(target, recipe, device)
    target_widths, source_widths = widths_of(target_layout, projections), widths_of(source_layout, projections)
    vocabulary = max(int(facts.config.get_text_config().vocab_size) for facts in (target, source))
    rows = min(batch_limit(device, recipe.calibration.batch_tokens), rows_at_once(vocabulary))
    # As they are made; in float32, where they are not made so; and their logarithms of probabilities.
    logits = rows * vocabulary * (dtype.itemsize + 4 + 4 * (dtype.itemsize < 4))
    sizes = [max(target_widths[key]) * max(source_widths[key]) for key in target_widths if key in source_widths]
    largest = max(view.in_features * view.out_features for of in layouts for view in of.projections(projections))
    features = min(feature_bytes(recipe, models, layouts, projections, counts, device), 1 << 30)
    packed = [facts for facts in (*models[1:], *sources) if facts is not None and facts.reference.kind == "gguf"]
    joining = joining_bytes(recipe, target, target_layout, projections)
    tokens = counts.texts * counts.tokens_per_text
    streamed = tokens * source_layout.hidden_size * 4
    carried = carried_bytes(recipe, target, target_layout, projections)
    own = held_bytes(target, recipe, dtype)
    reading_source = read_bytes(source, source_layout, recipe, dtype, place, streamed)
    # Beside the target. A source is there while it is read; the source before its fine-tuning never is,
    # but for a GGUF file, which is unpacked once for the fusion to read.
    beside = {
        "target": unpacked_bytes(target) + logits + features,
        "source": reading_source + logits + features,
        "transport": solving_bytes(recipe, sizes, largest, counts.rows, place) + features,
        "fuse": joining
        + carrying_bytes(recipe, source_layout, projections, sizes, carried // target_layout.num_layers, place),
        "reconstruct": read_bytes(source, source_layout, recipe, dtype, place, streamed, own)
        + fitting_bytes(recipe, layouts, tokens),
        "base": sum(read_bytes(facts, source_layout, recipe, dtype, place, 0) for facts in packed[-1:]),
        # And what leaves the layers that nothing changes.
        "evaluate": joining
        + logits
        + replaced_bytes(recipe, target, target_layout, projections)
        + MOST_KEPT_BYTES * set(target_layout.layers[0]).isdisjoint(projections),
        "save": joining
        + (
            factoring_bytes(target_layout, projections)
            if recipe.save.form == "adapter"
            else comparing_bytes(target, target_layout, recipe, dtype, place) + logits
        ),
    }
    # Where the two do not fit beside each other the target is let go while the source is read and transported.
    together = fit_together(recipe.memory, own + held_bytes(source, recipe, dtype), place)
    away = set() if together else {"source", "transport"}
    if recipe.matches_by_weights and target.reference.kind == "gguf":
        # Its weights are unpacked once, to be matched by.
        away -= {"transport"}
    needed = max(size + (0 if stage in away else own) for stage, size in beside.items())
    return int(_ALLOCATOR_SLACK * needed)
