"""A run as it goes, drawn: its state, its stages, its log, the layer coupling that fills in, and the verdict."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import plotly.graph_objects as go

from tmerge.plots.style import COLOUR_SCALE, feature_name, finish
from tmerge.plots.words import score_cells
from tmerge.quantities import duration_words
from tmerge.report import (
    Report,
    alpha_words,
    is_related,
    next_words,
    ratio_heading,
    relatedness_words,
    summary,
    training_summary,
    verdict_tone,
    verdict_words,
)
from tmerge.stages.step import STAGES, stage_names, stages_until
from tmerge.transport import feature_keys
from tmerge.ui.parts.cards import empty_card, error_card
from tmerge.ui.parts.safe import render
from tmerge.ui.server.downloads import files_of
from tmerge.ui.server.overall import overall
from tmerge.ui.server.visitor_run import StageProgress, VisitorRun

__all__ = [
    "coupling_figure",
    "features_begun",
    "files_list",
    "head",
    "head_without_run",
    "log_lines",
    "result_cards",
    "stages",
]

_FILE = "progress.html"
_NEXT = "Next: train a little on top of it, 50 steps, with the button below"
_COMPARED = "Trainings with the merge and without it, at equal budget, are beside it in the Look tab"
_TRAINED = {
    "helps": "Better than the target, after training",
    "no difference": "After training no difference to the target that these texts can show",
    "hurts": "Worse than the target, after training",
}
_NAMES = {
    "texts": "Split texts",
    "target": "Read target",
    "source": "Read source",
    "transport": "Solve plans",
    "fuse": "Fuse weights",
    "reconstruct": "Fit blocks",
    "choose": "Pick alpha",
    "evaluate": "Score texts",
    "save": "Write model",
    "adapt": "Train",
    "compare": "Compare",
}


def head(run: VisitorRun, position: int, wait: float | None = None) -> str:
    """State, place in the queue, time, how far the whole of it is; which pair.

    Args:
        run: Whose.
        position: How many runs are before it.
        wait: Seconds that those take, if known.
    """
    state, tone = run.state.capitalize(), str(run.state)
    if run.state == "running" and run.cancelling.is_set():
        state = "Stopping"
    facts = []
    if run.report is not None and run.state == "done":
        # Green is for what beats every control, not for having come to an end.
        tone, words = _verdict(run.report)
        facts.append(words)
    if run.example is not None:
        facts.append("a recorded run")
    if run.state == "waiting":
        facts.append(f"{position} run{'s' if position != 1 else ''} before this one" if position else "next")
        if wait:
            facts.append(f"begins in about {duration_words(wait)}")
    if run.started is not None:
        facts.append(duration_words((run.ended or time.time()) - run.started))
    whole = overall(run)
    if whole is not None and whole.remaining is not None:
        facts.append(f"about {duration_words(whole.remaining)} to go")
    percent = None if whole is None else round(100 * whole.share)
    return render(_FILE, "head", run=run, state=state, tone=tone, facts=facts, percent=percent)


def _verdict(report: Report) -> tuple[str, str]:
    """Tone and words of what a run's folder holds; a training has no control to beat, so none is green."""
    if report.adaptation is None:
        return verdict_tone(report.verdict), verdict_words(report.verdict)
    verdict = report.published_verdict
    tone = "better" if verdict == "helps" else verdict_tone(verdict)
    return tone, _TRAINED.get(verdict, verdict_words(verdict))


def head_without_run(gone: str = "") -> str:
    """Where no run is looked at, or one that is not there any more, with why."""
    return render(_FILE, "head_without_run", gone=gone)


def stages(run: VisitorRun | None) -> str:
    """All stages, each with a bar: done, under way with its rate and what remains, or to come."""
    names = list(STAGES) if run is None else _stage_names(run)
    rows = [_stage(name, None if run is None else run.stages.get(name), run) for name in names]
    return render(_FILE, "stages", rows=rows)


def _stage_names(run: VisitorRun) -> list[str]:
    if run.asks == "training":
        return ["adapt"]
    if run.asks == "relatedness":
        return stages_until(run.recipe, "transport")
    names = stage_names(run.recipe)
    # A comparison does those again that the merge was not asked for.
    return names if run.asks == "merge" else [*(name for name in names if name in run.stages), "compare"]


@dataclass(frozen=True)
class _StageRow:
    """A stage as it is drawn; of one that is to come there is no more than its name."""

    label: str
    state: str
    percent: int | None = None
    right: str = ""
    what: str = ""


