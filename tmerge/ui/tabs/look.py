"""The Look tab: which layers and neurons of two models meet, how much arrived, and whether it helped."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import gradio as gr

from tmerge.comparison.result import Comparison
from tmerge.comparison.tables import ROW_HEADINGS, added_words, row_cells
from tmerge.errors import RunNotFoundError, TmergeError
from tmerge.models import feature_key
from tmerge.plots import kept_layers, pair_place
from tmerge.plots.words import findings
from tmerge.report import training_summary, verdict_tone
from tmerge.ui.context import QUIET, AppContext
from tmerge.ui.parts.cards import empty_card, error_card
from tmerge.ui.parts.figure import Reader, figure_box
from tmerge.ui.parts.look_data import Looked, looked_at
from tmerge.ui.parts.look_pictures import FIGURES, Choice, data_of, picture_of, zoomed
from tmerge.ui.parts.safe import render
from tmerge.ui.parts.style import markup
from tmerge.ui.server.visitor_run import GONE

__all__ = ["build_look"]

_SIDES = (("both (effective weight)", "effective"), ("input (pre)", "pre"), ("output (post)", "post"))
_PARTS = (("input (pre)", "pre"), ("output (post)", "post"))
_ORDERS = (("grouped by likeness", "structure"), ("the models' own", "natural"))
_LINES = (("by projection", "projection"), ("by input and output", "feature"))

_FILE = "look.html"
_NOTHING = empty_card(
    "Nothing to look at yet", "When a merge has finished, its layer couplings, feature plans and scores are here."
)
_TO_MAP = "() => document.getElementById('look-map')?.scrollIntoView({behavior: 'smooth', block: 'nearest'})"

_log = logging.getLogger(__name__)


def build_look(app: AppContext) -> None:
    """Fill the tab; it follows the run that the page looks at."""
    boxes: dict[str, gr.HTML] = {}
    readers = [_reader(app, read) for read in (zoomed, data_of)]

    def place(*names: str) -> None:
        """Figures beside each other, where there is room."""
        with gr.Row(equal_height=False):
            for name in names:
                with gr.Column(min_width=320):
                    boxes[name] = figure_box(f"look-{name}", *readers)

    nothing = markup(_NOTHING, elem_id="look-nothing")
    with gr.Column(visible=False, elem_id="look") as body:
        head = markup("", elem_id="look-head")
        with gr.Column(visible=False, elem_id="look-compared") as compared:
            gr.Markdown("## The merge beside trainings")
            table = markup("", elem_id="look-table")
            place("ways", "losses")
            place("sweep")
        gr.Markdown("## Which layers meet")
        with gr.Row():
            projection = gr.Radio([], label="Projection", elem_id="look-projection", min_width=220)
            side = gr.Radio(list(_SIDES), value="effective", label="Side", elem_id="look-side", min_width=220)
        place("coupling", "flow")
        gr.Markdown("## Which neurons meet")
        with gr.Row():
            target = gr.Dropdown([], label="Target layer", elem_id="look-target", min_width=160)
            source = gr.Dropdown([], label="Source layer", elem_id="look-source", scale=2, min_width=220)
            part = gr.Radio(list(_PARTS), value="post", label="Side", elem_id="look-part", scale=2, min_width=220)
            order = gr.Radio(
                list(_ORDERS), value="structure", label="Order of neurons", elem_id="look-order", scale=3, min_width=220
            )
        place("map")
        gr.Markdown("## How concentrated")
        lines = gr.Radio(list(_LINES), value="projection", label="Lines", elem_id="look-lines")
        place("mass")
        gr.Markdown("## How much arrived")
        place("norms", "neurons")
        with gr.Column(visible=False, elem_id="look-fitted") as fitted:
            gr.Markdown("## How well it was fitted")
            place("fit")
        gr.Markdown("## Did it help?")
        place("scores", "descent")
    assert boxes.keys() == FIGURES.keys()
    # The choice that the figures were drawn from.
    held = gr.State(None)
    choices: list[Any] = [projection, side, target, source, part, order, lines]
    figures = [held, *choices, *boxes.values()]

    def drawn(looked: Looked, choice: Choice, before: Choice | None) -> dict[Any, Any]:
        """The figures that are others than those of the choice they were drawn from, and the lists of layers."""
        changed = {
            box: picture_of(name, looked, choice)
            for name, box in boxes.items()
            if before is None or FIGURES[name].drawn_from(before) != FIGURES[name].drawn_from(choice)
        }
        kept = kept_layers(looked.record, choice.projection)
        return {
            held: choice,
            target: gr.Dropdown([(str(layer), layer) for layer in kept], value=choice.target),
            source: gr.Dropdown(_source_layers(looked, choice), value=choice.source),
            **changed,
        }

    def fill(run_id: str) -> dict[Any, Any]:
        """All of the tab, for the run that is looked at now."""
        try:
            looked = _looked(app, run_id)
        except TmergeError as error:
            there = app.finished(run_id) is not None
            why = error_card("This run cannot be shown", str(error)) if there else _NOTHING
            return {
                nothing: gr.HTML(why, visible=True),
                body: gr.Column(visible=False),
                held: None,
                **dict.fromkeys(boxes.values(), ""),
            }
        choice = _first_choice(looked, run_id)
        return {
            nothing: gr.HTML(visible=False),
            body: gr.Column(visible=True),
            head: _head(looked),
            fitted: gr.Column(visible=looked.report.fusion.fit is not None),
            compared: gr.Column(visible=looked.comparison is not None),
            table: "" if looked.comparison is None else _table(looked.comparison, run_id),
            projection: gr.Radio(looked.record.projections, value=choice.projection),
            side: choice.side,
            part: choice.part,
            order: choice.order,
            lines: choice.lines,
            **drawn(looked, choice, None),
        }

    for event in (app.run_id.change, app.ended.change):
        event(fill, app.run_id, [nothing, body, head, fitted, compared, table, *figures], **QUIET)

    def redraw(before: Choice | None, *values: Any) -> dict[Any, Any]:
        """What the boxes' new values change, whichever of them were changed since the last time."""
        looked, choice = _chosen(app, *values)
        if before is None or (before.projection, before.target) != (choice.projection, choice.target):
            # Another projection or target layer: its own source layers, not one that was asked for with the last.
            choice = _with_kept_source(looked, choice)
        return drawn(looked, choice, before)

    # One listener for all: of two changes in quick succession, no answer to the first may come after the second's.
    asked = [held, app.run_id, *choices]
    gr.on([control.input for control in choices], redraw, asked, figures, trigger_mode="always_last", **QUIET)

    def open_pair(event: gr.EventData, before: Choice | None, *values: Any) -> dict[Any, Any]:
        """The map of the cell or stream that was clicked, of the side that the coupling shows."""
        run_id, name, shown, _, _, last, *rest = values
        opened = last if shown == "effective" else shown
        looked, choice = _chosen(app, run_id, name, shown, event.target_layer, event.source_layer, opened, *rest)
        return {part: opened, **drawn(looked, choice, before)}

    for name in ("coupling", "flow"):
        clicked = boxes[name].cell(open_pair, asked, figures, trigger_mode="always_last", **QUIET)
        clicked.then(None, None, None, js=_TO_MAP, api_visibility="private")


