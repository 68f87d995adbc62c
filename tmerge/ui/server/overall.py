"""How far a whole run is and how long it still takes.

Of a merge as `check` expected it, corrected by how fast it went so far; of a training by its steps and their pace; of a
comparison by its rows, whose paces differ.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

from tmerge.ui.server.visitor_run import VisitorRun

__all__ = ["Overall", "overall", "seconds_left"]

# Until so much of what was expected is done, its pace says nothing.
_TELLING_SECONDS = 2.0
_NEARLY = 0.9


@dataclass(frozen=True)
class Overall:
    """A run under way.

    Attributes:
        share: Of the work that is done, in [0, 1].
        remaining: Seconds; None where there is no pace that tells.
    """

    share: float
    remaining: float | None


def overall(run: VisitorRun, now: float | None = None) -> Overall | None:
    """Of a run under way; None where it is not, or nothing is known of it.

    The stage under way counts by its time, as what it says of itself is about one piece of it.

    Args:
        run: Whose.
        now: `time.time`.
    """
    now = now or time.time()
    if run.state == "running" and run.counted is not None:
        left = run.counted.remaining(now) if run.asks == "training" else None
        # What follows the last of them, scoring and writing, counts as one more.
        return Overall(run.counted.done / (run.counted.total + 1), left)
    total = sum(run.expected.values())
    if run.state != "running" or run.started is None or total <= 0:
        return None
    done = taken = known = 0.0
    current: tuple[float, float] | None = None
    for name, seconds in run.expected.items():
        stage = run.stages.get(name)
        if stage is None:
            continue
        if stage.ended is None:
            current = seconds, now - max(stage.began, run.started)
            continue
        done += seconds
        # What was finished before it was continued says nothing of the pace now.
        if stage.began >= run.started:
            known, taken = known + seconds, taken + stage.ended - stage.began
    pace = taken / known if known >= _TELLING_SECONDS and taken > 0 else 1.0
    remaining = (total - done) * pace
    if current is not None:
        seconds, elapsed = current
        # It may take longer than expected: then there is always a tenth of it to go.
        whole = max(seconds * pace, elapsed / _NEARLY)
        if whole > 0:
            done += seconds * elapsed / whole
            remaining += whole - elapsed - seconds * pace
    return Overall(done / total, remaining)


def seconds_left(run: VisitorRun) -> float | None:
    """Until a run that waits or runs is done, its own waiting not counted; None where it is not known."""
    if run.state == "waiting":
        return sum(run.expected.values()) or None
    found = overall(run)
    return None if found is None else found.remaining
