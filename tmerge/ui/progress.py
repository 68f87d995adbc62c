"""A run as it goes, drawn: its state, its stages, its log, the layer coupling that fills in, and the verdict."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import plotly.graph_objects as go

from tmerge.plots.style import COLOUR_SCALE, feature_name, finish
from tmerge.quantities import bytes_words, duration_words
from tmerge.report import ScoreRow, alpha_words, score_rows, summary, verdict_tone, verdict_words
from tmerge.stages.step import STAGES
from tmerge.transport import feature_keys
from tmerge.ui.cards import error_card
from tmerge.ui.safe import escape
from tmerge.ui.visitor_run import StageProgress, VisitorRun

__all__ = [
    "coupling_figure",
    "features_begun",
    "files_list",
    "gone_head",
    "head",
    "log_lines",
    "no_run_head",
    "result_cards",
    "stages",
]

_STATES = {
    "waiting": "Waiting",
    "running": "Running",
    "done": "Done",
    "failed": "Failed",
    "cancelled": "Cancelled",
}
_NAMES = {
    "texts": "Texts",
    "target": "Target",
    "source": "Source",
    "transport": "Transport",
    "fuse": "Fuse",
    "choose": "Choose",
    "evaluate": "Evaluate",
    "save": "Save",
}


def head(run: VisitorRun, position: int) -> str:
    """State, place in the queue, time; which pair."""
    words = _STATES[run.state]
    if run.state == "running" and run.cancelling.is_set():
        words = "Stopping"
    facts = []
    if run.report is not None and run.state == "done":
        facts.append(verdict_words(run.report.verdict))
    if run.state == "waiting":
        facts.append(f"{position} run{'s' if position != 1 else ''} before this one" if position else "next")
    if run.started is not None:
        facts.append(duration_words((run.ended or time.time()) - run.started))
    listed = " \u00b7 ".join(facts)
    return (
        f'<div class="run-head" role="status"><span class="state {run.state}">{words}</span>'
        f"<span>{escape(listed)}</span>"
        f'<span class="pairname">{escape(run.recipe.source)} \u2192 {escape(run.recipe.target)}, on '
        f"{escape(run.recipe.calibration.dataset)}, alpha {escape(run.recipe.fusion.alpha)}</span></div>"
    )


def no_run_head() -> str:
    """Where no run is looked at."""
    return (
        '<div class="run-head"><span class="state">No run yet</span>'
        '<span class="pairname">Choose two models and start a merge; it is then shown here, and at its own link.</span>'
        "</div>"
    )


def gone_head() -> str:
    """Where the link's run is not there."""
    return (
        '<div class="run-head"><span class="state failed">This run is not here any more</span>'
        '<span class="pairname">Runs are kept for some hours after they have last been looked at, and not over a '
        "restart of the app. Start it again from the Choose tab.</span></div>"
    )


def stages(run: VisitorRun | None) -> str:
    """All stages, each with a bar: done, under way with its rate and what remains, or to come."""
    rows = []
    names = list(STAGES)
    if run is not None and (run.recipe.fusion.alpha == "auto" or "choose" in run.stages):
        names.insert(names.index("evaluate"), "choose")
    for name in names:
        rows.append(_stage(name, None if run is None else run.stages.get(name), run))
    return f'<div class="steps" role="list" aria-label="Stages of the run">{"".join(rows)}</div>'


def _stage(name: str, stage: StageProgress | None, run: VisitorRun | None) -> str:
    label = escape(_NAMES[name])
    if stage is None or run is None:
        return (
            f'<div class="step later" role="listitem"><span class="name">{label}</span><span class="bar"></span>'
            '<span class="right">to come</span><span class="what">&nbsp;</span></div>'
        )
    current = stage.ended is None
    share = 1.0 if not current else min(1.0, stage.done / max(stage.total, 1))
    state = "now" if current else "done" if run.state != "failed" or run.stages[name] is not _last(run) else "stopped"
    right = [] if current else [duration_words((stage.ended or 0) - stage.began)]
    what = stage.what
    if current:
        right.append(f"{stage.done:,} of {stage.total:,} {stage.unit}" if stage.total > 1 else "under way")
        if stage.rate is not None and stage.total > 1:
            what += f" \u2013 {stage.rate:.3g} {stage.unit} a second"
            if stage.remaining is not None and stage.done < stage.total:
                what += f", {duration_words(stage.remaining)} remain"
    if state == "stopped":
        share = min(1.0, stage.done / max(stage.total, 1))
        right = ["stopped here"]
    percent = round(100 * share)
    return (
        f'<div class="step {state}" role="listitem"><span class="name">{label}</span>'
        f'<span class="bar" role="progressbar" aria-label="{label}" aria-valuemin="0" aria-valuemax="100" '
        f'aria-valuenow="{percent}"><i style="width:{percent}%"></i></span>'
        f'<span class="right">{escape(", ".join(right))}</span>'
        f'<span class="what" title="{escape(what)}">{escape(what)}</span></div>'
    )


def _last(run: VisitorRun) -> StageProgress:
    return list(run.stages.values())[-1]


def log_lines(run: VisitorRun | None) -> str:
    """The log, its end in sight."""
    lines = "\n".join(run.log) if run is not None else ""
    return (
        '<div class="log" role="log" aria-label="Log of the run" tabindex="0">'
        f"<pre>{escape(lines) or 'the log of the run'}</pre></div>"
    )


def features_begun(run: VisitorRun) -> list[str]:
    """Features whose couplings have begun to come in, in their order."""
    return list(dict.fromkeys(row.key for row in list(run.rows)))


