"""The Look tab: which layers and neurons of two models meet, how much arrived, and whether it helped."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import gradio as gr

from tmerge.comparison.result import Comparison
from tmerge.comparison.tables import ROW_HEADINGS, added_words, row_cells
from tmerge.errors import RunNotFoundError, TmergeError
from tmerge.models import feature_key
from tmerge.plots import Order, Side, kept_layers, pair_place
from tmerge.plots.words import findings
from tmerge.report import training_summary, verdict_tone
from tmerge.ui.context import AppContext
from tmerge.ui.parts.cards import error_card
from tmerge.ui.parts.figure import Reader, figure_box
from tmerge.ui.parts.look_data import Looked, looked_at
from tmerge.ui.parts.look_pictures import FIGURES, Choice, data_of, picture_of, zoomed
from tmerge.ui.parts.safe import render
from tmerge.ui.parts.style import markup

__all__ = ["build_look"]

_SIDES = (("both (effective weight)", "effective"), ("input (pre)", "pre"), ("output (post)", "post"))
_PARTS = (("input (pre)", "pre"), ("output (post)", "post"))
_ORDERS = (("grouped by likeness", "structure"), ("the models' own", "natural"))
_LINES = (("by projection", "projection"), ("by input and output", "feature"))

_FILE = "look.html"
_NOTHING = render(_FILE, "nothing")
_HEAD_STYLE = """
.html-container:has(> &) { padding: 0; }
.tm-verdict { --tone: #6e7781; border: 1px solid var(--border-color-primary); border-left: 8px solid var(--tone);
  border-radius: 6px; padding: 12px 16px; background: var(--background-fill-secondary); color: var(--body-text-color); }
.tm-helps { --tone: #1b7dc2; } .tm-hurts { --tone: #d55e00; }
p { margin: 4px 0; max-width: 110ch; overflow-wrap: anywhere; }
.tm-word { font-size: 1.2rem; font-weight: 700; }
.tm-soft { color: color-mix(in srgb, var(--body-text-color) 74%, transparent); font-size: .875rem; }
"""
_GONE = "this run is gone or not finished; start it again, or open its link"
_TO_MAP = "() => document.getElementById('look-map')?.scrollIntoView({behavior: 'smooth', block: 'nearest'})"

_log = logging.getLogger(__name__)


# What a handler changes: component -> its new value, or an update of it.
_Changes = dict[Any, Any]


@dataclass(frozen=True)
class _Parts:
    """The tab's components; `held` is the `Choice` that its figures were drawn from."""

    nothing: gr.HTML
    body: gr.Column
    head: gr.HTML
    fitted: gr.Column
    compared: gr.Column
    table: gr.HTML
    projection: gr.Radio
    side: gr.Radio
    target: gr.Dropdown
    source: gr.Dropdown
    part: gr.Radio
    order: gr.Radio
    lines: gr.Radio
    held: gr.State
    boxes: Mapping[str, gr.HTML]


def build_look(app: AppContext) -> None:
    """Fill the tab; it follows the run that the page looks at."""
    parts = _laid_out(app)
    choices: list[Any] = [
        parts.projection, parts.side, parts.target, parts.source, parts.part, parts.order, parts.lines,
    ]  # fmt: skip
    shown = [parts.nothing, parts.body, parts.head, parts.fitted, parts.compared, parts.table]
    figures = [parts.held, *choices, *parts.boxes.values()]
    quiet: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}

    def fill(run_id: str) -> _Changes:
        """All of the tab, for the run that is looked at now."""
        try:
            looked = _looked(app, run_id)
        except TmergeError as error:
            there = app.finished(run_id) is not None
            return {
                parts.nothing: gr.HTML(
                    error_card("This run cannot be shown", str(error)) if there else _NOTHING, visible=True
                ),
                parts.body: gr.Column(visible=False),
                parts.held: None,
                **dict.fromkeys(parts.boxes.values(), ""),
            }
        choice = _first_choice(looked, run_id)
        return {
            parts.nothing: gr.HTML(visible=False),
            parts.body: gr.Column(visible=True),
            parts.head: _head(looked),
            parts.fitted: gr.Column(visible=looked.report.fusion.fit is not None),
            parts.compared: gr.Column(visible=looked.comparison is not None),
            parts.table: "" if looked.comparison is None else _table(looked.comparison, run_id),
            parts.projection: gr.Radio(looked.record.projections, value=choice.projection),
            **{getattr(parts, name): getattr(choice, name) for name in ("side", "part", "order", "lines")},
            **_drawn(parts, looked, choice, None),
        }

    for event in (app.run_id.change, app.ended.change):
        event(fill, app.run_id, [*shown, *figures], **quiet)

    def redraw(held: Choice | None, *values: Any) -> _Changes:
        """What the boxes' new values change, whichever of them were changed since the last time."""
        looked, choice = _chosen(app, *values)
        if held is None or (held.projection, held.target) != (choice.projection, choice.target):
            # Another projection or target layer: its own source layers, not one that was asked for with the last.
            choice = _with_kept_source(looked, choice)
        return _drawn(parts, looked, choice, held)

    # One listener for all: of two changes in quick succession, no answer to the first may come after the second's.
    changed = [control.input for control in choices]
    asked = [parts.held, app.run_id, *choices]
    gr.on(changed, redraw, asked, figures, trigger_mode="always_last", **quiet)

    def open_pair(event: gr.EventData, held: Choice | None, *values: Any) -> _Changes:
        """The map of the cell or stream that was clicked, of the side that the coupling shows."""
        run_id, name, shown, _, _, part, *rest = values
        part = part if shown == "effective" else shown
        looked, choice = _chosen(app, run_id, name, shown, event.target_layer, event.source_layer, part, *rest)
        return {parts.part: part, **_drawn(parts, looked, choice, held)}

    for name in ("coupling", "flow"):
        clicked = parts.boxes[name].cell(open_pair, asked, figures, trigger_mode="always_last", **quiet)
        clicked.then(None, None, None, js=_TO_MAP, api_visibility="private")


