"""Pictures of a comparison: the paper's Figures 1, 4, 5 and 6 from compare.json, and one page that holds them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import plotly.graph_objects as go
from plotly.offline import get_plotlyjs

from tmerge.comparison.result import Comparison, Row
from tmerge.comparison.tables import ROW_HEADINGS, added_words, row_cells
from tmerge.plots.picture import pictures_of, script_json
from tmerge.plots.style import BAD, GOOD, NEUTRAL, OWN, PROJECTION_COLOURS, escaped, finish
from tmerge.report import Descent, interval_words
from tmerge.templates import html_templates, static_text

__all__ = [
    "alpha_sweep",
    "comparison_page",
    "descent_bars",
    "domain_scores",
    "losses",
    "rows_figure",
    "sources_figure",
    "task_scores",
]

_TEMPLATES = html_templates("tmerge.plots", keep_trailing_newline=True)
_TEMPLATES.filters |= {"added": added_words, "cells": row_cells}
_SWEEP_COLOURS = {"fused": GOOD, "shrink": NEUTRAL, "noise": BAD}


def rows_figure(result: Comparison) -> go.Figure:
    """Every row's paired difference to the base with its 95 % interval; the seeds of a trained row are averaged."""
    rows = [row for row in result.rows if row.difference is not None and row.kind not in ("sweep", "reference")]
    return _forest(
        rows,
        "Difference to the base, held-out bits per byte",
        f"{result.texts} texts, 95 % intervals paired by text; left of the dotted line is better",
    )


def sources_figure(result: Comparison) -> go.Figure | None:
    """The same recipe with other sources (Figure 4); None where only one was asked for."""
    rows = [row for row in result.rows if row.kind == "source"]
    if not rows:
        return None
    own = next(row for row in result.rows if row.name == "fused")
    rows = [own.model_copy(update={"name": f"fused with {result.source.ref}"}), *rows]
    return _forest(rows, "Source backbones", "the same recipe, one source after the other (the paper's Figure 4)")


def alpha_sweep(result: Comparison) -> go.Figure | None:
    """Held-out bits per byte over alpha, without training, beside shrink and noise (Figure 5)."""
    figure = go.Figure()
    for name, colour in _SWEEP_COLOURS.items():
        rows = sorted(
            (
                (row.alpha, row.difference)
                for row in result.rows
                if row.of == name and row.alpha is not None and row.difference is not None
            ),
            key=lambda pair: pair[0],
        )
        if not rows:
            continue
        changes = [change for _, change in rows]
        figure.add_trace(
            go.Scatter(
                x=[alpha for alpha, _ in rows],
                y=[change.value for change in changes],
                error_y={
                    "type": "data",
                    "array": [change.high - change.value for change in changes],
                    "arrayminus": [change.value - change.low for change in changes],
                },
                name=name,
                mode="lines+markers",
                line={"color": colour},
                hovertemplate=f"{name}, alpha %{{x:g}}: %{{y:+.4f}}<extra></extra>",
            )
        )
    if not figure.data:
        return None
    figure.add_hline(y=0, line={"color": "#767B85", "width": 2, "dash": "dot"})
    alphas = sorted({alpha for trace in figure.data for alpha in trace.x})
    return finish(
        figure,
        "Fusion strength",
        "difference to the base over alpha, nothing trained (the paper's Figure 5); below the dotted line is better",
        420,
        xaxis={
            "type": "log",
            "title": {"text": "alpha"},
            "tickvals": alphas,
            "ticktext": [f"{alpha:g}" for alpha in alphas],
        },
        yaxis={"title": {"text": "bits per byte against the base"}},
    )


