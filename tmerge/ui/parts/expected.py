"""What a merge of the chosen pair would be: `tmerge check`, asked in the side process, as cards."""

from __future__ import annotations

import json
import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tmerge.errors import TmergeError
from tmerge.preflight.check import check
from tmerge.preflight.document import CheckDocument
from tmerge.preflight.flavors import with_flavors
from tmerge.recipe import Recipe
from tmerge.ui.context import AppContext
from tmerge.ui.parts.cards import check_cards, empty_card, error_card
from tmerge.ui.parts.form import recipe_of
from tmerge.ui.server.limits import UPLOAD_PREFIX, AppSettings, refuse_large, vetted

__all__ = ["check_facts", "expected_cards", "fit_to_run", "refused_here"]

_log = logging.getLogger(__name__)

_KEPT_SECONDS = 120


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


_kept: OrderedDict[str, tuple[float, Here]] = OrderedDict()
_lock = threading.Lock()


def expected_cards(app: AppContext, draft: Mapping[str, Any], upload: str | None) -> str:
    """The check's cards for the form's mapping, or a card that says why there are none."""
    roles = [role for role in ("target", "source") if not draft.get(role)]
    if roles:
        return empty_card("What this merge would be", f"Name a {' and a '.join(roles)} model to see it.")
    try:
        recipe = vetted(_readable(recipe_of(draft)), app.settings)
    except TmergeError:
        # Which one is said at its field.
        return empty_card("What this merge would be", "The recipe has a mistake; mend it to see it.")
    try:
        here = _checked(app, recipe)
    except TmergeError as error:
        return error_card("This cannot be merged yet", str(error))
    except RuntimeError:
        _log.exception("a check failed")
        return error_card("A fault of ours", "the check failed; the server's log has it")
    return check_cards(here.found, here.refused)


def fit_to_run(app: AppContext, recipe: Recipe) -> dict[str, float] | None:
    """Refuse a run that is too large for this app.

    Returns:
        On ZeroGPU, as `tmerge.ui.server.zero.gpu_seconds`.

    Raises:
        TmergeError: Why.
    """
    here = _checked(app, _readable(recipe))
    if here.refused:
        raise TmergeError(here.refused)
    return here.gpu


def check_facts(app: AppContext, recipe: Recipe) -> CheckDocument:
    """What a check of a recipe finds, whether or not this app runs it.

    Raises:
        TmergeError: The two cannot be merged, or not be read.
    """
    return _checked(app, _readable(recipe)).found


def refused_here(app: AppContext, recipe: Recipe) -> str | None:
    """Why this app does not run a recipe that could be merged elsewhere; None where it does.

    Raises:
        TmergeError: It could not be merged anywhere.
    """
    try:
        recipe = vetted(recipe, app.settings)
    except TmergeError as error:
        vetted(recipe, AppSettings(local_root=app.settings.local_root))
        return str(error)
    return _checked(app, _readable(recipe)).refused


def _readable(recipe: Recipe) -> Recipe:
    """The recipe as `check` reads it: it knows no uploads, and asks a dataset for nothing but whether it is samples."""
    if recipe.calibration.dataset and not recipe.calibration.dataset.startswith(UPLOAD_PREFIX):
        return recipe
    calibration = recipe.calibration.model_copy(update={"dataset": "uploaded/texts"})
    return recipe.model_copy(update={"calibration": calibration})


def _checked(app: AppContext, recipe: Recipe) -> Here:
    key = json.dumps(recipe.model_dump(mode="json"), sort_keys=True)
    with _lock:
        if key in _kept and time.monotonic() - _kept[key][0] < _KEPT_SECONDS:
            return _kept[key][1]
    here: Here = app.aside.ask(_check, recipe, app.settings)
    with _lock:
        _kept[key] = (time.monotonic(), here)
        while len(_kept) > 100:
            _kept.popitem(last=False)
    return here


def _check(recipe: Recipe, settings: AppSettings) -> Here:
    """In the side process."""
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