def coupling_figure(run: VisitorRun | None, key: str | None) -> go.Figure:
    """The transport costs of all layer pairs of one feature, as far as they are solved.

    Args:
        run: Whose; None for an empty frame.
        key: Feature, such as ``q.post``; None for the one that is being solved.
    """
    rows = [] if run is None else list(run.rows)
    if key is None and rows:
        key = rows[-1].key
    mine = {row.layer: row.costs for row in rows if row.key == key}
    figure = go.Figure()
    title = "Layer coupling" if key is None else f"Layer coupling: {feature_name(key)}"
    if not mine:
        finish(figure, title, "fills in as layer pairs are solved", 440)
        figure.update_xaxes(title={"text": "source layer"}, range=[-0.5, 9.5], showgrid=False, tickvals=[])
        figure.update_yaxes(title={"text": "target layer"}, range=[9.5, -0.5], showgrid=False, tickvals=[])
        return figure.update_layout(margin={"l": 40, "b": 40})
    width = max(map(len, mine.values()))
    height = max(_target_layers(run), max(mine) + 1)
    costs = np.full((height, width), np.nan, dtype=np.float32)
    for layer, values in mine.items():
        costs[layer, : len(values)] = values
    figure.add_trace(
        go.Heatmap(
            # As lists: gaps are then null, which the browser leaves empty.
            z=[[None if np.isnan(value) else round(float(value), 5) for value in row] for row in costs],
            colorscale=COLOUR_SCALE,
            reversescale=True,
            colorbar={
                "title": {"text": "cost", "font": {"size": 12}},
                "thickness": 14,
                "outlinewidth": 0,
                "tickfont": {"size": 12},
            },
            hovertemplate="target layer %{y}, source layer %{x}<br>transport cost %{z:.4f}<extra></extra>",
            hoverongaps=False,
        )
    )
    finish(
        figure,
        title,
        f"cost of transporting one layer's features to the other's, lower is closer; {len(mine)} of {height} rows",
        440,
        xaxis={"title": {"text": "source layer"}, "range": [-0.5, width - 0.5], **_ticks(width)},
        yaxis={"title": {"text": "target layer"}, "range": [height - 0.5, -0.5], **_ticks(height)},
    )
    return figure


def _ticks(layers: int) -> dict[str, Any]:
    """A number at every layer, or at every few of many."""
    return {"tick0": 0, "dtick": max(1, -(-layers // 12)), "showgrid": False, "zeroline": False}


def _target_layers(run: VisitorRun | None) -> int:
    """Rows that a feature's matrix will have, from how many layers the stage counts in all."""
    if run is None or "transport" not in run.stages:
        return 0
    keys = len(feature_keys(list(run.recipe.fusion.projections)))
    total = run.stages["transport"].total
    return total // keys if total % keys == 0 else 0


def result_cards(run: VisitorRun) -> str:
    """How it ended: the verdict and its numbers, or why there is none."""
    if run.state == "failed":
        return error_card("A fault of ours" if run.fault else "The run failed", run.error or "")
    if run.state == "cancelled":
        return '<div class="card quiet"><p class="card-title">Cancelled</p><p>Nothing of this run is kept.</p></div>'
    report = run.report
    if run.state != "done" or report is None:
        return ""
    body = "".join(map(_score_row, score_rows(report)))
    ratios = "".join(
        f"<div><dt>{escape(name)}</dt><dd>{_median(item.norm_ratio):.3g}</dd></div>"
        for name, item in report.fusion.projections.items()
    )
    remarks = "".join(f"<li>{escape(line)}</li>" for line in report.notes)
    listed = f'<ul class="notes">{remarks}</ul>' if remarks else ""
    return (
        f'<section class="card" aria-label="Verdict"><p class="verdict {verdict_tone(report.verdict)}">'
        f"{escape(verdict_words(report.verdict))}</p>"
        f"<p>{escape(summary(report))}</p>"
        '<div class="scroll"><table class="plain"><caption class="unseen">Bits per byte on held-out texts</caption>'
        '<thead><tr><th scope="col"></th><th scope="col">bits per byte</th><th scope="col">95 % interval</th>'
        '<th scope="col">against the target</th><th scope="col">95 % interval</th></tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
        f'<p class="small" style="margin-top:10px">Alpha {escape(alpha_words(report.fusion))}. Transported weight '
        f'over target weight, median over the layers:</p><dl class="big">{ratios}</dl>{listed}</section>'
    )


def _score_row(row: ScoreRow) -> str:
    return f'<tr><th scope="row">{escape(row.label)}</th>{"".join(f"<td>{cell}</td>" for cell in row.cells)}</tr>'


def _median(values: Sequence[float | None]) -> float:
    known = [value for value in values if value is not None]
    return float(np.median(known)) if known else np.nan


def files_list(run: VisitorRun) -> str:
    """The files that a finished run has made, with their sizes."""
    if run.state != "done":
        return ""
    cache = run.folder / "tmerge" / "cache"
    found = sorted(path for path in run.folder.rglob("*") if path.is_file() and cache not in path.parents)
    rows = "".join(
        f'<tr><th scope="row" class="break"><code>{escape(path.relative_to(run.folder))}</code></th>'
        f"<td>{escape(bytes_words(path.stat().st_size))}</td></tr>"
        for path in found
    )
    return (
        '<div class="card"><p class="card-title">Files of the model</p><table class="plain">'
        f'<caption class="unseen">Files of the model and their sizes</caption><tbody>{rows}</tbody></table></div>'
    )
