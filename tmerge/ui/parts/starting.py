"""Starting a run from the Choose tab: with the recipe as it is on the page when Start is pressed.

What a visitor edits is written into the recipe by an event of its own, which takes its time. A Start that is pressed
right after it would find the recipe from before, and so it waits until the editor, the fields and the recipe agree.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import gradio as gr

from tmerge.errors import RecipeError, TmergeError
from tmerge.recipe import Recipe
from tmerge.stages.relatedness import relatedness_recipe
from tmerge.stages.step import stage_names, stages_until
from tmerge.ui.context import QUIET, WAITING, AppContext
from tmerge.ui.parts.expected import check_here
from tmerge.ui.parts.form import read_yaml, recipe_of, section_of, write_yaml
from tmerge.ui.parts.problem import problem
from tmerge.ui.parts.returning import open_again, under_way
from tmerge.ui.parts.texts import upload_name
from tmerge.ui.server.aside import StillAskingError, patiently
from tmerge.ui.server.limits import UPLOAD_PREFIX, TooManyRunsError, vetted
from tmerge.ui.server.visitor import visitor_of

__all__ = ["Holds", "build_start", "ready_recipe"]

# Between two looks at the page, and how long it may stay as it is without agreeing.
_PAUSE = 0.1
_PATIENCE = 10.0
# Where something on it cannot be read, which no event will bring into the recipe.
_PATIENCE_UNREADABLE = 1.0
# For the check: who has pressed Start waits longer for it than a page that shows it.
_PATIENCE_TO_START = 30.0
_DISAGREE = "the recipe and the form do not agree; mend the recipe, and press Start again"


Holds = Callable[[Mapping[str, Any], Any], bool]
"""Whether what a field shows is what the recipe's mapping holds; raises `RecipeError` where it cannot be read."""


class _Waiting(NamedTuple):
    """A Start that waits for the page to agree.

    Attributes:
        look: Counts up; each new one makes the page send itself again.
        seen: The page at the last look.
        since: When it was first seen so, `time.monotonic`.
    """

    look: int
    seen: tuple[Any, ...]
    since: float