def _looked(app: AppContext, run_id: str) -> Looked:
    """The finished run of an id.

    Raises:
        RunNotFoundError: There is none, or it cannot be read.
    """
    run = app.finished(run_id)
    if run is None:
        raise RunNotFoundError(GONE)
    try:
        return looked_at(run.folder)
    except TmergeError as error:
        raise RunNotFoundError(str(error).replace(str(run.folder), "the run")) from None


def _reader(app: AppContext, read: Callable[[Looked, Mapping[str, Any]], dict[str, Any]]) -> Reader:
    """Answers what a browser asks about a figure; what it sends is a stranger's."""

    def answer(ref: Any) -> dict[str, Any]:
        try:
            return read(_looked(app, str(ref["run"])), ref)
        except TmergeError as error:
            return {"fault": str(error)}
        except (TypeError, ValueError, KeyError) as error:
            _log.info("a figure was asked for what it does not have: %r", error)
            return {"fault": "there is no such figure; choose again"}

    answer.__name__ = read.__name__
    return answer


def _chosen(app: AppContext, *values: Any) -> tuple[Looked, Choice]:
    """The run, and the boxes' values as a choice: the first layer pair where one of them has none."""
    run_id, name, side, target, source, part, order, lines = values
    try:
        looked = _looked(app, run_id)
    except TmergeError as error:
        raise gr.Error(str(error)) from None
    if name not in looked.record.projections:
        name = looked.record.projections[0]
    kept = kept_layers(looked.record, name)
    target = int(target) if target is not None and int(target) in kept else next(iter(kept))
    sources = _sources(looked, name, part)
    if source is None or int(source) not in sources:
        source = kept[target][0][0]
    return looked, Choice(run_id, name, side, target, int(source), part, order, lines)


