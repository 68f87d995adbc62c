"""One figure of the app: drawn by plotly.js from this server, clickable, zoomable, downloadable as picture and as data.

Gradio's own Plot component tells nobody of clicks, so this is its HTML component with a script. A figure's value is
JSON text made by `figure_value`. Texts reach the page as text, never as markup; the markup has no ``${value}``, so a
new value leaves the drawn picture alone and the script changes it.
"""

from __future__ import annotations

import atexit
import functools
import json
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gradio as gr
import plotly
import plotly.graph_objects as go

from tmerge.plots import TEMPLATES, picture
from tmerge.templates import static_text

__all__ = ["Reader", "figure_box", "figure_message", "figure_value"]

Reader = Callable[[Any], dict[str, Any]]
"""Answers a figure's question, the JSON value that the browser sends; ``{"fault": line}`` where it cannot."""


def figure_box(name: str, *, zoom: Reader, data: Reader) -> gr.HTML:
    """A place for figures.

    Its ``cell`` event tells of a click on a layer pair, as ``target`` and ``source`` of `gr.EventData`.

    Args:
        name: Its element id.
        zoom: Given a map's ``ref`` with the ``x`` and ``y`` ranges looked at, returns the view of them.
        data: Given a figure's ``ref``, returns ``file`` (a name without ending) and ``text`` (CSV).
    """
    # The component finds them by their names.
    named_zoom, named_data = _named("zoom", zoom), _named("data", data)
    settings = {
        "plotly": _plotly_url(),
        "templates": {name: TEMPLATES[name].to_plotly_json() for name in ("light", "dark")},
    }
    return gr.HTML(
        "",
        elem_id=name,
        html_template=static_text("tmerge.ui", "figure.html"),
        css_template=static_text("tmerge.ui", "figure.css"),
        js_on_load=static_text("tmerge.ui", "figure.js").replace("__SETTINGS__", json.dumps(settings)),
        apply_default_css=False,
        server_functions=[named_zoom, named_data],
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


def _named(name: str, reader: Reader) -> Reader:
    def read(question: Any) -> dict[str, Any]:
        return reader(question)

    read.__name__ = name
    return read


@functools.lru_cache(maxsize=1)
def _plotly_url() -> str:
    """Where the browser fetches plotly.js: from this server, under a name that does not tell where it is installed."""
    folder = Path(tempfile.mkdtemp(prefix="tmerge-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    script = folder / f"plotly-{plotly.__version__}.min.js"
    # With its date, by which browsers judge how long to keep it.
    shutil.copy2(Path(plotly.__file__).parent / "package_data" / "plotly.min.js", script)
    gr.set_static_paths([script])
    return f"/gradio_api/file={script}"