def build_start(
    app: AppContext,
    box: gr.HTML,
    good: gr.State,
    upload: gr.State,
    code: gr.Code,
    file: gr.File,
    fields: Sequence[tuple[Any, Holds]],
) -> None:
    """Lay the buttons out and wire them.

    Args:
        app: What the tabs share.
        box: Where what is wrong is said.
        good: The recipe's mapping.
        upload: Path of the uploaded file.
        code: The recipe's editor.
        file: The field of the uploaded file.
        fields: Each with whether a value of it is what a mapping holds.
    """
    other = gr.Button("Open the run that is in the way", visible=False, elem_id="open-other")
    with gr.Row(equal_height=True):
        relate = gr.Button("Ask only whether they are related", size="lg", elem_id="relate", scale=1, min_width=240)
        start = gr.Button("Start the merge", variant="primary", size="lg", elem_id="start", scale=3, min_width=240)
    in_the_way: gr.State = gr.State(None)
    kind: gr.State = gr.State(False)
    waiting: gr.State = gr.State(None)
    agreed: gr.State = gr.State(None)
    holders = [holds for _, holds in fields]

    def pressed(relates: bool) -> dict[Any, Any]:
        quiet = {button: gr.Button(interactive=False) for button in (start, relate)}
        began = {waiting: _Waiting(0, (), time.monotonic()), kind: relates}
        return {**began, box: problem(unread=None), other: gr.Button(visible=False), **quiet}

    def released() -> dict[Any, Any]:
        return {button: gr.Button(interactive=True) for button in (start, relate)}

    async def look(
        before: _Waiting | None, draft: dict[str, Any], uploaded: str | None, text: str, shown: str | None, *values: Any
    ) -> dict[Any, Any]:
        if before is None:
            # Of no component at all, Gradio would ask for one value each.
            return {waiting: gr.skip()}
        patience, said_why = _PATIENCE, problem(_DISAGREE, bad=True, unread=None)
        try:
            if _agree(draft, text, values, holders) and _holds_upload(draft, uploaded, shown):
                return {waiting: None, agreed: (draft, uploaded, time.monotonic()), box: problem()}
        except TmergeError as error:
            patience, said_why = _PATIENCE_UNREADABLE, problem(error, unread=None, seek=True)
        now = (draft, uploaded, text, shown, values)
        since = before.since if now == before.seen else time.monotonic()
        if time.monotonic() - since > patience:
            return {waiting: None, box: said_why, **released()}
        await asyncio.sleep(_PAUSE)
        again = {waiting: _Waiting(before.look + 1, now, since)}
        if before.look == 0:
            return {**again, box: problem("Waiting for the last change to be taken in.", unread=None)}
        return again

    async def begin(found: tuple[Any, ...] | None, relates: bool, runs: Any, request: gr.Request) -> dict[Any, Any]:
        if found is None:
            return {in_the_way: None}
        draft, uploaded, _ = found
        try:
            recipe = ready_recipe(app, draft, uploaded)
        except TmergeError as error:
            return {box: problem(error, seek=True)}
        try:
            # What is read then is another recipe's work, and none of it is lent a GPU.
            asked = relatedness_recipe(recipe) if relates else recipe
            here = await patiently(partial(check_here, app, asked, lent=not relates), seconds=_PATIENCE_TO_START)
            if here.refused:
                raise TmergeError(here.refused)
            file_there = Path(uploaded) if uploaded else None
            names = stages_until(recipe, "transport") if relates else stage_names(recipe)
            expected = {name: here.found.estimate.stages.get(name, 0.0) for name in names}
            words = (recipe, visitor_of(request), file_there, here.gpu, expected)
            # An upload is copied.
            run_id = await asyncio.to_thread(app.store.start, *words, relates=relates)
        except (TmergeError, StillAskingError) as error:
            there = under_way(app, runs) if isinstance(error, TooManyRunsError) else None
            return {box: problem(str(error), bad=True), in_the_way: there, other: gr.Button(visible=there is not None)}
        return {
            app.run_id: run_id,
            app.tabs: gr.Tabs(selected="run"),
            box: problem(),
            in_the_way: None,
            other: gr.Button(visible=False),
        }

    for button, asked in ((start, False), (relate, True)):
        button.click(
            partial(pressed, asked), None, [waiting, kind, box, start, relate, other], trigger_mode="once", **QUIET
        )
    waiting.change(
        look,
        [waiting, good, upload, code, file, *(field for field, _ in fields)],
        [waiting, agreed, box, start, relate],
        **QUIET,
    ).failure(released, None, [start, relate], **QUIET)
    begun = agreed.change(
        begin,
        [agreed, kind, app.runs],
        [app.run_id, app.tabs, box, in_the_way, other],
        **{**WAITING, "show_progress": "minimal", "show_progress_on": start},
    )
    open_again(app, other, in_the_way)
    # Whatever came of it.
    begun.then(released, None, [start, relate], **QUIET)


def ready_recipe(app: AppContext, draft: Mapping[str, Any], upload: str | None) -> Recipe:
    """The recipe of the form's mapping, if it may run here.

    Args:
        app: What the tabs share.
        draft: The form's recipe.
        upload: Path of the uploaded file.

    Raises:
        TmergeError: Why not.
    """
    recipe = recipe_of(draft)
    dataset = recipe.calibration.dataset
    if not dataset:
        raise RecipeError("calibration.dataset is empty; name a Hub dataset, or choose the built-in samples")
    recipe = vetted(recipe, app.settings)
    if dataset.startswith(UPLOAD_PREFIX):
        name = dataset.removeprefix(UPLOAD_PREFIX)
        if not name:
            raise RecipeError("calibration.dataset is empty; upload a file of texts, or choose the built-in samples")
        if upload is None or upload_name(upload) != name:
            raise RecipeError(f"calibration.dataset is {name}, which this page does not have; upload it again")
    return recipe


def _holds_upload(draft: Mapping[str, Any], uploaded: str | None, shown: str | None) -> bool:
    """Whether the file that its field shows is the one that a run would read.

    The paths are compared: a file that was uploaded after another may have the same name, and other contents.

    Raises:
        DatasetError: The field shows what is no file of texts, and no event will take it in.
    """
    dataset = section_of(draft, "calibration").get("dataset")
    if not isinstance(dataset, str) or not dataset.startswith(UPLOAD_PREFIX) or (shown or None) == (uploaded or None):
        return True
    if shown:
        upload_name(shown)
    return False


def _agree(draft: Mapping[str, Any], text: str | None, values: Sequence[Any], holders: Sequence[Holds]) -> bool:
    """Whether neither the editor nor any field holds what the recipe does not.

    Raises:
        RecipeError: One of them cannot be read.
    """
    # As YAML: what equals the default is said or not.
    if write_yaml(read_yaml(text or "")) != write_yaml(draft):
        return False
    return all(holds(draft, value) for holds, value in zip(holders, values, strict=True))
