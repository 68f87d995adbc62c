"""How progress looks on a terminal: a live line, or plain lines elsewhere, on stderr."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from tmerge.quantities import duration_words
from tmerge.stages.step import NOTE, Listener, Step

__all__ = ["listening"]


@contextmanager
def listening() -> Iterator[Listener]:
    """A listener that shows every step: a live line on a terminal, plain lines elsewhere."""
    console = Console(stderr=True)
    if console.is_terminal:
        with _bar(console) as listener:
            yield listener
    else:
        yield _plain(console)


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
