"""The process that a run is worked on in: made ready, listened to, and found to be gone."""

from __future__ import annotations

import signal

import torch

from tmerge.child import Child, Told
from tmerge.errors import NotEnoughMemoryError, ProcessLostError, TmergeError
from tmerge.stages.step import Step

__all__ = ["NAME", "lost", "prepared_child", "step_of"]

NAME = "tmerge-run"
"""As a list of processes shows it."""

_PREPARED = ("tmerge.stages.merge", "tmerge.stages.adapt")


def prepared_child() -> Child:
    """One that has imported what a run needs, or is about to: by far the most of the time that it takes to start."""
    return Child(NAME, prepare=_PREPARED)


def step_of(told: Told) -> Step:
    """The step that it told of."""
    row = None if told.row is None else (told.row[0], told.row[1], torch.tensor(told.row[2], dtype=torch.float64))
    return Step(told.stage, told.what, told.done, told.total, told.unit, row)


def lost(status: int | None) -> TmergeError:
    """What to say of a run whose process ended with this exit code."""
    if status == -signal.SIGKILL:
        return NotEnoughMemoryError(
            "the system ended this run, as it does where memory runs out; choose smaller models or fewer texts"
        )
    how = "" if status is None else f" (signal {-status})" if status < 0 else f" (exit code {status})"
    return ProcessLostError(f"this run's process ended before the run had{how}; start it again")
