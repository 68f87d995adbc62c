"""How results and progress look on a terminal: rich tables on stdout, a progress line on stderr."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from tmerge.hub import PushPlan
from tmerge.preflight.check import Check
from tmerge.report import (
    Descent,
    Report,
    alpha_words,
    bytes_words,
    duration_words,
    ratio_words,
    score_rows,
    solved_words,
    summary,
)
from tmerge.stages.merge import Listener, Step
from tmerge.stages.step import NOTE
from tmerge.tables import added_words

__all__ = [
    "listening",
    "show_adapted",
    "show_check",
    "show_comparison",
    "show_evaluation",
    "show_push_plan",
    "show_report",
]


@contextmanager
def listening() -> Iterator[Listener]:
    """A listener that shows every step: a live line on a terminal, plain lines elsewhere."""
    console = Console(stderr=True)
    if console.is_terminal:
        with _bar(console) as listener:
            yield listener
    else:
        yield _plain(console)


def show_check(result: Check) -> None:
    """What `check` found, side by side."""
    console = Console(soft_wrap=True)
    facts = result.to_dict()
    table = Table(title="tmerge check", title_justify="left")
    for heading in ("", "target", "source"):
        table.add_column(heading)
    target, source = facts["target"], facts["source"]
    for label, key in (
        ("model", "ref"),
        ("commit", "commit"),
        ("architecture", "architecture"),
        ("parameters", "parameters"),
        ("weights", "weight_bytes"),
        ("layers", "layers"),
        ("width", "hidden_size"),
        ("heads", "heads"),
        ("key/value heads", "kv_heads"),
        ("tied embeddings", "tied_embeddings"),
        ("licence", "licence"),
        ("gated", "gated"),
        ("private", "private"),
        ("stored as", "stored"),
        ("to download", "download_bytes"),
    ):
        if key != "stored" or target[key] or source[key]:
            table.add_row(label, _value(key, target[key]), _value(key, source[key]))
    for name, shapes in facts["projections"]["matched"].items():
        table.add_row(f"projection {name}", *("{} x {}".format(*shapes[side]) for side in ("target", "source")))
    console.print(table)
    for name, why in facts["projections"]["skipped"].items():
        console.print(f"skipped: {name}: {why}", markup=False)
    for side in ("target", "source"):
        for line in facts["left_alone"][side]:
            console.print(f"{side}: {line}", markup=False)
    for note in facts["notes"]:
        console.print(f"note: {note}", markup=False)
    licence = facts["licence"]
    console.print(f"the merge's licence: {licence['name'] or licence['id']}. {licence['why']}", markup=False)
    for duty in licence["duties"]:
        console.print(f"  duty: {duty}", markup=False)
    for what, url in licence["links"]:
        console.print(f"  terms: {what}, {url}", markup=False)
    estimate = facts["estimate"]
    console.print(
        f"expected: {estimate['time']}, {bytes_words(estimate['memory_bytes'])} of memory, "
        f"{bytes_words(estimate['disk_bytes'])} of disk, {bytes_words(estimate['download_bytes'])} to download "
        f"({estimate['assumes']})",
        markup=False,
    )


def show_push_plan(planned: PushPlan) -> None:
    """What a push would upload, and its card, on stdout."""
    console = Console(soft_wrap=True)
    for name, size in planned.files.items():
        console.print(f"{size:>14,}  {name}", markup=False, highlight=False)
    total = f"{planned.total_bytes:>14,}  {len(planned.files)} files to {planned.repo}"
    console.print(f"{total}; nothing was pushed", markup=False, highlight=False)
    for warning in planned.warnings:
        console.print(f"note: {warning}", markup=False)
    console.print()
    console.print(planned.card, markup=False, highlight=False)


def show_report(report: Report, folder: str | Path, page: Path | None = None) -> None:
    """A run's report: verdict, scores, what was moved, where the time went."""
    console = Console(soft_wrap=True)
    evaluation, timing = report.evaluation, report.timing
    console.print(_scores(report))
    fusion = report.fusion
    moved = Table(
        title=f"fusion: alpha {alpha_words(fusion)}, scale {fusion.scale}, {fusion.what}", title_justify="left"
    )
    for heading in ("projection", "neurons", "transported / own norm", "bias"):
        moved.add_column(heading)
    for name, fused in fusion.projections.items():
        moved.add_row(name, f"{fused.neurons} of {fused.of}", ratio_words(fused.norm_ratio), fused.bias)
    console.print(moved)
    if evaluation.descent is not None:
        console.print(_descent(evaluation.descent))
    stages = Table(title="time and memory", title_justify="left")
    for heading in ("stage", "seconds", "of which forward passes", "peak memory"):
        stages.add_column(heading)
    for stage in report.stages:
        seconds = (f"{stage.seconds:.1f}", f"{stage.forward_seconds:.1f}")
        stages.add_row(stage.name, *seconds, bytes_words(stage.peak_rss_bytes))
    stages.add_row("all", f"{timing.total_seconds:.1f}", f"{timing.forward_seconds:.1f}", "")
    console.print(stages)
    console.print(f"transport: {solved_words(report.transport)}", markup=False)
    for name, why in report.projections.skipped.items():
        console.print(f"skipped: {name}: {why}", markup=False)
    for line in (*report.projections.left_alone, *report.notes):
        console.print(f"note: {line}", markup=False)
    console.print(summary(report), style="bold red" if report.verdict == "hurts" else "bold", markup=False)
    pictures = f"tmerge inspect {folder} --html report.html" if page is None else page
    console.print(f"The model is in {folder}; its pictures: {pictures}", markup=False)


