"""The pictures of the Look tab, each from a finished run and what its visitor has chosen, and the data behind them."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

import plotly.graph_objects as go
import pydantic
from pydantic import TypeAdapter

from tmerge.comparison.result import Comparison
from tmerge.models import feature_key
from tmerge.plots import (
    Entries,
    Order,
    Side,
    feature_name,
    fit_errors,
    kept_layers,
    layer_coupling,
    layer_flow,
    map_figure,
    neurons_figure,
    neurons_view,
    norm_ratios,
    pair_place,
    plan_view,
    scores,
    stretch,
    top_mass,
)
from tmerge.plots import data as tables
from tmerge.plots.comparison import alpha_sweep, descent_bars, losses, rows_figure
from tmerge.plots.style import percent
from tmerge.plots.words import CAPTIONS
from tmerge.quantities import count_words
from tmerge.report import Report
from tmerge.ui.parts.figure import figure_message, figure_value
from tmerge.ui.parts.look_data import Looked, entries_of, orders_of

__all__ = ["FIGURES", "Choice", "data_of", "picture_of", "zoomed"]

# Makes a figure box's value of a figure and its caption, and of its ``cells`` or ``view`` (`figure_value`).
_Show = Callable[..., str]


@pydantic.dataclasses.dataclass(frozen=True)
class Choice:
    """What a visitor looks at.

    Attributes:
        run: The run's id.
        projection: One of the fused ones.
        side: Of the layer coupling.
        target: Target layer of the feature map.
        source: Source layer of it.
        part: Side of it.
        order: Of its neurons.
        lines: Of the mass curves.
    """

    run: str
    projection: str
    side: Side
    target: int
    source: int
    part: Literal["pre", "post"]
    order: Order
    lines: Literal["projection", "feature"]

    @property
    def key(self) -> str:
        """Feature of the map."""
        return feature_key(self.projection, self.part)


_CHOICE = TypeAdapter(Choice)


def _choice_of(ref: Mapping[str, Any], looked: Looked) -> Choice:
    """What the browser sent back of a figure's ref; ValueError where it is not one of ours."""
    choice = _CHOICE.validate_python(dict(ref))
    if choice.projection not in looked.record.projections:
        raise ValueError("no such figure")
    return choice


def picture_of(name: str, looked: Looked, choice: Choice) -> str:
    """A figure box's value, by the figure's name, one of `FIGURES`; empty where the run has none."""

    def show(figure: go.Figure, caption: str, **more: Any) -> str:
        return figure_value(figure, _file(name, choice), caption, {"figure": name, **asdict(choice)}, **more)

    return FIGURES[name].draw(looked, choice, show)


def zoomed(looked: Looked, ref: Mapping[str, Any]) -> dict[str, Any]:
    """The view of a map between the ends ``x`` and ``y`` of its axes; ValueError where there is none."""
    choice = _choice_of(ref, looked)
    (left, right), (top, bottom) = ref["x"], ref["y"]
    if ref["figure"] == "neurons":
        whole = neurons_view(looked.record, choice.projection, size=1)
        return neurons_view(looked.record, choice.projection, stretch(left, right, int(whole.x[-1]))).to_dict()
    entries, pair = _entries(looked, choice)
    if ref["figure"] != "map" or entries is None or pair is None:
        raise ValueError("no such map")
    n, m = entries.shape
    orders = orders_of(looked.folder, choice.key, *pair, choice.order)
    return plan_view(entries, orders, stretch(top, bottom, n), stretch(left, right, m)).to_dict()


def data_of(looked: Looked, ref: Mapping[str, Any]) -> dict[str, str]:
    """A figure's numbers: ``file``, a name without ending, and ``text``, CSV; ValueError or KeyError where none is."""
    choice, name = _choice_of(ref, looked), str(ref["figure"])
    text = FIGURES[name].data(looked, choice)
    if text is None:
        raise ValueError("that run has no such figure")
    return {"file": _file(name, choice), "text": text}


def _coupling(looked: Looked, choice: Choice, show: _Show) -> str:
    figure = layer_coupling(looked.record, choice.projection, choice.side)
    heat = figure.data[0]
    cells = {"rows": [int(layer) for layer in heat.y], "columns": [int(layer) for layer in heat.x]}
    return show(figure, f"{CAPTIONS['coupling']} Click a cell for its neurons.", cells=cells)


def _flow(looked: Looked, choice: Choice, show: _Show) -> str:
    record = looked.record
    places = record.tensors[f"layers.source.{feature_key(choice.projection, 'post')}"].tolist()
    # As the streams are drawn: by target layer, and within one by source layer.
    links = [
        [layer, source]
        for layer, sources in kept_layers(record, choice.projection).items()
        for source in sorted((source for source, _ in sources), key=places.index)
    ]
    caption = f"{CAPTIONS['flow']} Click a stream for its neurons."
    return show(layer_flow(record, choice.projection), caption, cells={"links": links})


def _map(looked: Looked, choice: Choice, show: _Show) -> str:
    entries, pair = _entries(looked, choice)
    title = f"{feature_name(choice.key).capitalize()}: target layer {choice.target} and source layer {choice.source}"
    if entries is None or pair is None:
        return figure_message(title, _not_stored(looked, choice))
    n, m = entries.shape
    view = plan_view(entries, orders_of(looked.folder, choice.key, *pair, choice.order))
    subtitle = f"{n:,} by {m:,} neurons; the stored entries hold {percent(float(entries.mass.sum()))} of the plan"
    figure = map_figure(choice.order, entries.shape, title, subtitle)
    caption = f"{CAPTIONS['plan'].rsplit(' Drawn is', 1)[0]} Drag over a part of it to see that part closer."
    return show(figure, caption, view={"kind": "density", "shape": [n, m], "view": view.to_dict()})


