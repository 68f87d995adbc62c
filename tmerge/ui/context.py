"""What the tabs of the app share. Each tab module has one ``build_X(app: AppContext) -> None``, called in its tab."""

from __future__ import annotations

from typing import Any

import gradio as gr

from tmerge.run import Run
from tmerge.ui.server.aside import Aside
from tmerge.ui.server.examples import Examples
from tmerge.ui.server.limits import AppSettings
from tmerge.ui.server.runs import RunStore
from tmerge.ui.server.visitor_run import VisitorRun

__all__ = ["QUIET", "UNQUEUED", "WAITING", "AppContext"]

QUIET: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
"""Options of an event that shows no progress."""

WAITING: dict[str, Any] = {**QUIET, "concurrency_limit": None}
"""Likewise, any number at once: of a function that is awaited, and holds no thread while it waits."""

UNQUEUED: dict[str, Any] = {**QUIET, "queue": False}
"""Likewise, in no queue: for what is there at once, and never in the way of what a visitor waits for."""


class AppContext:
    """Handed to every tab, with the components that the tabs share: made before the tabs, which count all within them.

    Args:
        store: All runs; a tab asks it for the one that is looked at.
        settings: What visitors may do.
        page: The whole page, which it is made within; its ``load`` event tells that it opens.

    Attributes:
        aside: Answers small questions (a check, a dataset's columns) in a process of its own.
        examples: Recorded runs, which can be looked at as one's own.
        run_id: Id of the run that this page looks at, or "". Its ``change`` event tells the tabs of another one, when a
            run is started or opened by its link; nothing but the id is kept per page.
        ended: Counts up when the run that this page looks at has ended; its ``change`` event tells the tabs that
            `finished` may now have an answer. A field, and no State: a State's change is not told to a page by what
            goes past the queue.
        tabs: The tabs' container, for a tab that sends its visitor to another one: ``choose``, ``run``, ``look``,
            ``try``, ``push``.
        link: The field of the link of the run that this page looks at, in the Run tab.
        proposed: A recipe's mapping that another tab asks the Choose tab to show.
        runs: Ids of the runs that this browser was shown on any of its pages, the last one first, with spaces between
            them. A field, and no BrowserState, which knows nothing of other pages.
        removed: Of those runs, how many are not there any more; said once, in the Run tab.
        tab: Id of the tab that was open, read as the page begins. A field too: a BrowserState is written by the server.
        repos: A run's id -> the name that was typed for its repo, read as the Push tab is filled.
    """

    def __init__(self, store: RunStore, settings: AppSettings, page: gr.Blocks) -> None:
        self.store, self.settings, self.page = store, settings, page
        self.aside, self.examples = Aside(), Examples()
        self.run_id, self.proposed = gr.State(""), gr.State(None)
        self.ended = gr.Number(0, visible="hidden", label="Runs that have ended", elem_id="run-ended")
        self.runs = gr.Textbox("", visible="hidden", label="Runs of this browser", elem_id="kept-runs")
        self.tab = gr.Textbox("", visible="hidden", label="Tab of this browser")
        self.repos = gr.JSON({}, visible="hidden", label="Repos of this browser")
        self.tabs = gr.Tabs(elem_id="tabs", render=False)
        link: dict[str, Any] = {"label": "Link to this run", "interactive": False, "buttons": ["copy"], "max_lines": 1}
        self.link = gr.Textbox(elem_id="run-link", render=False, **link)
        self.removed = gr.HTML(elem_id="runs-removed", render=False, apply_default_css=False, js_on_load=None)

    def seen(self, run_id: str | None) -> VisitorRun | None:
        """The run of an id, a recorded one too; None where there is none (any more)."""
        return self.examples.get(run_id or "") or self.store.get(run_id or "")

    def finished(self, run_id: str | None) -> Run | None:
        """The folder of a run that is done; None while it runs, and where it failed or is gone."""
        run = self.seen(run_id)
        return Run(run.folder) if run is not None and run.state == "done" and run.report is not None else None

    def with_weights(self, run_id: str | None) -> Run | None:
        """As `finished`, and None of a recorded run, whose model is not there."""
        run = self.seen(run_id)
        return None if run is None or run.example is not None else self.finished(run_id)
