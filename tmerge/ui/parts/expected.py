"""What a merge of the chosen pair would be: `tmerge check`, asked in a side process, as cards."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from tmerge.errors import TmergeError
from tmerge.preflight.check import check
from tmerge.preflight.document import CheckDocument
from tmerge.preflight.flavors import with_flavors
from tmerge.recipe import Recipe
from tmerge.ui.context import AppContext
from tmerge.ui.parts.cards import check_cards, empty_card, error_card
from tmerge.ui.parts.form import recipe_of
from tmerge.ui.server.changes import always
from tmerge.ui.server.faults import FaultError
from tmerge.ui.server.limits import UPLOAD_PREFIX, AppSettings, refuse_large, vetted

__all__ = ["STILL", "check_here", "expected_cards", "refused_here"]

_TITLE = "What this merge would be"
STILL = empty_card(_TITLE, "Still asking: others ask too, or the Hub is slow. It comes by itself.")
"""In the place of the cards while they take longer."""


@dataclass(frozen=True)
class Here:
    """What a check found, and what this app makes of it.

    Attributes:
        found: The check's document.
        refused: Why this app does not run it; None where it does.
        gpu: On ZeroGPU, as `tmerge.ui.server.zero.gpu_seconds`.
    """

    found: CheckDocument
    refused: str | None
    gpu: dict[str, float] | None


def expected_cards(app: AppContext, draft: Mapping[str, Any], wanted: Callable[[], bool] = always) -> str:
    """The check's cards for the form's mapping, or a card that says why there are none.

    Args:
        app: What the tabs share.
        draft: The form's recipe.
        wanted: As for `Aside.ask`.

    Raises:
        StillAskingError: They are not there yet.
        SupersededError: They are not wanted any more.
    """
    roles = [role for role in ("target", "source") if not draft.get(role)]
    if roles:
        return empty_card(_TITLE, f"Name a {' and a '.join(roles)} model to see it.")
    try:
        recipe = vetted(_readable(recipe_of(draft)), app.settings)
    except TmergeError:
        # Which one is said at its field.
        return empty_card(_TITLE, "The recipe has a mistake; mend it to see it.")
    try:
        here = check_here(app, recipe, wanted)
    except TmergeError as error:
        title = "The check failed" if isinstance(error, FaultError) else "This cannot be merged yet"
        return error_card(title, str(error))
    return check_cards(here.found, here.refused)


def check_here(app: AppContext, recipe: Recipe, wanted: Callable[[], bool] = always, *, lent: bool = True) -> Here:
    """What a check of a recipe finds, whether or not this app runs it.

    Args:
        app: What the tabs share.
        recipe: Of the run.
        wanted: As for `Aside.ask`.
        lent: Whether its models read on a GPU that is lent, where the app has such.

    Raises:
        StillAskingError: It is not known yet.
        SupersededError: It is not wanted any more.
        TmergeError: The two cannot be merged, or not be read.
    """
    settings = app.settings if lent else replace(app.settings, zero_gpu=False)
    return app.aside.ask(_check, _readable(recipe), settings, wanted=wanted)


def refused_here(app: AppContext, recipe: Recipe, wanted: Callable[[], bool] = always) -> str | None:
    """Why this app does not run a recipe that could be merged elsewhere; None where it does.

    Args:
        app: What the tabs share.
        recipe: As the form has it.
        wanted: As for `Aside.ask`.

    Raises:
        SupersededError: It is not wanted any more.
        TmergeError: It could not be merged anywhere.
    """
    try:
        recipe = vetted(recipe, app.settings)
    except TmergeError as error:
        vetted(recipe, app.settings.elsewhere)
        return str(error)
    return check_here(app, recipe, wanted).refused


def _readable(recipe: Recipe) -> Recipe:
    """The recipe as `check` reads it: it knows no uploads, and asks a dataset for nothing but whether it is samples."""
    if recipe.calibration.dataset and not recipe.calibration.dataset.startswith(UPLOAD_PREFIX):
        return recipe
    calibration = recipe.calibration.model_copy(update={"dataset": "uploaded/texts"})
    return recipe.model_copy(update={"calibration": calibration})


def _check(recipe: Recipe, settings: AppSettings) -> Here:
    """In a side process."""
    checked = with_flavors(check(recipe), recipe)
    gpu = refused = None
    try:
        if settings.zero_gpu:
            from tmerge.ui.server.zero import as_on_zero

            checked, gpu = as_on_zero(checked, recipe, settings)
        refuse_large(checked, settings)
    except TmergeError as error:
        refused = str(error)
    return Here(checked.document(), refused, gpu)