def _first_choice(looked: Looked, run_id: str) -> Choice:
    """The first projection, and the layer pair of it that is fused the most."""
    name = looked.record.projections[0]
    kept = kept_layers(looked.record, name)
    target = max(kept, key=lambda layer: kept[layer][0][1])
    return Choice(run_id, name, "effective", target, kept[target][0][0], "post", "structure", "projection")


def _source_layers(looked: Looked, choice: Choice) -> list[tuple[str, int]]:
    """Words and number of each source layer, those that were kept for this target layer first."""
    shares = dict(kept_layers(looked.record, choice.projection)[choice.target])
    pairs = set(looked.record.pairs(choice.key))

    def words(layer: int) -> str:
        if layer in shares:
            return f"{layer}: kept, {shares[layer]:.1f} % of what is fused"
        # What q, k and v read is one feature, so its plan is there if one of them kept the pair.
        stored = pair_place(looked.record, choice.key, choice.target, layer) in pairs
        return f"{layer}: kept by another projection" if stored else f"{layer}: not kept, no plan stored"

    others = [layer for layer in _sources(looked, choice.projection, choice.part) if layer not in shares]
    return [(words(layer), layer) for layer in (*shares, *others)]


def _with_kept_source(looked: Looked, choice: Choice) -> Choice:
    """The same choice, if its source layer was kept for its target layer, else with the strongest that was."""
    kept = [source for source, _ in kept_layers(looked.record, choice.projection)[choice.target]]
    return choice if choice.source in kept else replace(choice, source=kept[0])


def _sources(looked: Looked, projection: str, part: str) -> list[int]:
    return looked.record.tensors[f"layers.source.{feature_key(projection, part)}"].tolist()


def _head(looked: Looked) -> str:
    """Which models, and the verdict with what it rests on."""
    report = looked.report
    target = _name(report.target.ref)
    source = " and ".join(_name(each.reference) for each in report.sources) or _name(report.source.ref)
    tone, sentences = verdict_tone(report.verdict), findings(report)
    if trained := training_summary(report):
        sentences = [*sentences, f"These are the merge's figures. Trained on top of it: {trained}"]
    return render(_FILE, "head", tone=tone, target=target, source=source, sentences=sentences)


def _table(comparison: Comparison, run_id: str) -> str:
    """A comparison's rows, and what the merge adds to each training."""
    rows, added = map(row_cells, comparison.rows), map(added_words, comparison.added)
    return render(
        _FILE, "compared", run=run_id, texts=comparison.texts, headings=ROW_HEADINGS, rows=rows, sentences=added
    )


def _name(reference: str) -> str:
    """A model's name; of a path its last part, as the folders above it are the server's."""
    name = Path(reference)
    return name.name if name.is_absolute() or reference.startswith((".", "~")) else reference