def domain_scores(result: Comparison) -> go.Figure | None:
    """Rows over domains as z-scores and min-max scores (Figure 1), 1 or above is better than the average row.

    Bits per byte of unlike texts cannot be averaged; within a domain the rows can be held against each other. Both
    are turned round, so that higher is better: z = (mean - value) / sd, and (max - value) / (max - min). None where
    the recipe names no further domain.
    """
    rows = [row for row in result.rows if row.kind != "sweep" and row.name != "source"]
    names = list(rows[0].domains) if rows else []
    if not names or len(rows) < 2:
        return None
    values = np.array([[row.value, *(row.domains[name].value for name in names)] for row in rows])
    spread, width = values.std(0), np.ptp(values, axis=0)
    z = (values.mean(0) - values) / np.where(spread == 0, 1, spread)
    scaled = (values.max(0) - values) / np.where(width == 0, 1, width)
    figure = go.Figure()
    labels = ["calibrated on", *map(escaped, names)]
    for index, row in enumerate(rows):
        for kind, scores in (("z-score", z), ("min-max", scaled)):
            figure.add_trace(
                go.Bar(
                    x=labels,
                    y=scores[index],
                    name=escaped(row.name),
                    customdata=values[index],
                    visible=kind == "z-score",
                    meta=kind,
                    marker={"color": list(PROJECTION_COLOURS.values())[index % len(PROJECTION_COLOURS)]},
                    hovertemplate=f"{escaped(row.name)}, %{{x}}: {kind} %{{y:.2f}} "
                    "(%{customdata:.4f} bits per byte)<extra></extra>",
                )
            )
    kinds = [trace.meta for trace in figure.data]
    buttons = [
        {"label": kind, "method": "update", "args": [{"visible": [one == kind for one in kinds]}]}
        for kind in ("z-score", "min-max")
    ]
    return finish(
        figure,
        "Domains",
        "each row against the others within a domain, higher is better (the paper's Figures 1 and 6)",
        480,
        barmode="group",
        # Below: above, a legend of many rows would run into it on a phone.
        updatemenus=[{"buttons": buttons, "x": 1, "xanchor": "right", "y": -0.15, "yanchor": "top", "direction": "up"}],
    )


def task_scores(result: Comparison) -> go.Figure | None:
    """Benchmark scores of every row, and their mean over tasks (the paper's Figure 6 for the group ``general``).

    None where the recipe names no task.
    """
    rows = [row for row in result.rows if row.tasks and row.kind != "sweep"]
    if not rows:
        return None
    figure = go.Figure()
    names = list(rows[0].tasks)
    for index, row in enumerate(rows):
        items = [row.tasks[name] for name in names]
        labels, values = [*map(escaped, names)], [item.value for item in items]
        above = [item.high - item.value for item in items]
        below = [item.value - item.low for item in items]
        if len(names) > 1:
            labels, values = [*labels, "mean"], [*values, sum(values) / len(values)]
            above, below = [*above, 0.0], [*below, 0.0]
        figure.add_trace(
            go.Bar(
                x=labels,
                y=values,
                error_y={"type": "data", "array": above, "arrayminus": below},
                name=escaped(row.name),
                marker={"color": list(PROJECTION_COLOURS.values())[index % len(PROJECTION_COLOURS)]},
                hovertemplate=f"{escaped(row.name)}, %{{x}}: %{{y:.3f}}<extra></extra>",
            )
        )
    return finish(
        figure,
        "Benchmarks",
        "share of questions answered rightly, 95 % intervals over questions; the mean over tasks has none",
        480,
        barmode="group",
        yaxis={"title": {"text": "score"}, "rangemode": "tozero"},
    )


