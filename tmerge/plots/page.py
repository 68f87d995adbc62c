"""The report page: one HTML file with everything in it, plotly.js included, that asks nothing of any network."""

from __future__ import annotations

import base64
import html
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from plotly.offline import get_plotlyjs

from tmerge.plots.assets import SCRIPT, STYLE
from tmerge.plots.blocks import Blocks, Order, plan_blocks, plan_entries
from tmerge.plots.charts import norm_ratios, scores, timing, top_mass, training_loss
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
from tmerge.plots.picture import picture
from tmerge.plots.style import TEMPLATES, feature_name, numbers
from tmerge.plots.words import CAPTIONS, facts, findings, model_rows, ratio_rows, score_cells
from tmerge.report import Report, training_summary, verdict_tone
from tmerge.transport import TransportRecord

__all__ = ["report_page"]

# What the feature plans of a page may take, in bytes, and how many blocks they have along a side.
_PLAN_BYTES = 5_000_000
_PLAN_SIZE = 88
_ORDERS: tuple[Order, ...] = ("structure", "natural")

# Nothing may be fetched, even if a name from a model should slip through unescaped.
_POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:; "
    "form-action 'none'; base-uri 'none'"
)

_SCORE_HEADINGS = ("model", "bits per byte\n95 % interval", "difference to the target\n95 % interval")


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
        "scores": scores(report),
        "norms": norm_ratios(report),
        "mass": top_mass(record),
        "timing": timing(report),
    }
    book = {
        "templates": {name: TEMPLATES[name].to_plotly_json() for name in ("light", "dark")},
        "pictures": {name: picture(figure) for name, figure in pictures.items()},
        "coupling": {projection: _coupling(record, projection) for projection in record.projections},
        "features": _features(record),
    }
    title = f"{_short(report.target.ref)} merged with {_short(report.source.ref)}"
    return "\n".join(
        [
            "<!DOCTYPE html>",
            '<html lang="en">',
            "<head>",
            '<meta charset="utf-8">',
            f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{html.escape(title)}: tmerge report</title>",
            f"<style>{STYLE}</style>",
            "</head>",
            "<body>",
            "<main>",
            *_body(report, title, folder_name),
            "</main>",
            f'<script type="application/json" id="book">{_json(book)}</script>',
            f"<script>{get_plotlyjs()}</script>",
            f"<script>{SCRIPT}</script>",
            "</body>",
            "</html>",
            "",
        ]
    )


def _body(report: Report, title: str, folder_name: str | None) -> Iterable[str]:
    first, *rest = findings(report)
    yield f"<header><h1>{html.escape(title)}</h1>"
    where = f"<code>{html.escape(folder_name)}</code>, " if folder_name else ""
    yield f'<p class="soft">{where}tmerge {html.escape(report.tmerge)}</p></header>'
    yield f'<section class="verdict {verdict_tone(report.verdict)}" aria-label="Verdict">'
    yield f'<p class="word">{html.escape(first)}</p>'
    yield from (f"<p>{html.escape(sentence)}</p>" for sentence in rest)
    yield "</section>"
    yield "<noscript><p>The pictures on this page are drawn by its own script, which is switched off.</p></noscript>"

    yield "<h2>Did it help?</h2>"
    yield '<div class="side">'
    yield _figure("scores")
    yield _table(_SCORE_HEADINGS, score_cells(report), "Scores")
    yield "</div>"

    if report.adaptation is not None:
        yield "<h2>After training</h2>"
        yield f"<p>{html.escape(training_summary(report))}</p>"
        yield _figure("loss")

    yield "<h2>What was merged</h2>"
    yield '<div class="side">'
    yield _table(("", "target", "source"), model_rows(report), "Models")
    yield _table(("", ""), facts(report), "Settings and data")
    yield "</div>"
    remarks = [
        *(f"{name} was skipped: {why}" for name, why in report.projections.skipped.items()),
        *report.projections.left_alone,
        *report.notes,
    ]
    if remarks:
        yield f"<ul>{''.join(f'<li>{html.escape(remark)}</li>' for remark in remarks)}</ul>"

    yield "<h2>How much arrived</h2>"
    yield '<div class="side">'
    yield _figure("norms")
    headings = ("projection", "neurons fused", "transported over own norm, by layer", "bias")
    yield _table(headings, ratio_rows(report), "Projections")
    yield "</div>"

    yield "<h2>Which layers meet</h2>"
    yield _choices(("projection", "projection"), ("which", "side"))
    yield f'<div class="side">{_figure("coupling")}{_figure("flow")}</div>'

    yield "<h2>Which neurons meet</h2>"
    yield _choices(("feature", "feature"), ("layer", "target layer"), ("order", "order of neurons"))
    yield f'<div class="side">{_figure("plan")}{_figure("mass")}</div>'

    yield "<h2>Time</h2>"
    yield _figure("timing")
    versions = ", ".join(f"{name} {version}" for name, version in report.versions.items())
    yield f'<p class="soft">{html.escape(versions)}</p>'


def _figure(name: str) -> str:
    return (
        f'<figure><h3 id="{name}-title"></h3><p class="subtitle" id="{name}-subtitle"></p>'
        f'<div id="{name}" role="img"></div><figcaption>{html.escape(CAPTIONS[name])}</figcaption></figure>'
    )


def _choices(*names: tuple[str, str]) -> str:
    boxes = (f'<label>{html.escape(label)}<select id="choose-{name}"></select></label>' for name, label in names)
    return f'<div class="choices">{"".join(boxes)}</div>'


def _table(headings: Sequence[str], rows: Iterable[Sequence[str]], caption: str) -> str:
    head = "".join(f'<th scope="col">{_cell(heading)}</th>' for heading in headings)
    body = "".join(
        f'<tr><th scope="row">{_cell(first)}</th>' + "".join(f"<td>{_cell(cell)}</td>" for cell in cells) + "</tr>"
        for first, *cells in rows
    )
    head = f"<thead><tr>{head}</tr></thead>" if any(headings) else ""
    return (
        f'<div class="scroll"><table><caption>{html.escape(caption)}</caption>{head}<tbody>{body}</tbody></table></div>'
    )


def _cell(text: str) -> str:
    """A cell's text; its second line is a smaller one."""
    first, _, second = text.partition("\n")
    return html.escape(first) + (f"<small>{html.escape(second)}</small>" if second else "")


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


def _json(book: Mapping[str, Any]) -> str:
    """JSON that cannot end the script element it stands in."""
    text = json.dumps(book, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")


def _short(reference: str) -> str:
    return reference.partition("@")[0].rstrip("/").rpartition("/")[2].removeprefix("demo:")
