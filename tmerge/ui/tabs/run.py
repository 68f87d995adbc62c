"""The Run tab: one run as it goes, come back to by its link, cancelled, or read when it is done."""

from __future__ import annotations

import time
from typing import Any

import gradio as gr

from tmerge.ui.context import AppContext
from tmerge.ui.parts.progress import (
    coupling_figure,
    features_begun,
    files_list,
    gone_head,
    head,
    log_lines,
    no_run_head,
    result_cards,
    stages,
)
from tmerge.ui.parts.style import markup
from tmerge.ui.server.visitor_run import VisitorRun

__all__ = ["build_running"]

_EVERY = 1.0
# The map is drawn anew at most so often: the browser has other things to do.
_MAP_EVERY = 2.0
# Words that stay true when all are solved.
_LATEST = "the latest"

# What a page has drawn: (run, version of it, rows in the map, when, feature, whether it was over).
_Drawn = tuple[str, int, int, float, str, bool]
_NOTHING: _Drawn = ("", -1, -1, 0.0, _LATEST, False)


def build_running(app: AppContext) -> None:
    """Lay the tab out and wire it. Call it inside its `gr.Tab`."""
    drawn = gr.State(_NOTHING)
    top = markup(no_run_head(), elem_id="run-head")
    with gr.Row(equal_height=False):
        with gr.Column(scale=1, min_width=300):
            steps = markup(stages(None), elem_id="run-stages")
            cancel = gr.Button("Cancel this run", variant="stop", interactive=False, elem_id="cancel")
        with gr.Column(scale=1, min_width=300):
            log = markup(log_lines(None), elem_id="run-log")
    result = markup("", elem_id="run-result")
    with gr.Row(visible=False) as downloads:
        report = gr.DownloadButton("Download report.json", elem_id="get-report", size="sm")
        recipe = gr.DownloadButton("Download recipe.yaml", elem_id="get-recipe", size="sm")
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
    clock = gr.Timer(_EVERY, active=False)

    shown = [
        top,
        steps,
        log,
        picture,
        feature,
        result,
        files,
        cancel,
        downloads,
        report,
        recipe,
        clock,
        app.ended,
        drawn,
    ]

    def draw(run_id: str, chosen: str, before: _Drawn, ended: int) -> list[Any]:
        run = app.seen(run_id)
        if run is None:
            return _without_run(run_id, before, ended)
        return _with_run(app, run, chosen, before, ended)

    def anew(run_id: str, chosen: str, ended: int) -> list[Any]:
        return draw(run_id, _LATEST, _NOTHING, ended)

    # Not through the queue: a page that watches a run holds no place that another visitor needs.
    options: dict[str, Any] = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}
    clock.tick(draw, [app.run_id, feature, drawn, app.ended], shown, trigger_mode="once", **options)
    app.run_id.change(anew, [app.run_id, feature, app.ended], shown, **options)
    feature.input(
        lambda run_id, chosen: coupling_figure(app.seen(run_id), None if chosen == _LATEST else chosen),
        [app.run_id, feature],
        picture,
        **options,
    )

    def stop(run_id: str) -> Any:
        app.store.cancel(run_id)
        return gr.Button("Stopping", interactive=False)

    cancel.click(stop, app.run_id, cancel, **options)


def _with_run(app: AppContext, run: VisitorRun, chosen: str, before: _Drawn, ended: int) -> list[Any]:
    seen_id, seen_version, seen_rows, map_drawn, map_feature, was_over = before
    over, version, now = run.over, run.version, time.time()
    same_run = seen_id == run.id
    top = head(run, app.store.position(run.id))
    if same_run and seen_version == version and (was_over or not over):
        return [top, *(gr.skip() for _ in range(13))]
    rows = len(run.rows)
    # A map that is behind by less than its period is drawn at a later tick, or with the end of the run.
    draw_map = not same_run or (rows != seen_rows and (over or now - map_drawn >= _MAP_EVERY))
    drawn: _Drawn = (
        run.id,
        version if draw_map or rows == seen_rows else -1,
        rows if draw_map else seen_rows,
        now if draw_map else map_drawn,
        chosen,
        over,
    )
    just_over = over and not (same_run and was_over)
    done = run.state == "done"
    stopping = run.cancelling.is_set() and not over
    work = run.folder / "tmerge"
    return [
        top,
        stages(run),
        log_lines(run),
        coupling_figure(run, None if chosen == _LATEST else chosen) if draw_map else gr.skip(),
        gr.Dropdown(choices=[_LATEST, *features_begun(run)], value=chosen) if draw_map else gr.skip(),
        result_cards(run) if just_over or not same_run else gr.skip(),
        files_list(run) if just_over or not same_run else gr.skip(),
        gr.Button("Stopping" if stopping else "Cancel this run", interactive=not over and not stopping),
        gr.Row(visible=done) if just_over or not same_run else gr.skip(),
        gr.DownloadButton(value=str(work / "report.json")) if done and just_over else gr.skip(),
        gr.DownloadButton(value=str(work / "recipe.yaml")) if done and just_over else gr.skip(),
        gr.Timer(active=not over) if just_over or not same_run else gr.skip(),
        ended + 1 if just_over else gr.skip(),
        drawn,
    ]


def _without_run(run_id: str, before: _Drawn, ended: int) -> list[Any]:
    if before[0] == run_id and before[1] == 0:
        return [gr.skip() for _ in range(14)]
    return [
        gone_head() if run_id else no_run_head(),
        stages(None),
        log_lines(None),
        coupling_figure(None, None),
        gr.Dropdown(choices=[_LATEST], value=_LATEST),
        "",
        "",
        gr.Button("Cancel this run", interactive=False),
        gr.Row(visible=False),
        gr.skip(),
        gr.skip(),
        gr.Timer(active=False),
        ended + 1,
        (run_id, 0, 0, 0.0, _LATEST, True),
    ]
