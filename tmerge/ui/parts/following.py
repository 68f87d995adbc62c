"""What follows the recipe, whoever changes it: asked after a pause, of the last change alone, until it is answered."""

from __future__ import annotations

import contextlib
import math
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from functools import partial
from typing import Any

import gradio as gr

from tmerge.ui.context import WAITING, AppContext
from tmerge.ui.server.aside import StillAskingError, patiently
from tmerge.ui.server.changes import Changes, SupersededError

__all__ = ["follow"]

# Of a form that has not changed for so long, what it would be is asked.
_SETTLED_SECONDS = 0.5


def follow(
    app: AppContext,
    events: Sequence[Any],
    answer: Callable[..., dict[Any, Any]],
    state: Sequence[gr.State],
    outputs: Sequence[Any],
    meanwhile: Mapping[Any, Any],
    *,
    shows_progress: bool = False,
) -> None:
    """Answer as the page opens and after each of some events.

    Args:
        app: What the tabs share.
        events: As for ``gr.on``; each has been fired by a change of the state.
        answer: Called with the recipe's mapping, the path of the uploaded file and the keyword ``wanted``, as for
            `Aside.ask`; gives component -> what it shows. It may raise `SupersededError` and `StillAskingError`.
        state: The recipe's mapping, and that path.
        outputs: The components.
        meanwhile: Component -> what it shows while the answer takes longer.
        shows_progress: On the outputs.
    """
    changes = Changes(_SETTLED_SECONDS)

    def answering(*, at_once: bool) -> Callable[..., AsyncIterator[dict[Any, Any]]]:
        async def answered(
            draft: dict[str, Any], uploaded: str | None, request: gr.Request
        ) -> AsyncIterator[dict[Any, Any]]:
            change, shown = changes.begin(request.session_hash), gr.skip()
            ask = partial(answer, draft, uploaded, wanted=change.is_last)
            with contextlib.suppress(SupersededError):
                if at_once or await change.settled():
                    try:
                        shown = await patiently(ask, change.is_last)
                    except StillAskingError:
                        yield dict(meanwhile) or gr.skip()
                        shown = await patiently(ask, change.is_last, math.inf)
            yield shown if change.is_last() else gr.skip()

        return answered

    app.page.load(answering(at_once=True), state, list(outputs), **WAITING)
    said = {"show_progress": "minimal", "show_progress_on": list(outputs)} if shows_progress else {}
    gr.on(events, answering(at_once=False), state, list(outputs), trigger_mode="multiple", **{**WAITING, **said})
