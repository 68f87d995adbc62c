"""What a report's numbers look like: concentration, norm ratios, scores, and where the time went."""

from __future__ import annotations

from typing import Literal

import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from tmerge.models import SIDES, feature_key
from tmerge.plots.style import (
    BAD,
    GOOD,
    NEUTRAL,
    OWN,
    PROJECTION_COLOURS,
    PROJECTION_SYMBOLS,
    escaped,
    feature_name,
    finish,
)
from tmerge.quantities import bytes_words
from tmerge.report import Adaptation, Measured, Report, interval_words, score_rows
from tmerge.transport import MASS_AT, TransportRecord

__all__ = ["fit_errors", "norm_ratios", "scores", "timing", "top_mass", "training_loss"]

# A shared input is drawn in the colour of the first projection that reads it.
_SHARED_COLOUR = {"qkv": "q", "mlp": "gate"}


def top_mass(record: TransportRecord, by: Literal["feature", "projection"] = "feature") -> go.Figure:
    """Share of a plan row's mass in its k largest entries, over k (Figure 3), and the mean of all lines.

    The dotted lines are plans that prefer nothing, whose top k of n' entries hold k / n', one for each n' there is.

    Args:
        record: A run's.
        by: ``feature`` for a line per feature, the mean over its kept layer pairs, which ends at its n'; ``projection``
            for a line per fused projection, the mean of its input's and its output's.
    """
    at = np.array(MASS_AT, dtype=np.float64)
    widths = {key: record.widths(key)[1] for key in record.keys}
    features = {key: 100 * record.tensors[f"mass.{key}"].double().mean(dim=0).numpy() for key in record.keys}
    shown = at <= 2 ** np.ceil(np.log2(max(widths.values())))
    if by == "feature":
        figure = go.Figure([_feature_line(key, features[key], width) for key, width in widths.items()])
        curves = features
    else:
        curves = {
            name: np.mean([features[feature_key(name, side)] for side in SIDES], axis=0) for name in record.projections
        }
        figure = go.Figure([_projection_line(name, at[shown], curve[shown]) for name, curve in curves.items()])
    figure.add_trace(
        go.Scatter(
            x=at[shown],
            y=np.mean(list(curves.values()), axis=0)[shown],
            name=f"mean over {by}s",
            mode="lines",
            line={"color": "#767B85", "width": 4},
            hovertemplate=f"mean over {by}s: top %{{x}} hold %{{y:.1f}} %<extra></extra>",
        )
    )
    for place, width in enumerate(sorted(set(widths.values()))):
        figure.add_trace(
            go.Scatter(
                x=_up_to(at, at, width, width),
                y=_up_to(at, 100 * at / width, width, 100.0),
                name="even plans, k / n'",
                legendgroup="even",
                showlegend=place == 0,
                mode="lines",
                line={"color": "#767B85", "width": 1.5, "dash": "dot"},
                hovertemplate=f"even plan over {width:,}: top %{{x}} hold %{{y:.1f}} %<extra></extra>",
            )
        )
    ticks = at[shown].astype(int)
    return finish(
        figure,
        "How concentrated the feature plans are",
        "share of a target neuron's mass in its k strongest source neurons",
        560,
        xaxis={
            "type": "log",
            "title": {"text": "k, entries per row"},
            "tickvals": ticks,
            "ticktext": ticks,
            "ticklabelstandoff": 6,
        },
        yaxis={"title": {"text": "mass captured"}, "ticksuffix": " %", "range": [0, 103]},
        # A line for every feature: above the picture it would cover the title.
        legend={"y": -0.16, "yanchor": "top"},
    )


def _feature_line(key: str, curve: np.ndarray, width: int) -> go.Scatter:
    at = np.array(MASS_AT, dtype=np.float64)
    projection, _, side = key.rpartition(".")
    return go.Scatter(
        x=_up_to(at, at, width, width),
        y=_up_to(at, curve, width, 100.0),
        customdata=_up_to(at, 100 * at / width, width, 100.0),
        name=feature_name(key),
        mode="lines",
        line={
            "color": PROJECTION_COLOURS[_SHARED_COLOUR.get(projection, projection)],
            "dash": "dash" if side == "pre" else "solid",
            "width": 1.5,
        },
        hovertemplate=f"{feature_name(key)}: top %{{x}} of {width:,} hold %{{y:.1f}} %"
        " (even plan: %{customdata:.1f} %)<extra></extra>",
    )


