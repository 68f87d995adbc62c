"""The report page: one HTML file with everything in it, plotly.js included, that asks nothing of any network."""

from __future__ import annotations

import base64
from typing import Any

import numpy as np
from plotly.offline import get_plotlyjs

from tmerge.plots.blocks import Blocks, Order, plan_blocks, plan_entries
from tmerge.plots.charts import fit_errors, norm_ratios, scores, timing, top_mass, training_loss
from tmerge.plots.heatmaps import (
    Side,
    blocks_figure,
    layer_coupling,
    layer_flow,
    layer_number,
    log_density,
    pair_words,
    strongest_pairs,
)
from tmerge.plots.picture import picture, pictures_of, script_json
from tmerge.plots.style import feature_name, numbers
from tmerge.plots.words import CAPTIONS, facts, findings, model_rows, ratio_rows, score_cells
from tmerge.report import Report, ratio_heading, short_name, training_summary, verdict_tone
from tmerge.templates import html_templates, static_text
from tmerge.transport import TransportRecord

__all__ = ["report_page"]

# What the feature plans of a page may take, in bytes, and how many blocks they have along a side.
_PLAN_BYTES = 5_000_000
_PLAN_SIZE = 88
_ORDERS: tuple[Order, ...] = ("structure", "natural")

_TEMPLATES = html_templates("tmerge.plots", keep_trailing_newline=True)
_TEMPLATES.filters |= {
    "facts": facts,
    "findings": findings,
    "model_rows": model_rows,
    "ratio_heading": ratio_heading,
    "ratio_rows": ratio_rows,
    "score_cells": score_cells,
    "tone": verdict_tone,
    "training_summary": training_summary,
}


def report_page(report: Report, record: TransportRecord, folder_name: str | None = None) -> str:
    """One self-contained HTML page on a finished run.

    Args:
        report: report.json.
        record: transport.safetensors of the same run.
        folder_name: Shown in the page's head; left out if None.

    Returns:
        The page, about 5 MB of plotly.js and at most about as much of data. It needs no network and no files.
    """
    pictures = {
        **({} if report.adaptation is None else {"loss": training_loss(report.adaptation)}),
        **({} if report.fusion.fit is None else {"fit": fit_errors(report)}),
        "scores": scores(report),
        "norms": norm_ratios(report),
        "mass": top_mass(record),
        "timing": timing(report),
    }
    book = {
        **pictures_of(pictures),
        "coupling": {projection: _coupling(record, projection) for projection in record.projections},
        "features": _features(record),
    }
    return _TEMPLATES.get_template("report.html").render(
        report=report,
        title=f"{short_name(report.target.ref)} merged with {_merged(report)}",
        folder_name=folder_name,
        captions=CAPTIONS,
        book=script_json(book),
        style=static_text("tmerge.plots", "page.css"),
        plotly=get_plotlyjs(),
        script="".join(static_text("tmerge.plots", name) for name in ("figure.js", "page.js", "report.js")),
    )


def _coupling(record: TransportRecord, projection: str) -> dict[str, Any]:
    sides: tuple[Side, ...] = ("effective", "pre", "post")
    pictures: dict[str, Any] = {side: picture(layer_coupling(record, projection, side)) for side in sides}
    return {**pictures, "flow": picture(layer_flow(record, projection))}


def _features(record: TransportRecord) -> dict[str, Any]:
    """Frames, and for every feature the strongest plan of every target layer, or of as many as there is room for."""
    frames = {order: picture(blocks_figure(order))["figure"] for order in _ORDERS}
    each = 2 * (_PLAN_SIZE**2 * 4 / 3) + 2 * _PLAN_SIZE * 36
    room = max(1, int(_PLAN_BYTES / each / len(record.keys)))
    listed = []
    for key in record.keys:
        pairs = strongest_pairs(record, key)
        if len(pairs) > room:
            pairs = [pairs[place] for place in np.linspace(0, len(pairs) - 1, room).round().astype(int)]
        listed.append({"key": key, "name": feature_name(key), "pairs": [_pair(record, key, *pair) for pair in pairs]})
    return {"frames": frames, "list": listed}


def _pair(record: TransportRecord, key: str, row: int, column: int) -> dict[str, Any]:
    entries = plan_entries(record.plans(key), record.pairs(key).index((row, column)))
    blocks = {order: plan_blocks(entries, _PLAN_SIZE, order) for order in _ORDERS}
    target, source = layer_number(record, key, row, column)
    title, subtitle = pair_words(record, key, row, column, blocks["structure"])
    pictures: dict[str, Any] = {order: _levels(found) for order, found in blocks.items()}
    return {
        "target": target,
        "source": source,
        "shape": entries.shape,
        "title": title,
        "subtitle": subtitle,
        **pictures,
    }


def _levels(blocks: Blocks) -> dict[str, Any]:
    """A plan's colours as bytes: 1 at the lower end of its scale, 255 at the upper, 0 where no mass is."""
    z, low, high = log_density(blocks)
    levels = np.where(blocks.mass > 0, 1 + np.round(254 * (z - low) / (high - low)), 0).astype(np.uint8)
    return {
        "levels": base64.b64encode(levels.tobytes()).decode(),
        "low": round(low, 4),
        "high": round(high, 4),
        "rows": [numbers(group.tolist()) for group in blocks.rows],
        "columns": [numbers(group.tolist()) for group in blocks.columns],
    }


def _merged(report: Report) -> str:
    """The source, or several of them."""
    return " and ".join(short_name(each.reference) for each in report.sources) or short_name(report.source.ref)