def _stage(name: str, stage: StageProgress | None, run: VisitorRun | None) -> _StageRow:
    label = _NAMES[name]
    if stage is None or run is None:
        return _StageRow(label, "later")
    percent = round(100 * min(1.0, stage.done / max(stage.total, 1)))
    if stage.ended is not None:
        if run.state == "failed" and stage is list(run.stages.values())[-1]:
            return _StageRow(label, "stopped", percent, "stopped here", stage.what)
        return _StageRow(label, "done", 100, duration_words(stage.ended - stage.began), stage.what)
    if stage.total <= 1:
        return _StageRow(label, "now", percent, "under way", stage.what)
    what = stage.what
    if stage.rate is not None:
        what += f" \u2013 {stage.rate:.3g} {stage.unit} a second"
        remaining = stage.remaining(time.time())
        if remaining is not None:
            what += f", {duration_words(remaining)} remain"
    return _StageRow(label, "now", percent, f"{stage.done:,} of {stage.total:,} {stage.unit}", what)


def log_lines(run: VisitorRun | None) -> str:
    """The log, its end in sight."""
    return render(_FILE, "log", lines="\n".join(run.log) if run is not None else "")


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
    costs_of: dict[int, list[float | None]] = {
        row.layer: [round(cost, 5) for cost in row.costs] for row in rows if row.key == key
    }
    figure = go.Figure()
    title = "Layer coupling" if key is None else f"Layer coupling: {feature_name(key)}"
    width, height, told = 10, 10, "fills in as layer pairs are solved"
    if costs_of:
        width = max(map(len, costs_of.values()))
        height = max(_target_layers(run), max(costs_of) + 1)
        told = f"cost, lower is closer; {len(costs_of)} of {height} rows"
        figure.add_trace(
            go.Heatmap(
                # What is not solved is null, which the browser leaves empty.
                z=[costs_of.get(layer, [None] * width) for layer in range(height)],
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
        told,
        440,
        xaxis={"title": {"text": "source layer"}, "range": [-0.5, width - 0.5], **_ticks(width, costs_of)},
        yaxis={"title": {"text": "target layer"}, "range": [height - 0.5, -0.5], **_ticks(height, costs_of)},
    )
    # Numbers make room for themselves.
    return figure if costs_of else figure.update_layout(margin={"l": 40, "b": 40})


def _ticks(layers: int, numbered: object) -> dict[str, Any]:
    """A number at every layer, or at every few of many."""
    ticks: dict[str, Any] = {"tick0": 0, "dtick": max(1, -(-layers // 12))} if numbered else {"tickvals": []}
    return {"showgrid": False, "zeroline": False, **ticks}


def _target_layers(run: VisitorRun | None) -> int:
    """Rows that a feature's matrix will have, from how many layers the stage counts in all."""
    if run is None or "transport" not in run.stages:
        return 0
    keys = len(feature_keys(list(run.recipe.fusion.projections)))
    stage = run.stages["transport"]
    return stage.total // keys if stage.unit == "layers" and stage.total % keys == 0 else 0


def result_cards(run: VisitorRun) -> str:
    """How it ended: the verdict and its numbers, or why there is none."""
    if run.state == "failed":
        return error_card("A fault of ours" if run.fault else "The run failed", run.error or "")
    if run.state == "cancelled":
        return empty_card("Cancelled", "What it had finished is kept for a while, and it can be continued from there.")
    if run.relatedness is not None:
        related = is_related(run.relatedness)
        return render(_FILE, "relatedness", related=related, sentence=relatedness_words(run.relatedness))
    report = run.report
    if run.state != "done" or report is None:
        return ""
    return render(
        _FILE,
        "result",
        report=report,
        verdict=_verdict(report),
        sentence=training_summary(report) or summary(report),
        rows=score_cells(report),
        ratios=[(name, f"{_median(item.norm_ratio):.3g}") for name, item in report.fusion.projections.items()],
        alpha=alpha_words(report.fusion),
        ratio=ratio_heading(report.fusion),
        following=_COMPARED if run.asks == "comparison" else _NEXT if next_words(report) else "",
    )


def _median(values: Sequence[float | None]) -> float:
    known = [value for value in values if value is not None]
    return statistics.median(known) if known else math.nan


def files_list(run: VisitorRun, *, local: bool = False) -> str:
    """The files that a finished run has made, each to be fetched, and all as one; of a recorded run what was kept.

    Args:
        run: Whose.
        local: Whether the app is its visitor's own, who may go to the folder.
    """
    if run.report is None:
        return ""
    sizes = [(path.as_posix(), (run.folder / path).stat().st_size) for path in files_of(run.folder)]
    return render(_FILE, "files", run=run, sizes=sizes, total=sum(size for _, size in sizes), shown=local)
