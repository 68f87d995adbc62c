"""How results look on a terminal: tables on stdout."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from tmerge.comparison.evaluate import Evaluation
from tmerge.comparison.result import Comparison
from tmerge.comparison.scores import Compared
from tmerge.comparison.tables import (
    DETECTABLE_WORDS,
    MARGIN_WORDS,
    ROW_HEADINGS,
    added_words,
    change_cells,
    detectable_cell,
    row_cells,
)
from tmerge.hub import PushPlan
from tmerge.preflight.check import Check
from tmerge.quantities import bytes_words
from tmerge.recipe import source_name
from tmerge.report import (
    Descent,
    Report,
    how_words,
    interval_words,
    next_words,
    ratio_heading,
    ratio_words,
    score_rows,
    score_words,
    solved_words,
    summary,
)

__all__ = [
    "show_adapted",
    "show_check",
    "show_comparison",
    "show_evaluation",
    "show_push_plan",
    "show_report",
]


def show_check(result: Check) -> None:
    """What `check` found, side by side."""
    console = Console(soft_wrap=True)
    facts = result.document()
    table = Table(title="tmerge check", title_justify="left")
    target, source = facts.target, facts.source
    held = {"target": target, "source_base" if facts.sources else "source": source}
    held |= {source_name(number): model for number, model in enumerate(facts.sources, start=1)}
    for heading in ("", *held):
        table.add_column(heading)
    for label, key in (
        ("model", "name"),
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
        if key != "stored" or target.stored or source.stored:
            table.add_row(label, *(_value(key, getattr(model, key)) for model in held.values()))
    for name, sizes in facts.projections.matched.items():
        table.add_row(f"projection {name}", *("{} x {}".format(*size) for size in (sizes.target, sizes.source)))
    console.print(table)
    for name, why in facts.projections.skipped.items():
        console.print(f"skipped: {name}: {why}", markup=False)
    for role, lines in (("target", facts.left_alone.target), ("source", facts.left_alone.source)):
        for line in lines:
            console.print(f"{role}: {line}", markup=False)
    for note in facts.notes:
        console.print(f"note: {note}", markup=False)
    licence = facts.licence
    console.print(f"the merge's licence: {licence.name or licence.id}. {licence.why}", markup=False)
    for duty in licence.duties:
        console.print(f"  duty: {duty}", markup=False)
    for what, url in licence.links:
        console.print(f"  terms: {what}, {url}", markup=False)
    estimate = facts.estimate
    longest = sorted(estimate.stages.items(), key=lambda stage: -stage[1])[:3]
    share = ", ".join(f"{name} {seconds / max(estimate.seconds, 1e-9):.0%}" for name, seconds in longest)
    console.print(
        f"expected: {estimate.time} ({share}), {bytes_words(estimate.memory_bytes)} of memory, "
        f"{bytes_words(estimate.disk_bytes)} of disk, {bytes_words(estimate.download_bytes)} to download "
        f"({estimate.assumes})",
        markup=False,
    )
    if facts.flavors is not None:
        console.print(facts.flavors.words, markup=False, highlight=False)


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
    moved = Table(title=f"fusion: {fusion.what}, {how_words(fusion)}", title_justify="left")
    for heading in ("projection", "neurons", ratio_heading(fusion), "bias"):
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
    saved = report.saved_adapter
    written = "The model is" if saved is None else f"A LoRA adapter of the target, rank {saved.rank}, is"
    console.print(f"{written} in {folder}; its pictures: {pictures}", markup=False)
    if following := next_words(report, str(folder)):
        console.print(following, markup=False)


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


def show_comparison(result: Comparison, folder: Path) -> None:
    """A comparison's rows, what the merge adds to training, and its descent control, on stdout."""
    console = Console()
    table = Table(title=f"bits per byte on {result.texts} held-out texts, lower is better", title_justify="left")
    for heading in ROW_HEADINGS:
        table.add_column(heading)
    for row in result.rows:
        table.add_row(*row_cells(row))
    console.print(table)
    for added in result.added:
        console.print(added_words(added), markup=False, highlight=False)
    console.print(_descent(result.descent))
    console.print(
        f"The same with figures: {folder / 'compare.html'}; as Markdown: {folder / 'compare.md'}", markup=False
    )


def show_evaluation(result: Evaluation) -> None:
    """Models on texts and tasks, on stdout."""
    console = Console()
    first = result.models[0]
    measures: list[tuple[str, Sequence[Compared | None]]] = []
    if first.bits_per_byte is not None:
        title = f"bits per byte on {result.texts} texts, lower is better"
        measures.append((title, [model.bits_per_byte for model in result.models]))
    for name, task in first.tasks.items():
        title = f"{name}: {task.metric} on {task.questions} questions, higher is better"
        measures.append((title, [model.tasks[name] for model in result.models]))
        margins = [model.tasks[name].margin for model in result.models]
        if None not in margins:
            measures.append((f"{name}: {MARGIN_WORDS}", margins))
    for title, scores in measures:
        table = Table(title=title, title_justify="left")
        for heading in ("model", "value", "95 % interval", "difference to the first", "95 % interval", "detectable"):
            table.add_column(heading)
        for model, score in zip(result.models, scores, strict=True):
            assert score is not None  # all were scored on the same
            own = (score_words(score.value), interval_words(score))
            table.add_row(model.model, *own, *change_cells(score.difference), detectable_cell(score))
        console.print(table)
    if len(result.models) > 1:
        console.print(DETECTABLE_WORDS, markup=False, highlight=False)


def _descent(control: Descent) -> Table:
    """Whether the merge points where the calibration loss falls."""
    table = Table(
        title=f"descent: cosine with the negative gradient of the loss on {control.texts} calibration texts, "
        "mean over layers (standard error)",
        title_justify="left",
    )
    for heading in ("projection", "merge", "random directions"):
        table.add_column(heading)
    for name, cosines in control.projections.items():
        means = ((cosines.mean, cosines.standard_error), (cosines.noise_mean, cosines.noise_standard_error))
        table.add_row(name, *(f"{mean:+.5f}" + ("" if error is None else f" ({error:.1e})") for mean, error in means))
    return table


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
