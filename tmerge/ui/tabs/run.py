"""The Run tab: one run as it goes, come back to by its link, cancelled, or read when it is done."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gradio as gr

from tmerge.errors import TmergeError
from tmerge.ui.context import UNQUEUED, AppContext
from tmerge.ui.parts.cards import error_card, note
from tmerge.ui.parts.going_on import build_going_on
from tmerge.ui.parts.progress import (
    coupling_figure,
    features_begun,
    files_list,
    head,
    head_without_run,
    log_lines,
    result_cards,
    stages,
)
from tmerge.ui.parts.returning import build_links
from tmerge.ui.parts.style import markup
from tmerge.ui.server.downloads import keep_in
from tmerge.ui.server.visitor_run import GONE, VisitorRun

__all__ = ["build_running"]

_EVERY = 1.0
# The map is drawn anew at most so often: the browser has other things to do.
_MAP_EVERY = 2.0
# Words that stay true when all are solved.
_LATEST = "the latest"


@dataclass(frozen=True)
class _Drawn:
    """What a page has drawn: of which run, its version, rows in the map and when, whether over."""

    run: str = ""
    version: int = -1
    rows: int = -1
    when: float = 0.0
    over: bool = False


def build_running(app: AppContext) -> None:
    """Lay the tab out and wire it. Call it inside its `gr.Tab`."""
    drawn = gr.State(_Drawn())
    top = markup(head_without_run(), elem_id="run-head")
    build_links(app)
    with gr.Row(equal_height=False):
        with gr.Column(scale=1, min_width=300):
            steps = markup(stages(None), elem_id="run-stages")
            cancel = gr.Button("Cancel this run", variant="stop", interactive=False, elem_id="cancel")
        with gr.Column(scale=1, min_width=300):
            log = markup(log_lines(None), elem_id="run-log")
    result = markup("", elem_id="run-result")
    build_going_on(app)
    feature = gr.Dropdown(
        [_LATEST],
        value=_LATEST,
        label="Feature of the map",
        info="Which of the two models' activations are compared; a cell is the cost between two layers'",
        elem_id="run-feature",
    )
    picture = gr.Plot(
        coupling_figure(None, None), label="Layer coupling as it is solved", show_label=False, elem_id="run-map"
    )
    files = markup("", elem_id="run-files")
    with gr.Row(visible=False, elem_id="run-keep") as keeping:
        folder = gr.Textbox(
            label="Keep the model in", info="A new folder of yours", max_lines=1, elem_id="keep-folder", scale=3
        )
        keep = gr.Button("Keep the model", elem_id="keep-model", scale=1, min_width=160)
    kept = markup("", elem_id="keep-note")
    clock = gr.Timer(_EVERY, active=False)
    shown = [
        *(top, steps, log, picture, feature, result, files, cancel, keeping, kept, clock),
        *(app.ended, drawn),
    ]

    def of_run(run: VisitorRun, chosen: str, before: _Drawn, ended: int) -> dict[Any, Any]:
        over, version, now = run.over, run.version, time.time()
        same_run = before.run == run.id
        line = head(run, app.store.position(run.id), app.store.wait_seconds(run.id))
        if same_run and before.version == version and (before.over or not over):
            return {top: line}
        rows = len(run.rows)
        # A map that is behind by less than its period is drawn at a later tick, or with the end of the run.
        draws = not same_run or (rows != before.rows and (over or now - before.when >= _MAP_EVERY))
        seen = version if draws or rows == before.rows else -1
        map_rows, map_when = (rows, now) if draws else (before.rows, before.when)
        changes: dict[Any, Any] = {
            top: line,
            steps: stages(run),
            log: log_lines(run),
            cancel: _stop_button(run),
            drawn: _Drawn(run.id, seen, map_rows, map_when, over),
        }
        if draws:
            changes[picture] = coupling_figure(run, None if chosen == _LATEST else chosen)
            changes[feature] = gr.Dropdown(choices=[_LATEST, *features_begun(run)], value=chosen)
        just_over = over and not (same_run and before.over)
        if just_over or not same_run:
            done = run.report is not None
            changes |= {
                result: result_cards(run),
                files: files_list(run, local=not app.settings.public),
                keeping: gr.Row(visible=done and run.example is None and not app.settings.public),
                kept: "",
                clock: gr.Timer(active=not over),
            }
        if just_over:
            changes[app.ended] = ended + 1
        return changes

    def without_run(run_id: str, before: _Drawn, ended: int) -> dict[Any, Any]:
        nothing = _Drawn(run_id, 0, 0, 0.0, True)
        if before == nothing:
            return {drawn: nothing}
        return {
            top: head_without_run(run_id and _why_gone(app, run_id)),
            steps: stages(None),
            log: log_lines(None),
            picture: coupling_figure(None, None),
            feature: gr.Dropdown(choices=[_LATEST], value=_LATEST),
            cancel: gr.Button("Cancel this run", variant="stop", interactive=False),
            keeping: gr.Row(visible=False),
            **dict.fromkeys((result, files, kept), ""),
            clock: gr.Timer(active=False),
            app.ended: ended + 1,
            drawn: nothing,
        }

    def draw(run_id: str, chosen: str, before: _Drawn, ended: int) -> dict[Any, Any]:
        run = app.seen(run_id)
        return without_run(run_id, before, ended) if run is None else of_run(run, chosen, before, ended)

    def anew(run_id: str, ended: int) -> dict[Any, Any]:
        return draw(run_id, _LATEST, _Drawn(), ended)

    # Not through the queue: a page that watches a run holds no place that another visitor needs.
    clock.tick(draw, [app.run_id, feature, drawn, app.ended], shown, trigger_mode="once", **UNQUEUED)
    app.run_id.change(anew, [app.run_id, app.ended], shown, **UNQUEUED)
    feature.input(
        lambda run_id, chosen: coupling_figure(app.seen(run_id), None if chosen == _LATEST else chosen),
        [app.run_id, feature],
        picture,
        **UNQUEUED,
    )

    def stop_or_go_on(run_id: str, ended: int) -> dict[Any, Any]:
        run = app.seen(run_id)
        try:
            if run is not None and run.state == "cancelled":
                app.store.resume(run_id)
            else:
                app.store.cancel(run_id)
        except TmergeError as error:
            return {result: error_card("Not continued", str(error))}
        return anew(run_id, ended)

    cancel.click(stop_or_go_on, [app.run_id, app.ended], shown, trigger_mode="once", **UNQUEUED)
    keep.click(lambda run_id, name: _keep(app, run_id, (name or "").strip()), [app.run_id, folder], kept, **UNQUEUED)


def _why_gone(app: AppContext, run_id: str) -> str:
    why = app.store.why_gone(run_id)
    if why:
        return f"It was removed: {why}."
    return "Runs are kept for some hours after they have last been looked at, and not over a restart of the app."


def _stop_button(run: VisitorRun) -> gr.Button:
    """Of a run that was cancelled it continues it."""
    if run.state == "cancelled":
        return gr.Button("Continue this run", variant="secondary", interactive=True)
    stopping = run.cancelling.is_set() and not run.over
    words = "Stopping" if stopping else "Cancel this run"
    return gr.Button(words, variant="stop", interactive=not run.over and not stopping)


def _keep(app: AppContext, run_id: str, name: str) -> str:
    """On one's own machine: the model in a folder of one's own."""
    run = app.seen(run_id)
    if run is None or app.settings.public or app.with_weights(run_id) is None:
        return note(GONE, bad=True)
    if not name:
        return note("name a folder", bad=True)
    try:
        folder = Path(name).expanduser().resolve()
        keep_in(run, folder)
    except (TmergeError, OSError, ValueError, RuntimeError) as error:
        return note(f"{name} cannot be used: {error}", bad=True)
    return note(f"The model is in {folder}; tmerge push and tmerge evaluate read it there.")