def _projection_line(name: str, at: np.ndarray, curve: np.ndarray) -> go.Scatter:
    return go.Scatter(
        x=at,
        y=curve,
        name=name,
        mode="lines+markers",
        line={"color": PROJECTION_COLOURS[name], "width": 1.5},
        marker={"symbol": PROJECTION_SYMBOLS[name], "size": 7},
        hovertemplate=f"{name}, input and output: top %{{x}} hold %{{y:.1f}} %<extra></extra>",
    )


def norm_ratios(report: Report) -> go.Figure:
    """Norm of the transported weight over the norm of the target's own, for each layer and projection.

    It says how much there is to be fused: at 1 the transported neurons are as large as those they are mixed into, at
    1e-9 nothing arrives and fusing only shrinks the target's.
    """
    figure = go.Figure()
    layers: list[int] = []
    for name, item in report.fusion.projections.items():
        layers += item.layers
        figure.add_trace(
            go.Scatter(
                x=item.layers,
                y=[ratio or None for ratio in item.norm_ratio],  # a logarithm has no place for zero
                name=escaped(name),
                mode="lines+markers",
                line={"color": PROJECTION_COLOURS.get(name, NEUTRAL), "width": 1.5},
                marker={"symbol": PROJECTION_SYMBOLS.get(name, "circle"), "size": 7},
                hovertemplate=f"{escaped(name)}, layer %{{x}}: %{{y:.3g}}<extra></extra>",
            )
        )
    ratios = [ratio for item in report.fusion.projections.values() for ratio in item.norm_ratio if ratio]
    powers = np.floor(np.log10(min([1.0, *ratios]))), np.ceil(np.log10(max([1.0, *ratios])))
    ticks = 10.0 ** np.arange(powers[0], powers[1] + 1)
    figure.add_trace(
        go.Scatter(
            x=[min(layers), max(layers)],
            y=[1, 1],
            name="equal norms",
            mode="lines",
            line={"color": "#767B85", "dash": "dot", "width": 2},
            hoverinfo="skip",
        )
    )
    return finish(
        figure,
        "Norm of what arrives, over the norm of the target's own",
        "added to the target's, which keep their size"
        if report.fusion.what in ("task-vector", "reconstruct")
        else "where the ratio is 1e-9, nothing is left but shrinking",
        420,
        # Never between two layers.
        xaxis={"title": {"text": "target layer"}, "dtick": 1 + (max(layers) - min(layers)) // 15},
        yaxis={
            "type": "log",
            "title": {"text": "norm ratio"},
            "tickvals": ticks,
            "ticktext": [f"{tick:g}" for tick in ticks],
        },
    )


def fit_errors(report: Report) -> go.Figure:
    """Of a reconstruction: how far each projection is from what it should give, before its fit and after, by layer.

    Shares of the wanted outputs' square sum, ``|Y - X W^T|^2 / |Y|^2``; nothing is known of an output that should be
    zero.
    """
    fit = report.fusion.fit
    assert fit is not None  # the caller asks
    figure = go.Figure()
    for name, item in report.fusion.projections.items():
        for when, place, dash in (("before", 0, "dot"), ("after", 1, "solid")):
            figure.add_trace(
                go.Scatter(
                    x=item.layers,
                    y=[pair[place] or None for pair in fit.errors[name]],
                    name=f"{escaped(name)}, {when}",
                    legendgroup=name,
                    mode="lines+markers",
                    line={"color": PROJECTION_COLOURS.get(name, NEUTRAL), "width": 1.5, "dash": dash},
                    marker={"symbol": PROJECTION_SYMBOLS.get(name, "circle"), "size": 7 if place else 4},
                    hovertemplate=f"{escaped(name)}, layer %{{x}}, {when}: %{{y:.3g}}<extra></extra>",
                )
            )
    layers = [layer for item in report.fusion.projections.values() for layer in item.layers]
    return finish(
        figure,
        "How far each projection is from what it should do",
        f"share of the wanted outputs, over {fit.rows:,} tokens: dotted before its fit, solid after",
        420,
        xaxis={"title": {"text": "target layer"}, "dtick": 1 + (max(layers) - min(layers)) // 15},
        yaxis={"type": "log", "title": {"text": "squared error, relative"}},
    )


def scores(report: Report) -> go.Figure:
    """Bits per byte of every model on the held-out texts, and paired differences to the unchanged target.

    Bars are 95 % intervals over texts. The upper panel's overlap although models differ, because texts differ in
    difficulty; the lower panel compares text by text.
    """
    rows = score_rows(report)
    changes = [(row, row.difference) for row in rows if row.difference is not None]
    figure = make_subplots(
        rows=2,
        cols=1,
        row_heights=[len(rows) + 1, len(changes) + 1],
        vertical_spacing=0.2,
    )
    for row in rows:
        colour = NEUTRAL if row.kind == "control" else OWN if row.difference is None else _judged(row.difference)
        figure.add_trace(_interval(row.label, row.score, colour, "%{x:.4f} bits per byte"), row=1, col=1)
    for row, change in changes:
        words = "%{x:+.4f} bits per byte against the unchanged target"
        figure.add_trace(_interval(row.label, change, _judged(change), words), row=2, col=1)
    figure.add_vline(x=0, line={"color": "#767B85", "width": 2, "dash": "dot"}, row=2, col=1)
    finish(
        figure,
        "Held-out bits per byte, lower is better",
        "bars: 95 % intervals over texts; below, differences text by text, blue better, orange worse",
        200 + 32 * (len(rows) + len(changes)),
        showlegend=False,
    )
    ends = [0.0, *(end for _, change in changes for end in change.ci95)]
    room = 0.08 * (max(ends) - min(ends)) or 0.01
    figure.update_yaxes(autorange="reversed", showgrid=False, ticks="", ticklabelstandoff=8)
    figure.update_xaxes(range=[min(ends) - room, max(ends) + room], row=2, col=1)
    figure.update_xaxes(title_text="bits per byte", row=1, col=1)
    figure.update_xaxes(title_text="difference to the target", zeroline=False, row=2, col=1)
    return figure


def training_loss(adaptation: Adaptation) -> go.Figure:
    """Loss of an adaptation over its steps."""
    curve = np.array(adaptation.loss_curve, dtype=np.float64).reshape(-1, 2)
    figure = go.Figure(
        go.Scatter(
            x=curve[:, 0],
            y=curve[:, 1],
            mode="lines",
            line={"color": GOOD, "width": 2},
            hovertemplate="step %{x}: %{y:.4f}<extra></extra>",
        )
    )
    return finish(
        figure,
        "Training loss",
        f"{adaptation.objective}, learning rate {adaptation.learning_rate:g}",
        360,
        xaxis={"title": {"text": "step"}},
        yaxis={"title": {"text": "loss"}},
    )


def timing(report: Report) -> go.Figure:
    """Seconds of every stage, split into the models' forward passes and everything else."""
    figure = go.Figure()
    stages = report.stages
    names = [escaped(stage.name) for stage in stages]
    memory = [bytes_words(stage.peak_rss_bytes) for stage in stages]
    forward = [stage.forward_seconds for stage in stages]
    rest = [stage.seconds - stage.forward_seconds for stage in stages]
    for name, seconds, colour in (("forward passes", forward, GOOD), ("everything else", rest, "#E69F00")):
        figure.add_trace(
            go.Bar(
                x=seconds,
                y=names,
                customdata=memory,
                name=name,
                orientation="h",
                marker={"color": colour, "line": {"width": 0}},
                hovertemplate=f"%{{y}}, {name}: %{{x:.1f}} s<br>peak memory by then %{{customdata}}<extra></extra>",
            )
        )
    total = report.timing
    share = total.forward_seconds / max(total.total_seconds, 1e-9)
    return finish(
        figure,
        f"Where the {total.total_seconds:,.0f} seconds went",
        f"{100 * share:.0f} % were forward passes of the two models",
        150 + 34 * len(stages),
        barmode="stack",
        xaxis={"title": {"text": "seconds"}},
        yaxis={"autorange": "reversed", "showgrid": False, "ticks": "", "ticklabelstandoff": 8},
    )


def _up_to(at: np.ndarray, values: np.ndarray, width: int, last: float) -> list[float]:
    """A curve's values at the numbers below `width`, and its end there."""
    return [*values[at < width].tolist(), float(last)]


def _judged(change: Measured) -> str:
    """Better, worse, or neither, by an interval that excludes zero or does not."""
    return GOOD if change.high < 0 else BAD if change.low > 0 else NEUTRAL


def _interval(name: str, item: Measured, colour: str, words: str) -> go.Scatter:
    value, low, high = item.value, item.low, item.high
    signed = "+" in words
    return go.Scatter(
        x=[value],
        y=[escaped(name)],
        error_x={"type": "data", "array": [high - value], "arrayminus": [value - low], "thickness": 2, "width": 5},
        mode="markers",
        marker={"color": colour, "size": 11},
        hovertemplate=f"{escaped(name)}: {words}<br>95 % interval {interval_words(item, signed=signed)}<extra></extra>",
    )
