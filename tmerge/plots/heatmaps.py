"""Which layers meet, and which neurons: layer couplings and feature plans (the paper's Figures 7 and 8)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import plotly.graph_objects as go

from tmerge.models import feature_key
from tmerge.plots.blocks import Blocks, Order, plan_blocks, plan_entries
from tmerge.plots.style import COLOUR_SCALE, feature_name, finish, log_bar, numbers, percent
from tmerge.transport import TransportRecord

__all__ = [
    "DECADES",
    "Side",
    "blocks_figure",
    "blocks_of",
    "feature_transport",
    "kept_layers",
    "layer_coupling",
    "layer_flow",
    "layer_number",
    "log_density",
    "pair_place",
    "pair_words",
    "strongest_pairs",
]

Side = Literal["effective", "pre", "post"]

DECADES = 2.5
"""Powers of ten that the colours of shares span; fainter ones look like empty ones."""

# A source layer in the flow has its number beside it if it is taller than this share of the picture.
_LABELLED = 0.024


def layer_coupling(record: TransportRecord, projection: str, which: Side = "effective") -> go.Figure:
    """How much each target layer draws on each source layer (Figure 7).

    Args:
        record: A run's.
        projection: One of the fused ones.
        which: ``pre`` or ``post`` for the layer plan P of that side (Eq. 11-12), ``effective`` for
            sqrt(P_pre P_post) (Eq. 13), whose strongest entries are kept.

    Returns:
        Target layers down, source layers across; colours are multiples of the even share 1 / (L M), on a log scale.
        Dots mark the kept ones.
    """
    key = feature_key(projection, "post" if which == "effective" else which)
    name = f"effective.{projection}" if which == "effective" else f"layer_plan.{key}"
    weights = record.tensors[name].double().numpy()
    layers = _layers(record, key)
    ranks, fused = _kept(record, projection, *layers)
    target, source = ([str(layer) for layer in side] for side in layers)
    times = weights * weights.size
    z, low, high = _log_scale(times)
    words = np.full(weights.shape, "", dtype=object)
    for place in zip(*np.nonzero(ranks), strict=True):
        words[place] = f"<br>kept, number {ranks[place]}: {fused[place]:.1f} % of what is fused"
    figure = go.Figure(
        go.Heatmap(
            z=z.astype(np.float32),
            x=source,
            y=target,
            customdata=np.stack([times.round(4), words], axis=2).tolist(),
            colorscale=COLOUR_SCALE,
            zmin=low,
            zmax=high,
            colorbar=log_bar("even share<br>= 1\u00d7", low, high),
            hovertemplate="target layer %{y}, source layer %{x}<br>%{customdata[0]:.3g} times the even share"
            "%{customdata[1]}<extra></extra>",
        )
    )
    rows, columns = np.nonzero(ranks)
    figure.add_trace(
        go.Scatter(
            x=[source[column] for column in columns],
            y=[target[row] for row in rows],
            mode="markers",
            marker={"symbol": "circle", "size": 7, "color": "#FFFFFF", "line": {"color": "#000000", "width": 1.5}},
            hoverinfo="skip",
            showlegend=False,
        )
    )
    side = {
        "effective": "inputs and outputs together, sqrt(P_pre P_post)",
        "pre": f"layer plan of the {feature_name(key)}",
        "post": f"layer plan of the {feature_name(key)}",
    }[which]
    return finish(
        figure,
        f"Projection {projection}: which source layers feed which target layers",
        f"{side}; dots: the {ranks.max()} kept per target layer",
        _height(target),
        xaxis={"title": {"text": "source layer"}, "range": [-0.5, len(source) - 0.5], **_layer_ticks(source)},
        yaxis={"title": {"text": "target layer"}, "range": [len(target) - 0.5, -0.5], **_layer_ticks(target)},
    )


def layer_flow(record: TransportRecord, projection: str) -> go.Figure:
    """What is fused into each target layer, and from where: the kept layers as streams from source to target.

    Every target layer receives the same width, split by its kept source layers' weights, so the width of a source
    layer says how much of the fused model comes from it.
    """
    key = feature_key(projection, "post")
    target, source = _layers(record, key)
    ranks, fused = _kept(record, projection, target, source)
    rows, columns = np.nonzero(ranks)
    widths = fused[rows, columns] / 100
    given = np.bincount(columns, weights=widths, minlength=len(source))
    used = np.nonzero(given)[0]
    position = {int(column): index for index, column in enumerate(used)}
    hues = [_hue(index / max(len(source) - 1, 1)) for index in range(len(source))]
    figure = go.Figure(
        go.Sankey(
            arrangement="fixed",
            node={
                "label": [
                    *(str(source[column]) if given[column] > _LABELLED * len(target) else "" for column in used),
                    *(str(layer) for layer in target),
                ],
                "x": [0.001] * len(used) + [0.999] * len(target),
                "y": [*_middles(given[used]), *_middles(np.ones(len(target)))],
                "color": [f"rgb({hues[column]})" for column in used] + ["#8A8F98"] * len(target),
                "customdata": [f"source layer {source[column]}" for column in used]
                + [f"target layer {layer}" for layer in target],
                "hovertemplate": "%{customdata}: %{value:.2f} target layers' worth<extra></extra>",
                "pad": 2,
                "thickness": 12,
                "line": {"width": 0},
            },
            link={
                "source": [position[int(column)] for column in columns],
                "target": [len(used) + int(row) for row in rows],
                "value": widths,
                "color": [f"rgba({hues[column]},0.45)" for column in columns],
                "customdata": [
                    f"target layer {target[row]} takes {100 * width:.1f} % of its fused weight"
                    f"<br>from source layer {source[column]} (number {ranks[row, column]})"
                    for row, column, width in zip(rows, columns, widths, strict=True)
                ],
                "hovertemplate": "%{customdata}<extra></extra>",
            },
        )
    )
    unused = [source[column] for column in range(len(source)) if column not in position]
    idle = f"source {'layer' if len(unused) == 1 else 'layers'} {numbers(unused, 12)} unused" if unused else "all used"
    return finish(
        figure,
        f"Projection {projection}: where each target layer's fused weights come from",
        f"source layers left, target layers right; {idle}",
        _height(target),
    )


def feature_transport(
    record: TransportRecord, key: str, row: int, column: int, size: int = 160, order: Order = "structure"
) -> go.Figure:
    """A feature plan of one layer pair, averaged to screen size (Figure 8).

    Args:
        record: A run's.
        key: Feature, such as ``q.post``.
        row: Of the kept pair, counted among the target layers that have the feature.
        column: Likewise, among the source layers.
        size: Most blocks along either side.
        order: ``structure`` or ``natural``; see `tmerge.plots.blocks.plan_blocks`.

    Returns:
        Blocks of neurons coloured by how many times the uniform plan's mass they hold, on a log scale.

    Raises:
        ValueError: That pair is not among the kept ones.
    """
    blocks = blocks_of(record, key, row, column, size, order)
    z, low, high = log_density(blocks)
    return blocks_figure(order, *pair_words(record, key, row, column, blocks)).update_traces(
        z=z.astype(np.float32),
        x=[numbers(group.tolist()) for group in blocks.columns],
        y=[numbers(group.tolist()) for group in blocks.rows],
        customdata=np.stack([blocks.density, 100 * blocks.mass], axis=2).astype(np.float32),
        zmin=low,
        zmax=high,
    )


def blocks_figure(order: Order, title: str = "", subtitle: str = "") -> go.Figure:
    """The frame of `feature_transport`, with no plan in it yet."""
    how = "grouped by likeness" if order == "structure" else "in the model's own order"
    axis = {"type": "category", "tickvals": [], "ticks": "", "showgrid": False}
    figure = go.Figure(
        go.Heatmap(
            z=[[0.0]],
            colorscale=COLOUR_SCALE,
            colorbar=log_bar("even plan<br>= 1\u00d7", -4, 5),
            hovertemplate="target neurons %{y}<br>source neurons %{x}<br>"
            "%{customdata[0]:.3g} times the even plan, %{customdata[1]:.2g} % of its mass<extra></extra>",
        )
    )
    finish(
        figure,
        title,
        subtitle,
        620,
        xaxis={**axis, "title": {"text": f"source neurons, {how}"}},
        yaxis={**axis, "title": {"text": f"target neurons, {how}"}, "autorange": "reversed"},
    )
    # Without tick labels, plotly leaves no room for the title beside them on a narrow screen.
    return figure.update_layout(margin={"l": 40, "b": 40})


def blocks_of(record: TransportRecord, key: str, row: int, column: int, size: int, order: Order) -> Blocks:
    """The blocks of one kept layer pair's plan; ValueError where it is not kept."""
    pairs = record.pairs(key)
    if (row, column) not in pairs:
        raise ValueError(
            f"{key}: the pair (row {row}, column {column}) has no stored plan; row {row} keeps columns "
            f"{[pair[1] for pair in pairs if pair[0] == row]}"
        )
    return plan_blocks(plan_entries(record.plans(key), pairs.index((row, column))), size, order)


