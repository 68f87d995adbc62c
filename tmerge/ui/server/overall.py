"""How far a whole run is and how long it still takes: as `check` expected it, corrected by how fast it went so far."""

from __future__ import annotations

import time
from dataclasses import dataclass

from tmerge.ui.server.visitor_run import VisitorRun

__all__ = ["Overall", "overall", "seconds_left"]

# Until so much of what was expected is done, its pace says nothing.
_TELLING_SECONDS = 2.0


@dataclass(frozen=True)
class Overall:
    """A run under way.

    Attributes:
        share: Of the expected work that is done, in [0, 1].
        remaining: Seconds.
    """

    share: float
    remaining: float


def overall(run: VisitorRun, now: float | None = None) -> Overall | None:
    """Of a run under way; None where it is not, or nothing was expected of its stages.

    Args:
        run: Whose.
        now: `time.time`.
    """
    if run.state != "running" or run.started is None:
        return None
    expected = run.expected
    total = sum(expected.values())
    if total <= 0:
        return None
    done = 0.0
    for name, seconds in expected.items():
        stage = run.stages.get(name)
        if stage is not None:
            done += seconds * (1.0 if stage.ended is not None else min(1.0, stage.done / max(stage.total, 1)))
    taken = (now or time.time()) - run.started
    pace = taken / done if done >= _TELLING_SECONDS else 1.0
    return Overall(done / total, (total - done) * pace)


def seconds_left(run: VisitorRun) -> float | None:
    """Until a run that waits or runs is done, its own waiting not counted; None where it is not known."""
    if run.state == "waiting":
        return sum(run.expected.values()) or None
    found = overall(run)
    return None if found is None else found.remaining
