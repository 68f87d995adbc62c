"""A figure for a page that writes titles itself: in HTML, where they wrap and can be read aloud."""

from __future__ import annotations

import html
import json
from collections.abc import Mapping
from typing import Any

import plotly.graph_objects as go

from tmerge.plots.style import TEMPLATES

__all__ = ["picture", "pictures_of", "script_json"]

# The room that title and subtitle take in a figure of its own.
_TITLE_HEIGHT = 72


def picture(figure: go.Figure) -> dict[str, Any]:
    """A figure's JSON without template and title, and its title and subtitle as plain text.

    Args:
        figure: From one of this package's functions, so finished by `tmerge.plots.style.finish`.

    Returns:
        ``title``, ``subtitle``, and ``figure`` with ``data`` and ``layout``; the title's height is given back.
    """
    content = json.loads(str(figure.to_json()))
    layout = content["layout"]
    title = layout.pop("title")
    layout.pop("template")
    layout["height"] -= _TITLE_HEIGHT
    layout["margin"]["t"] -= _TITLE_HEIGHT
    words = {"title": html.unescape(title["text"]), "subtitle": html.unescape(title["subtitle"]["text"])}
    return {**words, "figure": {"data": content["data"], "layout": layout}}


def pictures_of(figures: Mapping[str, go.Figure]) -> dict[str, Any]:
    """What a page's script draws figures from: their pictures by name, and the templates for either light."""
    return {
        "templates": {name: TEMPLATES[name].to_plotly_json() for name in ("light", "dark")},
        "pictures": {name: picture(figure) for name, figure in figures.items()},
    }


def script_json(book: Mapping[str, Any]) -> str:
    """JSON that cannot end the script element it stands in."""
    text = json.dumps(book, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")
