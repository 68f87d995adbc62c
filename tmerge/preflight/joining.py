"""What several sources add to a run: each is carried and scored, and all are joined whenever they are fused."""

from __future__ import annotations

from tmerge.models import Architecture, ModelFacts
from tmerge.recipe import Recipe, TaskVector

__all__ = ["alone_scorings", "carried_times", "joining_bytes", "joining_passes"]

# How often an item's values are passed over for each source, when it is joined: read, scaled, added; what dare draws by
# lot and divides; what ties looks through for its largest, and compares, once to elect and once to merge. As measured,
# in the time of what passes over a value and does little to it.
_PASSES = {"sum": 3, "dare": 18, "ties": 45}
# Tensors of an item's size that are in memory then, beside the joined one itself; as measured, however many sources.
_HELD = {"sum": 2, "dare": 4, "ties": 7}


def carried_times(recipe: Recipe) -> int:
    """How often everything is carried: once for each source."""
    return max(1, len(recipe.sources))


def alone_scorings(recipe: Recipe) -> int:
    """How many sources are scored alone beside all of them."""
    return len(recipe.sources) if len(recipe.sources) > 1 else 0


def joining_passes(recipe: Recipe) -> int:
    """How often a value is passed over to join it, all sources together; 0 for one source."""
    if not recipe.sources or not isinstance(recipe.fusion, TaskVector):
        return 0
    return _PASSES[recipe.fusion.join] * len(recipe.sources)


def joining_bytes(recipe: Recipe, target: ModelFacts, layout: Architecture, projections: list[str]) -> int:
    """Of what is in memory while the largest item is joined, in float32; it does not grow with the sources."""
    if not recipe.sources or not isinstance(recipe.fusion, TaskVector):
        return 0
    largest = max(view.in_features * view.out_features for view in layout.projections(projections))
    if recipe.fusion.carries_stream:
        largest = max(largest, layout.hidden_size * int(target.config.get_text_config().vocab_size))
    return 4 * largest * (1 + _HELD[recipe.fusion.join])
