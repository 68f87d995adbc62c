"""What follows the recipe, whoever changes it: asked after a pause, of the last change alone, until it is answered."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import gradio as gr

from tmerge.ui.context import WAITING, AppContext
from tmerge.ui.server.aside import AGAIN_SECONDS, StillAskingError, patiently
from tmerge.ui.server.changes import Change, Changes, SupersededError

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
        meanwhile: Component -> what it shows while the answer takes longer; then the page asks again.
        shows_progress: On the outputs.
    """
    changes, again = Changes(_SETTLED_SECONDS), gr.Timer(AGAIN_SECONDS, active=False)

    async def answered(change: Change, draft: dict[str, Any], uploaded: str | None) -> dict[Any, Any]:
        try:
            told = await patiently(partial(answer, draft, uploaded, wanted=change.is_last), change.is_last)
            shown = {**told, again: gr.Timer(active=False)}
        except SupersededError:
            return gr.skip()
        except StillAskingError:
            shown = {**meanwhile, again: gr.Timer(active=True)}
        return shown if change.is_last() else gr.skip()

    async def at_once(draft: dict[str, Any], uploaded: str | None, request: gr.Request) -> dict[Any, Any]:
        return await answered(changes.begin(request.session_hash), draft, uploaded)

    async def settled(draft: dict[str, Any], uploaded: str | None, request: gr.Request) -> dict[Any, Any]:
        change = changes.begin(request.session_hash)
        return await answered(change, draft, uploaded) if await change.settled() else gr.skip()

    async def asked_again(draft: dict[str, Any], uploaded: str | None, request: gr.Request) -> dict[Any, Any]:
        return await answered(changes.last(request.session_hash), draft, uploaded)

    shown = [*outputs, again]
    app.load(at_once, state, shown, **WAITING)
    said = {"show_progress": "minimal", "show_progress_on": list(outputs)} if shows_progress else {}
    gr.on(events, settled, state, shown, trigger_mode="multiple", **{**WAITING, **said})
    again.tick(asked_again, state, shown, trigger_mode="once", **WAITING)
