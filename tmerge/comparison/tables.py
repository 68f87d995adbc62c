"""A comparison in words: its rows as cells for terminal and page, as Markdown to be pasted, and what a merge adds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from tmerge.comparison.result import Added, Comparison, Published, Row
from tmerge.comparison.scores import Compared
from tmerge.report import Measured, change_words, interval_words, score_words

__all__ = [
    "DETECTABLE_WORDS",
    "MARGIN_WORDS",
    "ROW_HEADINGS",
    "added_words",
    "change_cells",
    "comparison_table",
    "detectable_cell",
    "row_cells",
]

ROW_HEADINGS = ("row", "bits per byte", "difference to base", "95 % interval", "tokens", "steps", "seconds")
"""Of `row_cells`."""

MARGIN_WORDS = "margin of the right answer over the best wrong one, in bits per byte, higher is better"
DETECTABLE_WORDS = "detectable: the smallest true difference that so many texts or questions show four times in five"


def row_cells(row: Row) -> tuple[str, ...]:
    """A row's cells; what does not apply to it is empty."""
    counts = (f"{count:,}" if count else "" for count in (row.tokens, row.steps))
    return (
        row.name,
        score_words(row.value) + _spread(row),
        *change_cells(row.difference),
        *counts,
        f"{row.seconds:.1f}",
    )


def change_cells(change: Measured | None) -> tuple[str, str]:
    """A difference and its interval; empty where there is none."""
    return ("", "") if change is None else (change_words(change.value), interval_words(change, signed=True))


def detectable_cell(result: Compared) -> str:
    """The smallest difference that these texts or questions show; empty where there is none."""
    return "" if result.detectable is None else score_words(result.detectable)


def comparison_table(comparison: Comparison) -> str:
    """The rows as Markdown tables; differences are to the base, with their paired 95 % intervals."""
    lines = [f"Bits per byte on {comparison.texts} held-out texts, lower is better.", "", *_table(ROW_HEADINGS)]
    lines += map(_line, map(row_cells, comparison.rows))
    if comparison.added:
        lines += ["", *(f"- {_cell(added_words(added))}" for added in comparison.added)]
    if comparison.rows[0].tasks:
        lines += ["", f"Benchmarks; {DETECTABLE_WORDS}."]
    for task, first in comparison.rows[0].tasks.items():
        lines += ["", f"{_cell(task)}: {first.metric} on {first.questions} questions, higher is better.", ""]
        lines += _task_table(first.metric, {row.name: row.tasks[task] for row in comparison.rows})
        margins = {row.name: row.tasks[task].margin for row in comparison.rows}
        known = {name: margin for name, margin in margins.items() if margin is not None}
        if len(known) == len(margins):
            lines += ["", f"{_cell(task)}: {MARGIN_WORDS}.", "", *_task_table("margin", known)]
    if comparison.published is not None:
        lines += _published(comparison.published)
    return "\n".join(lines) + "\n"


def _task_table(metric: str, results: Mapping[str, Compared]) -> list[str]:
    lines = _table(("row", metric, "difference to base", "95 % interval", "detectable"))
    for name, result in results.items():
        cells = (name, score_words(result.value), *change_cells(result.difference), detectable_cell(result))
        lines.append(_line(cells))
    return lines


def added_words(added: Added) -> str:
    """Whether a merge adds anything to a training, in a sentence."""
    if added.high < 0:
        verdict = f"the merge adds to {added.to}"
    elif added.low > 0:
        verdict = f"{added.to} does better without the merge"
    else:
        verdict = f"as far as these texts show, the merge adds nothing to {added.to}"
    seeds = [seed.value for seed in added.seeds]
    spread = (
        f", {change_words(min(seeds))} to {change_words(max(seeds))} over {len(seeds)} seeds" if len(seeds) > 1 else ""
    )
    interval = f"95 % interval {interval_words(added, signed=True)}"
    return f"{added.row} against {added.to}: {change_words(added.value)} ({interval}){spread}: {verdict}"


def _published(published: Published) -> list[str]:
    lines = ["", f"As published ({_cell(published.table)}), {_cell(published.metric)}:", ""]
    lines += _table(("benchmark", "base", "fused without adaptation", "fused with adaptation"))
    lines += [_line((name, *(f"{value:g}" for value in values))) for name, values in published.scores.items()]
    sizes = published.by_source
    if sizes:
        lines += ["", "As published, fused with adaptation, by the size of the source:", ""]
        lines += _table(("benchmark", *sizes))
        for name in next(iter(sizes.values())):
            lines.append(_line((name, *(f"{scores[name]:g}" for scores in sizes.values()))))
    return lines


def _table(headings: Sequence[str]) -> list[str]:
    return [_line(headings), "|---" * len(headings) + "|"]


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(map(_cell, cells))} |"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def _spread(row: Row) -> str:
    """Lowest and highest seed, where there are several."""
    values = [seed.value for seed in row.seeds]
    if len(values) < 2:
        return ""
    return f" ({score_words(min(values))} to {score_words(max(values))} over {len(values)} seeds)"
