"""Maps of more cells than a screen has: pooled to blocks of neurons, any stretch of them again at full resolution.

A map's axes count places in the order that is shown, so a stretch that is zoomed into is what is asked for next, and a
stretch of no more neurons than there are blocks is shown neuron by neuron.
"""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import plotly.graph_objects as go

from tmerge.fusion import neuron_side
from tmerge.models import feature_key
from tmerge.plots.blocks import Entries, Order, window_blocks
from tmerge.plots.heatmaps import log_density
from tmerge.plots.style import COLOUR_SCALE, finish, log_bar, numbers
from tmerge.quantities import count_words
from tmerge.transport import TransportRecord

__all__ = ["MAP_CELLS", "View", "map_figure", "neurons_figure", "neurons_view", "plan_view", "stretch"]

MAP_CELLS = 256
"""Most cells along either side of a map."""

_EMPTY = -99.0


@dataclass(frozen=True)
class View:
    """What a map shows at the moment.

    Attributes:
        z: (a, b) float32: log10 of multiples of the even plan (-99 where no mass is), or shares of neurons.
        y: (a + 1,) where the rows begin and end, in places of the whole map's order.
        x: (b + 1,) likewise for the columns.
        rows: Which neurons or layer each row is, in words.
        columns: Likewise for the columns.
        low: Lower end of the colours.
        high: Upper end.
        words: What a cell is.
    """

    z: np.ndarray
    y: np.ndarray
    x: np.ndarray
    rows: list[str]
    columns: list[str]
    low: float
    high: float
    words: str

    def to_dict(self) -> dict[str, Any]:
        """JSON values; z as base64 of little-endian float32, row by row."""
        return {
            "z": base64.b64encode(self.z.astype("<f4").tobytes()).decode(),
            "y": self.y.tolist(),
            "x": self.x.tolist(),
            "rows": self.rows,
            "columns": self.columns,
            "low": round(self.low, 4),
            "high": round(self.high, 4),
            "words": self.words,
        }


def stretch(first: float, last: float, places: int) -> tuple[int, int]:
    """The whole places between two ends of an axis, in either order, at least one and none outside."""
    low, high = sorted((float(first), float(last)))
    if not np.isfinite([low, high]).all():
        raise ValueError(f"{first} to {last} is no stretch of an axis")
    start = int(np.clip(np.floor(low), 0, places - 1))
    return start, int(np.clip(np.ceil(high), start + 1, places))


def plan_view(
    entries: Entries,
    orders: tuple[np.ndarray, np.ndarray],
    rows: tuple[int, int] | None = None,
    columns: tuple[int, int] | None = None,
    size: int = MAP_CELLS,
) -> View:
    """A stretch of a feature plan, its mass summed into at most `size` x `size` blocks of neurons.

    Args:
        entries: From `tmerge.plots.blocks.plan_entries`.
        orders: From `tmerge.plots.blocks.plan_orders`.
        rows: First place and the one after the last; all of them if None.
        columns: Likewise.
        size: Most blocks along either side.
    """
    n, m = entries.shape
    rows, columns = rows or (0, n), columns or (0, m)
    blocks = window_blocks(entries, orders, rows, columns, size)
    _, low, high = log_density(blocks)
    density = blocks.density
    z = np.full(density.shape, _EMPTY)
    np.log10(density, out=z, where=density > 0)
    return View(
        z.astype(np.float32),
        _edges(blocks.rows, rows[0]),
        _edges(blocks.columns, columns[0]),
        [numbers(group.tolist()) for group in blocks.rows],
        [numbers(group.tolist()) for group in blocks.columns],
        low,
        high,
        f"{_shown(rows, n, 'target')}, {_shown(columns, m, 'source')}; a cell is "
        f"{_cell(blocks.rows)} by {_cell(blocks.columns)}",
    )


