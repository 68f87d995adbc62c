"""Whether two models' neurons correspond, asked before a merge of them: both read, their neurons matched twice."""

from __future__ import annotations

from pathlib import Path

from tmerge.models import PROJECTIONS
from tmerge.recipe import Recipe, Shared, TaskVector
from tmerge.report import Relatedness
from tmerge.stages.merge import advance
from tmerge.stages.notes import TransportNote
from tmerge.stages.step import Listener

__all__ = ["measure_relatedness", "relatedness_recipe"]


def measure_relatedness(
    recipe: Recipe, folder: str | Path, *, on_dataset: bool = False, listener: Listener | None = None
) -> Relatedness:
    """Read two models and match all of their projections' neurons on two halves of the texts.

    Args:
        recipe: Of the merge that is thought of; what it would fuse is not asked.
        folder: To work in; what is there is of no use afterwards, but to go on where this was stopped.
        on_dataset: Whether they are matched on the recipe's dataset, whatever a task vector's are matched on.
        listener: As for `tmerge.stages.merge.merge`.

    Raises:
        TmergeError: Likewise.
    """
    asked = relatedness_recipe(recipe, on_dataset=on_dataset)
    note = advance(asked, folder, until="transport", listener=listener)
    assert isinstance(note, TransportNote) and note.relatedness is not None  # asked of a shared structure
    return note.relatedness


def relatedness_recipe(recipe: Recipe, *, on_dataset: bool = False) -> Recipe:
    """The recipe whose stages until its transport say whether two models are related.

    Args:
        recipe: As for `measure_relatedness`.
        on_dataset: Likewise.
    """
    # All projections, read as for a task vector, whatever will be fused: the question is of the models. What the recipe
    # says of the texts itself stays.
    reading = dict(TaskVector.beside["calibration"])
    if on_dataset:
        reading["match_on"] = None
    elif recipe.calibration.match_on is not None:
        reading["match_on"] = recipe.calibration.match_on
    shared = recipe.transport if isinstance(recipe.transport, Shared) else Shared()
    return recipe.model_copy(
        update={
            "plan": None,
            "adapter": None,
            "sources": (),
            "fusion": recipe.fusion.model_copy(update={"projections": PROJECTIONS}),
            "calibration": recipe.calibration.model_copy(update=reading),
            "transport": shared.model_copy(update={"map": "plan"}),
        }
    )