def log_density(blocks: Blocks) -> tuple[np.ndarray, float, float]:
    """log10 of the blocks' density, with the ends of the colour scale; what lies below is raised to the lower end."""
    return _log_scale(blocks.density)


def pair_words(record: TransportRecord, key: str, row: int, column: int, blocks: Blocks) -> tuple[str, str]:
    """Title and subtitle of a feature plan."""
    target, source = layer_number(record, key, row, column)
    n, m = blocks.shape
    return (
        f"{feature_name(key).capitalize()}: target layer {target} and source layer {source}",
        f"{n:,} by {m:,} neurons in {len(blocks.rows)} by {len(blocks.columns)} blocks; "
        f"the stored entries hold {percent(float(blocks.mass.sum()))} of the plan",
    )


def layer_number(record: TransportRecord, key: str, row: int, column: int) -> tuple[int, int]:
    """The models' own numbers of a row's target layer and a column's source layer."""
    target, source = _layers(record, key)
    return target[row], source[column]


def pair_place(record: TransportRecord, key: str, target: int, source: int) -> tuple[int, int] | None:
    """Row and column of a layer pair, by the models' own numbers; None where one of them lacks the feature."""
    rows, columns = _layers(record, key)
    return (rows.index(target), columns.index(source)) if target in rows and source in columns else None