def _mass(looked: Looked, choice: Choice, show: _Show) -> str:
    if choice.lines == "feature":
        return show(top_mass(looked.record), CAPTIONS["mass"])
    return show(top_mass(looked.record, "projection"), CAPTIONS["mass"].rsplit(" Dashed", 1)[0])


def _neurons(looked: Looked, choice: Choice, show: _Show) -> str:
    view = neurons_view(looked.record, choice.projection)
    shown = {"kind": "share", "shape": [len(view.rows), int(view.x[-1])], "view": view.to_dict()}
    return show(neurons_figure(looked.record, choice.projection), CAPTIONS["neurons"], view=shown)


def _descent(looked: Looked, choice: Choice, show: _Show) -> str:
    descent = looked.report.evaluation.descent
    if descent is not None:
        return show(descent_bars(descent), CAPTIONS["descent"])
    return figure_message(
        "Does the merge point where the loss falls?",
        "This run did not measure it, as it takes backward passes: set evaluation.descent to a number of texts, "
        "such as 64, and run the merge again.",
    )


def _plan_data(looked: Looked, choice: Choice) -> str | None:
    entries, _ = _entries(looked, choice)
    return None if entries is None else tables.plan_data(entries)


def _descent_data(looked: Looked, choice: Choice) -> str | None:
    descent = looked.report.evaluation.descent
    return None if descent is None else tables.descent_data(descent)


@dataclass(frozen=True)
class _Figure:
    """One of the tab's figures.

    Attributes:
        draw: Gives its box's value of a run and a choice, by the function that it is handed; empty where it has none.
        data: Its numbers as CSV; None where it has none.
        follows: What of the choice it changes with, besides the run.
    """

    draw: Callable[[Looked, Choice, _Show], str]
    data: Callable[[Looked, Choice], str | None]
    follows: tuple[str, ...] = ()

    def drawn_from(self, choice: Choice) -> tuple[Any, ...]:
        """What of a choice decides it."""
        return tuple(getattr(choice, field) for field in ("run", *self.follows))


def _of_report(
    name: str,
    draw: Callable[[Report], go.Figure],
    data: Callable[[Report], str],
    has: Callable[[Report], bool] = lambda report: True,
) -> _Figure:
    """A figure that a run's report alone decides, where it has it."""
    return _Figure(
        lambda looked, choice, show: show(draw(looked.report), CAPTIONS[name]) if has(looked.report) else "",
        lambda looked, choice: data(looked.report) if has(looked.report) else None,
    )


def _of_comparison(draw: Callable[[Comparison], go.Figure | None], data: Callable[[Comparison], str]) -> _Figure:
    """A figure that a comparison alone decides, where it has it."""

    def drawn(looked: Looked, choice: Choice, show: _Show) -> str:
        figure = None if looked.comparison is None else draw(looked.comparison)
        return "" if figure is None else show(figure, "")

    return _Figure(drawn, lambda looked, choice: None if looked.comparison is None else data(looked.comparison))


FIGURES: Mapping[str, _Figure] = {
    "coupling": _Figure(
        _coupling,
        lambda looked, choice: tables.coupling_data(looked.record, choice.projection, choice.side),
        ("projection", "side"),
    ),
    "flow": _Figure(_flow, lambda looked, choice: tables.flow_data(looked.record, choice.projection), ("projection",)),
    "map": _Figure(_map, _plan_data, ("projection", "target", "source", "part", "order")),
    "mass": _Figure(_mass, lambda looked, choice: tables.mass_data(looked.record), ("lines",)),
    "norms": _of_report("norms", norm_ratios, tables.norms_data),
    "neurons": _Figure(
        _neurons, lambda looked, choice: tables.neurons_data(looked.record, choice.projection), ("projection",)
    ),
    "fit": _of_report("fit", fit_errors, tables.fit_data, lambda report: report.fusion.fit is not None),
    "scores": _of_report("scores", scores, tables.scores_data),
    "descent": _Figure(_descent, _descent_data),
    "ways": _of_comparison(rows_figure, tables.rows_data),
    "sweep": _of_comparison(alpha_sweep, tables.rows_data),
    "losses": _of_comparison(losses, tables.losses_data),
}
"""By their names."""


def _entries(looked: Looked, choice: Choice) -> tuple[Entries | None, tuple[int, int] | None]:
    pair = pair_place(looked.record, choice.key, choice.target, choice.source)
    return (None, None) if pair is None else (entries_of(looked.folder, choice.key, *pair), pair)


def _not_stored(looked: Looked, choice: Choice) -> str:
    """Why there is no map, and which there are."""
    kept = kept_layers(looked.record, choice.projection)
    sources = kept.get(choice.target, [])
    listed = ", ".join(f"{source} ({share:.1f} %)" for source, share in sources)
    return (
        f"The plan of target layer {choice.target} and source layer {choice.source} is not stored: a run keeps the "
        f"plans of the pairs that were fused, {count_words(len(sources), 'source layer')} for each target layer. For "
        f"target layer {choice.target} of projection {choice.projection} these are source layers {listed}. Choose one "
        "of them above, or a dotted cell of the coupling. The layers' coupling itself was computed for all pairs."
    )


def _file(name: str, choice: Choice) -> str:
    parts = ["tmerge", name]
    if name in ("coupling", "flow", "neurons"):
        parts.append(choice.projection)
    if name == "coupling":
        parts.append(choice.side)
    if name == "map":
        parts += [choice.key, f"target-{choice.target}", f"source-{choice.source}"]
    return re.sub(r"[^A-Za-z0-9.-]", "-", "-".join(parts)).replace(".", "-")