def map_figure(order: Order, shape: tuple[int, int], title: str, subtitle: str) -> go.Figure:
    """The frame of a feature plan's map, to be filled with a `plan_view`; its axes count places."""
    how = "grouped by likeness" if order == "structure" else "in the model's own order"
    # Places of the grouped order mean nothing by themselves.
    axis = {"showgrid": False, "zeroline": False, "ticks": "", "showticklabels": order == "natural"}
    figure = go.Figure(
        go.Heatmap(
            z=[[0.0]],
            colorscale=COLOUR_SCALE,
            colorbar=log_bar("even plan<br>= 1\u00d7", -4, 6),
            hovertemplate="target neurons %{customdata[2]}<br>source neurons %{customdata[3]}<br>"
            "%{customdata[0]:.3g} times the even plan, %{customdata[1]:.2g} % of its mass<extra></extra>",
        )
    )
    finish(
        figure,
        title,
        subtitle,
        640,
        xaxis={**axis, "title": {"text": f"source neurons, {how}"}, "range": [0, shape[1]]},
        yaxis={**axis, "title": {"text": f"target neurons, {how}"}, "range": [shape[0], 0]},
    )
    # Without tick labels, plotly leaves no room for the title beside them on a narrow screen.
    return figure.update_layout(margin={"l": 40, "b": 40})


def neurons_view(
    record: TransportRecord, projection: str, columns: tuple[int, int] | None = None, size: int = MAP_CELLS
) -> View:
    """A stretch of a projection's neurons by layer: the share of each block of neurons that was selected (A.5).

    Args:
        record: A run's.
        projection: One of the fused ones.
        columns: First neuron and the one after the last; all of them if None.
        size: Most blocks of neurons.
    """
    layers, neurons = _neurons(record, projection)
    columns = columns or (0, neurons)
    groups = np.array_split(np.arange(*columns), min(size, columns[1] - columns[0]))
    edges = _edges(groups, columns[0])
    chosen = record.tensors[f"neurons.{projection}"].long().numpy()
    counts = np.stack([np.histogram(line, edges - 0.5)[0] for line in chosen])
    return View(
        (counts / np.diff(edges)).astype(np.float32),
        np.arange(len(layers) + 1),
        edges,
        [str(layer) for layer in layers],
        [numbers(group.tolist()) for group in groups],
        0.0,
        1.0,
        f"{_shown(columns, neurons, 'target')}; a cell is {_cell(groups)} in one layer",
    )


def neurons_figure(record: TransportRecord, projection: str) -> go.Figure:
    """The frame of a projection's selected neurons, to be filled with a `neurons_view`."""
    layers, neurons = _neurons(record, projection)
    selected = record.tensors[f"neurons.{projection}"].shape[1]
    step = next(step for step in (1, 2, 5, 10, 20, 50, 10**9) if len(layers) <= 15 * step)
    figure = go.Figure(
        go.Heatmap(
            z=[[0.0]],
            colorscale=COLOUR_SCALE,
            colorbar={
                "title": {"text": "selected", "font": {"size": 12}},
                "tickformat": ".0%",
                "tickfont": {"size": 12},
                "thickness": 14,
                "len": 1,
                "outlinewidth": 0,
            },
            hovertemplate="target layer %{customdata[2]}, neurons %{customdata[3]}<br>"
            "%{customdata[1]} selected, %{customdata[0]:.3g} % of them<extra></extra>",
        )
    )
    return finish(
        figure,
        f"Projection {projection}: which neurons were selected, by layer",
        f"the {selected:,} of {count_words(neurons, 'neuron')} that are most active on the calibration texts, in each "
        "layer",
        int(np.clip(190 + 12 * len(layers), 300, 620)),
        xaxis={"title": {"text": "target neuron"}, "range": [0, neurons], "showgrid": False, "zeroline": False},
        yaxis={
            "title": {"text": "target layer"},
            "range": [len(layers), 0],
            "tickvals": (np.arange(len(layers)) + 0.5)[::step],
            "ticktext": [str(layer) for layer in layers[::step]],
            "showgrid": False,
            "zeroline": False,
            "fixedrange": True,
        },
    )


def _neurons(record: TransportRecord, projection: str) -> tuple[list[int], int]:
    """The target layers that have a projection, and how many neurons each has to select from."""
    layers = record.tensors[f"layers.target.{feature_key(projection, 'post')}"].tolist()
    key = feature_key(projection, neuron_side(projection))
    return layers, record.widths(key)[0]


def _edges(groups: Sequence[np.ndarray], first: int) -> np.ndarray:
    return first + np.concatenate([[0], np.cumsum([len(group) for group in groups])])


def _shown(places: tuple[int, int], neurons: int, whose: str) -> str:
    if places == (0, neurons):
        return f"all {neurons:,} {whose} neurons"
    return f"{places[1] - places[0]:,} of {neurons:,} {whose} neurons"


def _cell(groups: Sequence[np.ndarray]) -> str:
    sizes = sorted({len(group) for group in groups})
    return "1 neuron" if sizes == [1] else f"{' or '.join(map(str, sizes))} neurons"