def show_adapted(report: Report, folder: Path) -> None:
    """An adapted model's scores beside the merge's, on stdout."""
    console = Console(soft_wrap=True)
    adaptation = report.adaptation
    assert adaptation is not None  # the report is of a training
    console.print(_scores(report))
    losses = adaptation.loss_curve
    console.print(
        f"{adaptation.objective}, residual {adaptation.residual}: {len(losses)} steps, {adaptation.tokens:,} "
        f"tokens, {adaptation.seconds:.1f} s; loss {losses[0][1]:.4f} at first, {losses[-1][1]:.4f} at last",
        markup=False,
    )
    console.print(f"The model is in {folder}. Verdict against the target: {adaptation.verdict}", markup=False)


def _scores(report: Report) -> Table:
    """Every model's held-out score."""
    table = Table(
        title=f"bits per byte on {report.evaluation.texts} held-out texts, lower is better", title_justify="left"
    )
    for heading in ("", "bits per byte", "95 %", "difference to the target", "95 %"):
        table.add_column(heading)
    for row in score_rows(report):
        table.add_row(row.label, *row.cells)
    return table


def show_comparison(result: Mapping[str, Any], folder: Path) -> None:
    """A comparison's rows, its choice of alpha and its descent control, on stdout."""
    console = Console()
    table = Table(title=f"bits per byte on {result['texts']} held-out texts, lower is better", title_justify="left")
    for heading in ("row", "bits per byte", "difference to base", "95 %", "tokens", "steps", "seconds"):
        table.add_column(heading)
    for row in result["rows"]:
        change = row.get("difference")
        cells = [f"{change['value']:+.4f}", "{:+.4f} to {:+.4f}".format(*change["ci95"])] if change else ["", ""]
        counts = [str(row["tokens"] or ""), str(row["steps"] or ""), f"{row['seconds']:.1f}"]
        table.add_row(row["name"], f"{row['value']:.4f}", *cells, *counts)
    console.print(table)
    for item in result["added"]:
        console.print(added_words(item), markup=False, highlight=False)
    console.print(_descent(Descent.model_validate(result["descent"])))
    console.print(
        f"The same with figures: {folder / 'compare.html'}; as Markdown: {folder / 'compare.md'}", markup=False
    )


