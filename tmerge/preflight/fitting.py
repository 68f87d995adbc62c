"""What a reconstruction is expected to take, beside what every run does."""

from __future__ import annotations

from dataclasses import dataclass

from tmerge.fusion.block_fit import GROUPS
from tmerge.models import Architecture
from tmerge.recipe import FITTED_CONTROLS, Recipe, Reconstruction

__all__ = ["FittingWork", "fitting_bytes", "fitting_work", "goal_bytes"]


@dataclass(frozen=True)
class FittingWork:
    """Floating-point operations of a reconstruction, for each token of a text and beside them.

    Attributes:
        passes: Of both models' forward passes.
        sums: In float32, of the fits' equations.
        solved: In float64, of solving them; whatever the texts.
    """

    passes: float = 0.0
    sums: float = 0.0
    solved: float = 0.0

    def operations(self, tokens_per_text: int) -> float:
        """All of them, of texts of so many tokens."""
        return tokens_per_text * (self.passes + self.sums) + self.solved


def fitting_work(recipe: Recipe, layouts: tuple[Architecture, Architecture], texts: int) -> FittingWork:
    """What a reconstruction computes; nothing where nothing is fitted.

    Args:
        recipe: Of the run.
        layouts: The target's projections and the source's.
        texts: That are fitted on.
    """
    if not isinstance(recipe.fusion, Reconstruction):
        return FittingWork()
    target, source = layouts
    kept = recipe.fusion.keep_texts if recipe.fusion.keep is not None else 0
    ridges = len(recipe.fusion.tried_ridges)
    passes = sums = 0
    solved = 0.0
    for layer in target.layers:
        before = 0
        for names in GROUPS:
            views = [layer[name] for name in names if name in layer]
            if not views:
                continue
            # The block is run up to the group; those of a group share the sums over what they read.
            inputs, outputs = views[0].in_features, sum(view.out_features for view in views)
            passes, before = passes + before, before + inputs * outputs
            sums += inputs**2 + inputs * outputs
            # A Cholesky factor for each lambda, and what it makes of the other side; and what is lacking before.
            solved += ridges * (inputs**3 / 3 + 2 * inputs**2 * outputs) + 2 * inputs**2 * outputs
        passes += before
    body, other = (sum(view.in_features * view.out_features for view in layout.projections()) for layout in layouts)
    fits = 1 + sum(name in FITTED_CONTROLS for name in recipe.evaluation.controls)
    # Texts to be kept are also read once as they are.
    read = (texts + kept) * passes + kept * body + texts * other
    return FittingWork(fits * 2.0 * read, fits * 2.0 * (texts + kept) * sums, fits * solved)


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
