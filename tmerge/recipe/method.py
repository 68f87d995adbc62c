"""Which form of the method a recipe is run by, where that has changed and no key of the recipe tells.

A form enters the key of the stage that follows it, so that nothing of an earlier form is taken up, and the report, so
that `tmerge reproduce` can say that other weights are to be expected. Who changes what a recipe gives raises the form
of the part that he changed, or adds the part. A form is told of every recipe that goes through its part, also where
nothing changed for its two models, whose configs are not known here: then a stage is done anew, and "may" is said.
"""

from __future__ import annotations

from tmerge.recipe.fusion import Reconstruction
from tmerge.recipe.recipe import Recipe

__all__ = [
    "CARRYING",
    "CARRYING_BESIDE",
    "MATCHING_BY_WEIGHTS",
    "READING_AT_ENDS",
    "RECONSTRUCTING",
    "method_of",
    "scales_carried",
]

CARRYING_BESIDE = 3
"""What a task vector carries beside the projections: norms of q and k too; norms by what they do, not by name."""
MATCHING_BY_WEIGHTS = 4
"""Of neurons; of layers too; of a wide model, by some of its weights; and by embeddings."""

READING_AT_ENDS = 2
"""Where both tokenizers end a token; no longer behind half a character, on which the next token writes on."""

CARRYING = 3
"""But for the paper's letter: as much as a model's own factors (Granite's, Cohere's, Falcon-H1's) make of a weight; and
along one structure not o and down where the source norms what they give and the target does not."""
RECONSTRUCTING = 2
"""Where the source norms q and k and the target does not: what the norms give, no longer what they are given; and as
much as factors behind k and gate make of them."""


def scales_carried(recipe: Recipe) -> bool:
    """Whether weights are carried, and not to the paper's letter."""
    return not isinstance(recipe.fusion, Reconstruction) and recipe.fusion.scale != "literal"


def method_of(recipe: Recipe) -> dict[str, int]:
    """Part of the method, in words -> its form; of the parts that the recipe goes through and that have changed."""
    parts = {
        "reading at tokens' ends": READING_AT_ENDS if recipe.calibration.rows != "texts" else None,
        "matching by weights": MATCHING_BY_WEIGHTS if recipe.matches_by_weights else None,
        "carrying": CARRYING if scales_carried(recipe) else None,
        "reconstructing": RECONSTRUCTING if isinstance(recipe.fusion, Reconstruction) else None,
        "carrying beside the projections": CARRYING_BESIDE if recipe.fusion.carries_stream else None,
    }
    return {name: form for name, form in parts.items() if form is not None}
