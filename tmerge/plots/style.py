"""Colours, words and layout that every figure shares.

Figures are transparent and their default ink is a grey that reads on white and on near-black, so that one figure
serves a light page, a dark page and a Gradio app whose theme Python does not know. `TEMPLATES` has the two inks of
a page that does know.
"""

from __future__ import annotations

import html
from collections.abc import Sequence
from typing import Any

import numpy as np
import plotly.graph_objects as go

__all__ = [
    "BAD",
    "COLOUR_SCALE",
    "GOOD",
    "NEUTRAL",
    "OWN",
    "PROJECTION_COLOURS",
    "PROJECTION_SYMBOLS",
    "TEMPLATES",
    "escaped",
    "feature_name",
    "finish",
    "log_bar",
    "numbers",
    "percent",
]

# Okabe and Ito's colours, which stay apart for colour-blind readers. Their yellow, which does not show on white, is
# left out, and their blue is a little lighter, for dark pages.
PROJECTION_COLOURS = {
    "q": "#1B7DC2",
    "k": "#E69F00",
    "v": "#009E73",
    "o": "#D55E00",
    "gate": "#56B4E9",
    "up": "#CC79A7",
    "down": "#8C6D31",
}
PROJECTION_SYMBOLS = {
    "q": "circle",
    "k": "square",
    "v": "diamond",
    "o": "triangle-up",
    "gate": "cross",
    "up": "x",
    "down": "triangle-down",
}
GOOD, BAD, NEUTRAL, OWN = "#1B7DC2", "#D55E00", "#8A8F98", "#009E73"
"""Better, worse, neither, and the models the merge was made from."""

COLOUR_SCALE = "Viridis"
"""Perceptually uniform, rises in lightness, and reads without colour vision."""

_FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, sans-serif"

_SHARED = {
    "qkv": "q, k and v",
    "mlp": "gate and up",
}


def _template(ink: str, grid: str, paper: str, edge: str) -> go.layout.Template:
    axis = {
        "gridcolor": grid,
        "linecolor": grid,
        "zerolinecolor": grid,
        "tickcolor": grid,
        "automargin": True,
        "tickfont": {"size": 12},
        "title": {"standoff": 8, "font": {"size": 13}},
    }
    layout = go.Layout(
        font={"family": _FONT, "size": 13, "color": ink},
        title={"font": {"size": 16}, "x": 0, "xref": "container", "xanchor": "left", "pad": {"l": 12, "t": 12}},
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        colorway=list(PROJECTION_COLOURS.values()),
        xaxis=axis,
        yaxis=axis,
        hoverlabel={"font": {"family": _FONT, "size": 13, "color": ink}, "bgcolor": paper, "bordercolor": edge},
        legend={
            "orientation": "h",
            "x": 0,
            "xanchor": "left",
            "y": 1.02,
            "yanchor": "bottom",
            "traceorder": "normal",
        },
        separators=".,",
    )
    return go.layout.Template(layout=layout)


TEMPLATES = {
    "any": _template("#767B85", "rgba(128,132,140,0.28)", "#FFFFFF", "#767B85"),
    "light": _template("#24292F", "#DDE1E6", "#FFFFFF", "#8A8F98"),
    "dark": _template("#D6DAE0", "#363C45", "#22272E", "#8A8F98"),
}
"""Plotly templates by the page they are for; figures come with ``any``."""


def log_bar(title: str, low: float, high: float) -> dict[str, Any]:
    """A colour bar for log10 values between two ends, with ticks at 1, 3, 10, ... and their reciprocals."""
    values = [factor * 10.0**power for power in range(-4, 6) for factor in (1, 3)]
    shown = [value for value in values if low - 0.01 <= np.log10(value) <= high + 0.01]
    return {
        "title": {"text": title, "font": {"size": 12}},
        "tickvals": np.log10(shown).tolist(),
        "ticktext": [f"{value:g}\u00d7" for value in shown],
        "tickfont": {"size": 12},
        "thickness": 14,
        "len": 1,
        "outlinewidth": 0,
    }


def finish(figure: go.Figure, title: str, subtitle: str, height: int, **layout: Any) -> go.Figure:
    """Give a figure its title, what to read in it, its height in pixels, and the shared template."""
    figure.update_layout(
        template=TEMPLATES["any"],
        title={
            "text": escaped(title),
            "subtitle": {"text": escaped(subtitle)},
            "y": 1,
            "yref": "container",
            "yanchor": "top",
        },
        height=height,
        margin={"l": 12, "r": 12, "t": 92, "b": 12},
        **layout,
    )
    return figure


def feature_name(key: str) -> str:
    """``q.post`` as "output of q", ``mlp.pre`` as "input of gate and up"."""
    projection, _, side = key.rpartition(".")
    return f"{'input' if side == 'pre' else 'output'} of {_SHARED.get(projection, projection)}"


def escaped(text: object) -> str:
    """Text that plotly shows as it is; its labels know some HTML, and names of models may hold any."""
    return html.escape(str(text), quote=False)


def percent(share: float) -> str:
    """0.0123 as "1.2 %", with as many digits as say something."""
    return f"{100 * share:.3g} %"


def numbers(items: Sequence[int], most: int = 4) -> str:
    """Some neurons in words: a run as "36-39", few as "3, 8, 20", many as the first few and how many."""
    if len(items) == 1:
        return str(items[0])
    if items[-1] - items[0] == len(items) - 1 and all(b - a == 1 for a, b in zip(items, items[1:], strict=False)):
        return f"{items[0]}-{items[-1]}"
    listed = ", ".join(str(item) for item in items[:most])
    return listed if len(items) <= most else f"{listed}, ... ({len(items)} in all)"
