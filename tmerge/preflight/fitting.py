"""What a reconstruction is expected to take, beside what every run does."""

from __future__ import annotations

from tmerge.fusion.block_fit import GROUPS
from tmerge.models import Architecture
from tmerge.recipe import FITTED_CONTROLS, Recipe, Reconstruction

__all__ = ["fitting_bytes", "fitting_operations", "goal_bytes"]


def fitting_operations(recipe: Recipe, layouts: tuple[Architecture, Architecture], texts: int) -> float:
    """Of the passes of both models and the sums of the fits, for each token of a text; 0 where nothing is fitted.

    Args:
        recipe: Of the run.
        layouts: The target's projections and the source's.
        texts: That are fitted on.
    """
    if not isinstance(recipe.fusion, Reconstruction):
        return 0.0
    target, source = layouts
    kept = recipe.fusion.keep_texts if recipe.fusion.keep is not None else 0
    passes = sums = 0
    for layer in target.layers:
        before = 0
        for names in GROUPS:
            views = [layer[name] for name in names if name in layer]
            if not views:
                continue
            # The block is run up to the group; those of a group share the sums over what they read.
            own = sum(view.in_features * view.out_features for view in views)
            passes, before = passes + before, before + own
            sums += views[0].in_features ** 2 + own
        passes += before
    body, other = (sum(view.in_features * view.out_features for view in layout.projections()) for layout in layouts)
    # Texts to be kept are also read once as they are.
    each = 2.0 * ((texts + kept) * (passes + sums) + kept * body + texts * other)
    return each * (1 + sum(name in FITTED_CONTROLS for name in recipe.evaluation.controls))


def fitting_bytes(recipe: Recipe, layouts: tuple[Architecture, Architecture], tokens: int) -> int:
    """Of both models' streams of all texts, and the equations of the widest projection; 0 where nothing is fitted.

    Args:
        recipe: Of the run.
        layouts: The target's projections and the source's.
        tokens: Of the texts that are fitted on.
    """
    if not isinstance(recipe.fusion, Reconstruction):
        return 0
    target, source = layouts
    kept = recipe.fusion.keep_texts * recipe.calibration.max_tokens if recipe.fusion.keep is not None else 0
    # The texts to be kept pass twice: as they are, and as they become.
    # Each as it entered the first block, which models keep, and as it stands.
    streams = 2 * 4 * ((tokens + 2 * kept) * target.hidden_size + tokens * source.hidden_size)
    widest = max(view.in_features * (view.in_features + view.out_features) for view in target.projections())
    # Summed in float32, those of the texts that choose lambda too; solved in float64.
    summed = 2 if recipe.fusion.ridge == "auto" else 1
    return streams + (4 * summed + 3 * 8) * widest


def goal_bytes(recipe: Recipe, target: Architecture, tokens: int) -> int:
    """On the disk, of what the widest block should give on all tokens; 0 where nothing is fitted.

    Args:
        recipe: Of the run.
        target: Its projections.
        tokens: Of the texts that are fitted on.
    """
    if not isinstance(recipe.fusion, Reconstruction):
        return 0
    kept = recipe.fusion.keep_texts * recipe.calibration.max_tokens if recipe.fusion.keep is not None else 0
    widest = max(sum(view.out_features for view in layer.values()) for layer in target.layers)
    return 4 * (tokens + kept) * widest