def kept_layers(record: TransportRecord, projection: str) -> dict[int, list[tuple[int, float]]]:
    """Target layer -> the source layers kept for it, strongest first, each with its percent of what is fused."""
    target, source = _layers(record, feature_key(projection, "post"))
    columns = record.tensors[f"kept.{projection}.layers"].tolist()
    weights = record.tensors[f"kept.{projection}.weights"].double()
    shares = (100 * weights / weights.sum(dim=1, keepdim=True)).tolist()
    return {
        layer: [(source[column], share) for column, share in zip(chosen, parts, strict=True)]
        for layer, chosen, parts in zip(target, columns, shares, strict=True)
    }


def strongest_pairs(record: TransportRecord, key: str) -> list[tuple[int, int]]:
    """For every target layer the kept pair to which the layer plan gives most, as (row, column)."""
    plan = record.tensors[f"layer_plan.{key}"]
    best: dict[int, int] = {}
    for row, column in record.pairs(key):
        if row not in best or plan[row, column] > plan[row, best[row]]:
            best[row] = column
    return sorted(best.items())


def _layers(record: TransportRecord, key: str) -> tuple[list[int], list[int]]:
    return record.tensors[f"layers.target.{key}"].tolist(), record.tensors[f"layers.source.{key}"].tolist()


def _kept(
    record: TransportRecord, projection: str, target: list[int], source: list[int]
) -> tuple[np.ndarray, np.ndarray]:
    """(L, M) rank among a target layer's kept source layers, 0 for none, and percent of what is fused into it.

    Args:
        record: A run's.
        projection: One of the fused ones.
        target: Numbers of the L layers to show: the projection's own, or those that have what enters it, which may
            be more, where layers reuse the keys and values of others.
        source: Likewise, M.
    """
    columns = record.tensors[f"kept.{projection}.layers"].long().numpy()
    weights = record.tensors[f"kept.{projection}.weights"].double().numpy()
    own_target, own_source = _layers(record, feature_key(projection, "post"))
    rows = np.array([target.index(layer) for layer in own_target])[:, None]
    across = np.array([source.index(layer) for layer in own_source])
    ranks, shares = np.zeros((len(target), len(source)), dtype=np.int64), np.zeros((len(target), len(source)))
    ranks[rows, across[columns]] = np.arange(1, columns.shape[1] + 1)
    shares[rows, across[columns]] = 100 * weights / weights.sum(axis=1, keepdims=True)
    return ranks, shares


def _log_scale(times: np.ndarray) -> tuple[np.ndarray, float, float]:
    """log10 of multiples of the even share, and the ends of their colours, which span `DECADES` at most."""
    positive = times[times > 0]
    if not positive.size:
        return np.full(times.shape, -DECADES), -DECADES, 0.0
    high = float(np.log10(positive.max()))
    # A flat plan still needs a scale, or its rounding errors would look like structure.
    low = min(max(high - DECADES, float(np.log10(positive.min()))), high - 0.3)
    return np.log10(np.maximum(times, 10.0**low)), low, high


def _layer_ticks(layers: list[str]) -> dict[str, Any]:
    """Every layer where they are few, else every second, fifth, ...: on layers, never between them."""
    step = next(step for step in (1, 2, 5, 10, 20, 50, 10**9) if len(layers) <= 15 * step)
    return {"type": "category", "tickvals": layers[::step], "ticks": "", "showgrid": False}


def _height(layers: Sequence[object]) -> int:
    return int(np.clip(150 + 17 * len(layers), 340, 760))


def _middles(widths: np.ndarray) -> list[float]:
    """Where the nodes of one side of the flow sit: one after the other, in order, filling the height."""
    ends = np.cumsum(widths) / widths.sum()
    return np.clip(ends - widths / widths.sum() / 2, 0.001, 0.999).tolist()


def _hue(position: float) -> str:
    """Red, green, blue (0-255) at a place of Viridis' middle, which shows on light and on dark paper."""
    stops = np.array([[59, 82, 139], [33, 145, 140], [94, 201, 98], [233, 196, 30]])
    at = position * (len(stops) - 1)
    index = min(int(at), len(stops) - 2)
    mixed = stops[index] + (at - index) * (stops[index + 1] - stops[index])
    return ",".join(str(int(value)) for value in mixed)
