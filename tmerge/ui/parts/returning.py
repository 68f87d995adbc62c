"""Coming back: a reload, a sign-in or another visit finds the run, the tab and what was typed.

On a Space the page is in an iframe, whose address is not the visitor's: so the browser keeps what a link would hold. It
keeps ids of runs that it was shown, which are what their links hold too; the server keeps nothing of a visitor.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from typing import Any
from urllib.parse import urlencode

import gradio as gr

from tmerge.quantities import count_words
from tmerge.templates import static_text
from tmerge.ui.context import QUIET, UNQUEUED, AppContext
from tmerge.ui.parts.cards import note
from tmerge.ui.server.visitor_run import VisitorRun

__all__ = ["TABS", "build_links", "open_again", "sign_in_button", "under_way", "wire_returning"]

TABS = ("choose", "run", "look", "try", "push")
"""Ids of the tabs, which are their labels in small letters."""

_MOST_RUNS = 10
# Before the id of a run that the browser is to forget.
_GONE = "!"
_SHOW_RUN = static_text("tmerge.ui", "run_in_url.js")
_SIGN_IN = static_text("tmerge.ui", "sign_in.js")


def sign_in_button(app: AppContext, *, tab: str = "push", name: str = "sign-in") -> gr.LoginButton:
    """Gradio's sign-in, coming back to the run and the tab that it was pressed on.

    Gradio's own script puts the page's address into the sign-in's as it is, which loses all but its first part.

    Args:
        app: What the tabs share.
        tab: To come back to, one of `TABS`.
        name: Of the element.
    """
    button = gr.LoginButton("Sign in with Hugging Face", logout_value="Sign out ({})", elem_id=name)
    (click,) = (event for event in app.page.fns.values() if (button._id, "click") in event.targets)
    click.js = _SIGN_IN.replace("SIGNED_OUT", str(button.value)).replace("THIS_TAB", tab)
    click.inputs = [button, app.link]
    return button


def build_links(app: AppContext) -> None:
    """The link of the run that is looked at, and this browser's other runs; in the Run tab."""
    with gr.Row(visible=False, elem_id="run-links") as row:
        app.link.render()
        mine = gr.Dropdown([], label="Your runs", info="Of this browser, while they are kept", elem_id="your-runs")
    app.removed.render()

    def offer(run_id: str, runs: Any) -> dict[Any, Any]:
        known = _known(app, runs)
        # Gradio asks for a box that holds one of its choices.
        shown = run_id if any(run.id == run_id for run in known) else None
        choices = [(_words(run), run.id) for run in known]
        return {row: gr.Row(visible=bool(run_id or known)), mine: gr.Dropdown(choices=choices, value=shown)}

    gr.on(
        [app.runs.change, app.run_id.change, app.ended.change],
        offer,
        [app.run_id, app.runs],
        [row, mine],
        **UNQUEUED,
    )
    # That a State has changed is not told to a page by what goes past the queue.
    mine.input(lambda chosen: chosen or gr.skip(), mine, app.run_id, **QUIET)


def wire_returning(app: AppContext, tabs: Sequence[gr.Tab]) -> None:
    """Keep where the visitor is, and begin there again; to be called when the tabs are built."""
    app.run_id.change(_link, app.run_id, app.link, **UNQUEUED).then(
        None, app.link, app.link, js=_SHOW_RUN, api_visibility="private"
    )
    for tab in tabs:
        tab.select(None, None, None, js=f"() => window.openTab.keep('{tab.id}')", **UNQUEUED)

    def begin(runs: Any, tab: Any, request: gr.Request) -> dict[Any, Any]:
        query = {key: str(value) for key, value in request.query_params.items()}
        known = [run.id for run in _known(app, runs)]
        # The last one, though it is gone: then that is what is said.
        last_here = (each for each in _ids(runs) if each in known or app.store.why_gone(each))
        run_id = query.get("run", "")[:64] or next(last_here, "")
        last = query.get("tab") or (tab if run_id in known else "run")
        where = {app.tabs: gr.Tabs(selected=last if last in TABS else "run")} if run_id else {}
        return {app.runs: runs, app.run_id: run_id, **where}

    begun = app.page.load(
        begin,
        [app.runs, app.tab],
        [app.runs, app.run_id, app.tabs],
        js="() => [window.keptRuns.all(), window.openTab.last()]",
        **QUIET,
    )
    begun.then(None, None, None, js="() => window.openTab.begin()", api_visibility="private")

    def shown(run_id: str, runs: Any) -> dict[Any, Any]:
        """The run that is shown now is the last one; what is gone is marked, and said unless it is that run."""
        known, seen = [run.id for run in _known(app, runs)], app.seen(run_id)
        gone = [each for each in _ids(runs) if each not in known]
        # A recorded run is found on the first page again.
        if seen is not None and seen.example is None:
            known = [run_id, *(each for each in known if each != run_id)]
        older = [each for each in gone if each != run_id]
        said = {app.removed: note(_removed(app, older))} if older else {}
        return {app.runs: " ".join([*known[:_MOST_RUNS], *(f"{_GONE}{each}" for each in gone)]), **said}

    for after in (app.run_id.change, begun.then):
        after(shown, [app.run_id, app.runs], [app.runs, app.removed], **UNQUEUED).then(
            None, app.runs, app.runs, js="window.keptRuns.keep", api_visibility="private"
        )


def open_again(app: AppContext, button: gr.Button, which: gr.State, *, tab: str = "run") -> None:
    """Have a button open the run of an id, on a tab."""

    def opened(run_id: str) -> dict[Any, Any]:
        return {app.run_id: run_id, app.tabs: gr.Tabs(selected=tab)}

    button.click(opened, which, [app.run_id, app.tabs], **QUIET)


def under_way(app: AppContext, runs: Any) -> str | None:
    """Id of the first of this browser's runs that is not over; None where there is none."""
    return next((run.id for run in _known(app, runs) if not run.over), None)


def _known(app: AppContext, runs: Any) -> list[VisitorRun]:
    """The runs of a browser's list that are there still; what a browser sends is a stranger's."""
    return [run for each in _ids(runs) if (run := app.store.get(each, looks=False)) is not None]


def _ids(runs: Any) -> list[str]:
    return runs.split()[:_MOST_RUNS] if isinstance(runs, str) else []


def _removed(app: AppContext, ids: Sequence[str]) -> str:
    """How many runs are not there any more, and why."""
    why = dict.fromkeys(app.store.why_gone(each) or "none is kept over a restart of the app" for each in ids)
    return f"{count_words(len(ids), 'older run was', 'older runs were')} removed from this server: {'; '.join(why)}."


def _words(run: VisitorRun) -> str:
    recipe = run.recipe
    pair = f"{recipe.source if not recipe.sources else f'{len(recipe.sources)} sources'} \u2192 {recipe.target}"
    return f"{run.asks} of {time.strftime('%H:%M', time.localtime(run.created))}, {run.state}: {pair}"


def _link(run_id: str) -> str:
    """The run's link on a Space, whose page alone a visitor sees; elsewhere the id, of which the page makes one."""
    space = os.environ.get("SPACE_ID")
    return f"https://huggingface.co/spaces/{space}?{urlencode({'run': run_id})}" if space and run_id else run_id
