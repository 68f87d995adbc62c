"""The process that a run is worked on in: made ready, and found to be gone."""

from __future__ import annotations

import signal

from tmerge.child import Child
from tmerge.errors import NotEnoughMemoryError, ProcessLostError, TmergeError

__all__ = ["NAME", "lost", "prepared_child"]

NAME = "tmerge-run"
"""As a list of processes shows it."""

_PREPARED = ("tmerge.stages.merge", "tmerge.stages.adapt")


def prepared_child() -> Child:
    """One that has imported what a run needs, or is about to: by far the most of the time that it takes to start."""
    return Child(NAME, prepare=_PREPARED)


def lost(status: int | None) -> TmergeError:
    """What to say of a run whose process ended with this exit code."""
    if status == -signal.SIGKILL:
        return NotEnoughMemoryError(
            "the system ended this run, as it does where memory runs out; choose smaller models or fewer texts"
        )
    how = "" if status is None else f" (signal {-status})" if status < 0 else f" (exit code {status})"
    return ProcessLostError(f"this run's process ended before the run had{how}; start it again")
