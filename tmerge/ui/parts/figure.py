"""One figure of the app: drawn by plotly.js from this server, clickable, zoomable, downloadable as picture and as data.

Gradio's own Plot component tells nobody of clicks, so this is its HTML component with a script. A figure's value is
JSON text made by `figure_value`. Texts reach the page as text, never as markup; the markup has no ``${value}``, so a
new value leaves the drawn picture alone and the script changes it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gradio as gr
import plotly
import plotly.graph_objects as go
from starlette.responses import FileResponse
from starlette.routing import Route

from tmerge.plots import TEMPLATES, picture
from tmerge.templates import static_text

__all__ = ["Reader", "figure_box", "figure_message", "figure_value", "plotly_route"]

_PLOTLY = f"/plotly-{plotly.__version__}.min.js"

Reader = Callable[[Any], dict[str, Any]]
"""Answers a figure's question, the JSON value that the browser sends; ``{"fault": line}`` where it cannot."""


def figure_box(name: str, *readers: Reader) -> gr.HTML:
    """A place for figures.

    Its ``cell`` event tells of a click on a layer pair, as ``target`` and ``source`` of `gr.EventData`.

    Args:
        name: Its element id.
        readers: Known to the script by their names. ``zoomed``, given a map's ``ref`` with the ``x`` and ``y`` ranges
            looked at, returns the view of them; ``data_of``, given a figure's ``ref``, returns ``file`` (a name without
            ending) and ``text`` (CSV).
    """
    settings = {
        "plotly": _PLOTLY,
        "templates": {name: TEMPLATES[name].to_plotly_json() for name in ("light", "dark")},
    }
    return gr.HTML(
        "",
        elem_id=name,
        html_template=static_text("tmerge.ui", "figure.html"),
        css_template=static_text("tmerge.ui", "figure.css"),
        js_on_load=static_text("tmerge.ui", "figure.js").replace("__SETTINGS__", json.dumps(settings)),
        apply_default_css=False,
        server_functions=list(readers),
    )


def figure_value(
    figure: go.Figure,
    file: str,
    caption: str,
    ref: Mapping[str, Any],
    *,
    cells: Mapping[str, Any] | None = None,
    view: Mapping[str, Any] | None = None,
) -> str:
    """What a figure box shows.

    Args:
        figure: From `tmerge.plots`.
        file: Name of a downloaded picture, without ending.
        caption: How to read it.
        ref: Names the figure to the box's readers.
        cells: Where a click opens a layer pair: ``rows`` and ``columns``, the layers of a heatmap's cells, or
            ``links``, the [target, source] of each stream.
        view: Where it can be zoomed into: ``kind`` (``density`` or ``share``), ``shape`` and ``view``, a
            `tmerge.plots.zoom.View` as JSON.
    """
    value = {**picture(figure), "file": file, "caption": caption, "ref": dict(ref)}
    if cells is not None:
        value["cells"] = dict(cells)
    if view is not None:
        value["map"] = {**view, "ref": dict(ref)}
    return json.dumps(value)


def figure_message(title: str, text: str) -> str:
    """A figure box without a figure, and why."""
    return json.dumps({"title": title, "message": text})


def plotly_route() -> Route:
    """Where the app serves plotly.js, from where it is installed; with its date, by which browsers keep it."""
    script = Path(plotly.__file__).parent / "package_data" / "plotly.min.js"
    return Route(_PLOTLY, lambda request: FileResponse(script, media_type="text/javascript"))