def descent_bars(descent: Descent) -> go.Figure:
    """Mean cosine of the merge with the descent direction, beside that of random directions, by projection."""
    figure = go.Figure()
    projections = descent.projections.values()
    for name, means, errors, colour in (
        ("merge", [item.mean for item in projections], [item.standard_error for item in projections], GOOD),
        (
            "random directions",
            [item.noise_mean for item in projections],
            [item.noise_standard_error for item in projections],
            NEUTRAL,
        ),
    ):
        figure.add_trace(
            go.Bar(
                x=list(descent.projections),
                y=means,
                error_y={
                    "type": "data",
                    "array": [error or 0 for error in errors],
                    "color": "#767B85",
                },
                name=name,
                marker={"color": colour},
                hovertemplate=f"{name}, %{{x}}: %{{y:+.5f}}<extra></extra>",
            )
        )
    return finish(
        figure,
        "Does the merge point where the loss falls?",
        f"cosine with the negative gradient on {descent.texts} calibration texts, mean over layers; "
        "bars: standard error",
        400,
        barmode="group",
        yaxis={"title": {"text": "cosine"}},
    )


def losses(result: Comparison) -> go.Figure | None:
    """Training loss of every trained row and seed, over steps."""
    figure = go.Figure()
    rows = [row for row in result.rows if row.kind == "trained"]
    for index, row in enumerate(rows):
        for place, seed in enumerate(row.seeds):
            curve = np.array(seed.loss, dtype=np.float64).reshape(-1, 2)
            figure.add_trace(
                go.Scatter(
                    x=curve[:, 0],
                    y=curve[:, 1],
                    name=escaped(row.name),
                    legendgroup=escaped(row.name),
                    showlegend=place == 0,
                    mode="lines",
                    line={"color": list(PROJECTION_COLOURS.values())[index % len(PROJECTION_COLOURS)], "width": 1.5},
                    hovertemplate=f"{escaped(row.name)}, seed {seed.seed}, step %{{x}}: %{{y:.4f}}<extra></extra>",
                )
            )
    if not figure.data:
        return None
    return finish(
        figure,
        "Training loss",
        "the objective's own loss; distillation adds a term, so heights compare within an objective only",
        420,
        xaxis={"title": {"text": "step"}},
        yaxis={"title": {"text": "loss"}},
    )


def comparison_page(result: Comparison) -> str:
    """One self-contained HTML page: the table and the figures; it asks nothing of any network."""
    figures = {
        "rows": rows_figure(result),
        "alphas": alpha_sweep(result),
        "domains": domain_scores(result),
        "tasks": task_scores(result),
        "sources": sources_figure(result),
        "descent": descent_bars(result.descent),
        "losses": losses(result),
    }
    drawn = {name: figure for name, figure in figures.items() if figure is not None}
    return _TEMPLATES.get_template("comparison.html").render(
        result=result,
        title=f"{result.target.ref} and {result.source.ref}: what helps",
        headings=ROW_HEADINGS,
        names=list(drawn),
        book=script_json(pictures_of(drawn)),
        style=static_text("tmerge.plots", "page.css"),
        plotly=get_plotlyjs(),
        script=static_text("tmerge.plots", "figure.js") + static_text("tmerge.plots", "page.js") + "tmergePage();\n",
    )


def _forest(rows: Sequence[Row], title: str, subtitle: str) -> go.Figure:
    figure = go.Figure()
    for row in rows:
        change = row.difference
        assert change is not None  # the base alone has none, and is no row of this figure
        value, low, high = change.value, change.low, change.high
        colour = GOOD if high < 0 else BAD if low > 0 else OWN
        figure.add_trace(
            go.Scatter(
                x=[value],
                y=[escaped(row.name)],
                error_x={"type": "data", "array": [high - value], "arrayminus": [value - low], "thickness": 2},
                mode="markers",
                marker={"color": colour, "size": 11},
                hovertemplate=f"{escaped(row.name)}: %{{x:+.4f}}<br>95 % interval "
                f"{interval_words(change, signed=True)}<extra></extra>",
            )
        )
    figure.add_vline(x=0, line={"color": "#767B85", "width": 2, "dash": "dot"})
    return finish(
        figure,
        title,
        subtitle,
        170 + 32 * len(rows),
        showlegend=False,
        xaxis={"title": {"text": "bits per byte against the base"}},
        yaxis={"autorange": "reversed", "showgrid": False, "ticks": "", "ticklabelstandoff": 8},
    )