def show_evaluation(result: Mapping[str, Any]) -> None:
    """Models on texts and tasks, on stdout."""
    console = Console()
    first = result["models"][0]
    measures = [("bits_per_byte", f"bits per byte on {result['texts']} texts, lower is better")] * bool(result["texts"])
    measures += [
        (name, f"{name}: {item['metric']} on {item['questions']} questions, higher is better")
        for name, item in first.get("tasks", {}).items()
    ]
    for name, title in measures:
        table = Table(title=title, title_justify="left")
        for heading in ("model", "value", "95 %", "difference to the first", "95 %"):
            table.add_column(heading)
        for model in result["models"]:
            item = model[name] if name == "bits_per_byte" else model["tasks"][name]
            change = item.get("difference")
            cells = [f"{item['value']:.4f}", "{:.4f} to {:.4f}".format(*item["ci95"])]
            cells += [f"{change['value']:+.4f}", "{:+.4f} to {:+.4f}".format(*change["ci95"])] if change else ["", ""]
            table.add_row(model["model"], *cells)
        console.print(table)


def _descent(control: Descent) -> Table:
    """Whether the merge points where the calibration loss falls."""
    table = Table(
        title=f"descent: cosine with the negative gradient of the loss on {control.texts} calibration texts, "
        "mean over layers (standard error)",
        title_justify="left",
    )
    for heading in ("projection", "merge", "random directions"):
        table.add_column(heading)
    for name, item in control.projections.items():
        means = ((item.mean, item.standard_error), (item.noise_mean, item.noise_standard_error))
        table.add_row(name, *(f"{mean:+.5f}" + ("" if error is None else f" ({error:.1e})") for mean, error in means))
    return table


@contextmanager
def _bar(console: Console) -> Iterator[Listener]:
    columns = (
        TextColumn("[bold]{task.fields[stage]:<9}"),
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as progress:
        tasks: dict[tuple[str, str], Any] = {}

        def listener(step: Step) -> None:
            if step.stage == NOTE:
                progress.console.print(f"note: {step.what}", markup=False, highlight=False)
                return
            place = (step.stage, step.what)
            if place not in tasks:
                tasks[place] = progress.add_task(step.what, total=step.total, stage=step.stage, rate="")
            task = tasks[place]
            speed = progress.tasks[task].speed
            rate = f"{speed:.1f} {step.unit}/s" if speed else ""
            progress.update(task, completed=step.done, total=step.total, rate=rate)

        yield listener


def _plain(console: Console) -> Listener:
    """A line when something begins, at each quarter of it, and when it ends."""
    began: dict[tuple[str, str], float] = {}
    shown: dict[tuple[str, str], int] = {}

    def listener(step: Step) -> None:
        if step.stage == NOTE:
            console.print(f"note: {step.what}", markup=False, highlight=False)
            return
        place = (step.stage, step.what)
        now = time.perf_counter()
        began.setdefault(place, now)
        quarter = 4 * step.done // max(step.total, 1)
        if shown.get(place) == quarter:
            return
        shown[place] = quarter
        line = f"[{step.stage}] {step.what}: {step.done}/{step.total} {step.unit}"
        elapsed = now - began[place]
        if step.done and elapsed > 0.5:
            rate = step.done / elapsed
            line += f", {rate:.1f} {step.unit}/s"
            if step.done < step.total:
                line += f", {duration_words((step.total - step.done) / rate)} remaining"
        console.print(line, markup=False, highlight=False)

    return listener


def _value(key: str, value: Any) -> str:
    if value is None:
        return "not known" if key in ("stored", "download_bytes") else "not stated"
    if key == "stored":
        return ", ".join(f"{dtype} {count:,}" for dtype, count in value.items())
    if key in ("weight_bytes", "download_bytes"):
        return bytes_words(value)
    if key == "commit":
        return str(value).removeprefix("sha256:")[:12]
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:,}" if isinstance(value, int) else str(value)
