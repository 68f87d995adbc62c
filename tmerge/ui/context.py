"""What the tabs of the app share. Each tab module has one ``build_X(app: AppContext) -> None``, called in its tab."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import gradio as gr

from tmerge.run import Run
from tmerge.ui.server.aside import Aside
from tmerge.ui.server.examples import Examples
from tmerge.ui.server.limits import AppSettings
from tmerge.ui.server.runs import RunStore, VisitorRun

__all__ = ["QUIET", "UNQUEUED", "WAITING", "AppContext", "Kept"]

QUIET: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
"""Options of an event that shows no progress."""

WAITING: dict[str, Any] = {**QUIET, "concurrency_limit": None}
"""Likewise, any number at once: of a function that is awaited, and holds no thread while it waits."""

UNQUEUED: dict[str, Any] = {**QUIET, "queue": False}
"""Likewise, in no queue: for what is there at once, and never in the way of what a visitor waits for."""


@dataclass(frozen=True)
class Kept:
    """What the visitor's browser keeps for its next visit, as `tmerge.ui.parts.returning` reads it.

    Attributes:
        runs: Ids of the runs that it was shown on any of its pages, the last one first, with spaces between them. A
            field, and no BrowserState, which knows nothing of other pages.
        tab: Id of the tab that was open, read as the page begins. A field too: a BrowserState is written by the server.
        repos: A run's id -> the name that was typed for its repo, read as the Push tab is filled.
        removed: Of those runs, how many are not there any more; said once.
    """

    runs: gr.Textbox
    tab: gr.Textbox
    repos: gr.JSON
    removed: gr.HTML


@dataclass(frozen=True)
class AppContext:
    """Handed to every tab.

    Attributes:
        store: All runs; a tab asks it for the one that is looked at.
        settings: What visitors may do.
        aside: Answers small questions (a check, a dataset's columns) in a process of its own.
        run_id: Id of the run that this page looks at, or "". Its ``change`` event tells the tabs of another one, when a
            run is started or opened by its link; nothing but the id is kept per page.
        ended: Counts up when the run that this page looks at has ended; its ``change`` event tells the tabs that
            `finished` may now have an answer.
        tabs: The tabs' container, for a tab that sends its visitor to another one: ``choose``, ``run``, ``look``,
            ``try``, ``push``.
        link: The field of the link of the run that this page looks at, in the Run tab.
        kept: What the browser keeps.
        examples: Recorded runs, which can be looked at as one's own.
        proposed: A recipe's mapping that another tab asks the Choose tab to show.
        page: The whole page; its ``load`` event tells that it opens.
    """

    store: RunStore
    settings: AppSettings
    aside: Aside
    run_id: gr.State
    ended: gr.Number
    tabs: gr.Tabs
    link: gr.Textbox
    kept: Kept
    examples: Examples
    proposed: gr.State
    page: gr.Blocks

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
