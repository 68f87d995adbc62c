"""Ways on from a finished merge: fit the target's weights to the source, train on top, or compare it with trainings."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import gradio as gr

from tmerge.errors import TmergeError
from tmerge.recipe import Recipe
from tmerge.report import is_related
from tmerge.ui.context import QUIET, UNQUEUED, AppContext
from tmerge.ui.parts.cards import note
from tmerge.ui.parts.form import read_yaml, with_value
from tmerge.ui.parts.style import markup
from tmerge.ui.server.further import MOST_STEPS
from tmerge.ui.server.visitor import visitor_of
from tmerge.ui.server.visitor_run import VisitorRun, Way

__all__ = ["build_going_on"]

_OBJECTIVES = [("on the texts, towards the source (distill)", "distill"), ("on the texts alone (sft)", "sft")]
_TRAINS = all(find_spec(name) is not None for name in ("trl", "peft"))


def build_going_on(app: AppContext) -> None:
    """Lay it out under a run's verdict and wire it."""
    reconstruct = gr.Button("Set up a reconstruction", visible=False, elem_id="go-reconstruct", size="md")
    with gr.Row(visible=False, elem_id="go-on", equal_height=True) as row:
        steps = gr.Number(50, label="Steps", precision=0, minimum=1, maximum=MOST_STEPS, min_width=160)
        objective = gr.Dropdown(_OBJECTIVES, value="distill", label="Trained", min_width=200)
        train = gr.Button("Train on top of it", elem_id="go-train", min_width=180, size="md")
        compare = gr.Button("Compare it with trainings", elem_id="go-compare", min_width=180, size="md")
    problem = markup("", elem_id="go-problem")

    def offer(run_id: str) -> dict[Any, Any]:
        run = app.seen(run_id)
        merged = run is not None and run.asks == "merge" and app.with_weights(run_id) is not None
        fits = run is not None and _fits(run)
        return {row: gr.Row(visible=merged and _TRAINS), reconstruct: gr.Button(visible=fits), problem: ""}

    gr.on([app.run_id.change, app.ended.change], offer, app.run_id, [row, reconstruct, problem], **UNQUEUED)

    def proposed(run_id: str) -> dict[Any, Any]:
        """The same pair and texts, fitted: with the defaults of a reconstruction."""
        run = app.seen(run_id)
        if run is None:
            return {app.proposed: gr.skip()}
        return {app.proposed: _fitted(run.recipe), app.tabs: gr.Tabs(selected="choose")}

    reconstruct.click(proposed, app.run_id, [app.proposed, app.tabs], **QUIET)

    def begin(run_id: str, count: Any, way: Way, request: gr.Request) -> dict[Any, Any]:
        try:
            # An emptied field sends nothing.
            started = app.store.go_on(run_id, int(count or 0), way, visitor_of(request))
        except TmergeError as error:
            return {problem: note(str(error), bad=True)}
        return {app.run_id: started, app.tabs: gr.Tabs(selected="run"), problem: ""}

    for button, way in ((train, objective), (compare, gr.State("compare"))):
        button.click(begin, [app.run_id, steps, way], [app.run_id, app.tabs, problem], trigger_mode="once", **QUIET)


def _fitted(recipe: Recipe) -> dict[str, Any]:
    """A task vector's recipe as a reconstruction of the same pair: without what a fit does not read."""
    draft = read_yaml(recipe.to_yaml())
    for key in ("source_base", "sources", "save", "plan"):
        draft.pop(key, None)
    return with_value(draft, "fusion.what", "reconstruct")


def _fits(run: VisitorRun) -> bool:
    """Whether a reconstruction is worth proposing: of two relatives, which were not reconstructed."""
    report = run.report
    if report is None or run.asks != "merge" or run.example is not None:
        return False
    related = report.transport.relatedness
    fitted = report.fusion.fit is not None or bool(report.sources)
    return not fitted and related is not None and is_related(related)