def _laid_out(app: AppContext) -> _Parts:
    boxes: dict[str, gr.HTML] = {}

    def place(*names: str) -> None:
        """Figures beside each other, where there is room."""
        with gr.Row(equal_height=False):
            for name in names:
                with gr.Column(min_width=320):
                    boxes[name] = figure_box(f"look-{name}", zoom=_reader(app, zoomed), data=_reader(app, data_of))

    nothing = gr.HTML(_NOTHING, elem_id="look-nothing")
    with gr.Column(visible=False, elem_id="look") as body:
        head = gr.HTML(elem_id="look-head", css_template=_HEAD_STYLE, apply_default_css=False)
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
    return _Parts(
        nothing, body, head, fitted, compared, table, projection, side, target, source, part, order, lines,
        gr.State(None), boxes,
    )  # fmt: skip


def _drawn(parts: _Parts, looked: Looked, choice: Choice, held: Choice | None) -> _Changes:
    """The figures that are others than those of the choice they were drawn from, and the lists of layers."""
    drawn = {
        box: picture_of(name, looked, choice)
        for name, box in parts.boxes.items()
        if held is None or FIGURES[name].drawn_from(held) != FIGURES[name].drawn_from(choice)
    }
    return {parts.held: choice, **_pair_boxes(parts, looked, choice), **drawn}


def _looked(app: AppContext, run_id: str) -> Looked:
    """The finished run of an id.

    Raises:
        RunNotFoundError: There is none, or it cannot be read.
    """
    run = app.finished(run_id)
    if run is None:
        raise RunNotFoundError(_GONE)
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

    return answer


def _chosen(app: AppContext, *values: Any) -> tuple[Looked, Choice]:
    """The run, and the boxes' values as a choice: the first layer pair where one of them has none."""
    run_id, name, side, target, source, part, order, lines = values
    try:
        looked = _looked(app, run_id)
    except TmergeError as error:
        raise gr.Error(str(error)) from None
    first = _first_choice(looked, run_id)
    if name not in looked.record.projections:
        name = first.projection
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
    side, order = cast(Side, "effective"), cast(Order, "structure")
    return Choice(run_id, name, side, target, kept[target][0][0], "post", order, "projection")


def _pair_boxes(parts: _Parts, looked: Looked, choice: Choice) -> _Changes:
    """The two lists of layers, the source layers that were kept for this target layer first."""
    kept = kept_layers(looked.record, choice.projection)
    shares = dict(kept[choice.target])
    pairs = set(looked.record.pairs(choice.key))

    def words(layer: int) -> str:
        if layer in shares:
            return f"{layer}: kept, {shares[layer]:.1f} % of what is fused"
        # What q, k and v read is one feature, so its plan is there if one of them kept the pair.
        stored = pair_place(looked.record, choice.key, choice.target, layer) in pairs
        return f"{layer}: kept by another projection" if stored else f"{layer}: not kept, no plan stored"

    others = [layer for layer in _sources(looked, choice.projection, choice.part) if layer not in shares]
    listed = [(words(layer), layer) for layer in (*shares, *others)]
    return {
        parts.target: gr.Dropdown([(str(layer), layer) for layer in kept], value=choice.target),
        parts.source: gr.Dropdown(listed, value=choice.source),
    }


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
