"""Ctrl-C and SIGTERM: the exit code of each, and one line on what is kept and how to go on.

Nothing but the standard library is imported here: the signals are heard before the libraries are, which takes seconds.
"""

from __future__ import annotations

import os
import shlex
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

__all__ = [
    "exit_code",
    "finished",
    "last_words",
    "nothing_changed",
    "program",
    "raise_if_stopped",
    "same_command",
    "signals_heard",
    "stages_kept",
    "when_stopped",
]

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class _State:
    """Of the command at work.

    Attributes:
        began: When it did, as files' times are, in nanoseconds.
        process: That runs it; a process forked from it inherits how it hears signals.
        finished: Whether it has ended by itself: a signal comes too late to stop anything.
        number: The signal that came; None before.
        words: What is kept and how to go on, for what is under way; None while nothing has been begun.
    """

    began: int = 0
    process: int = 0
    finished: bool = False
    number: int | None = None
    words: Callable[[], str] | None = None


_state = _State()


@contextmanager
def signals_heard() -> Iterator[None]:
    """While a command runs, SIGINT and SIGTERM stop it."""
    _state.process, _state.finished, _state.number, _state.words = os.getpid(), False, None, None
    _state.began = time.time_ns()
    before = {number: signal.getsignal(number) for number in _SIGNALS}
    # None is a handler that was not set from Python, and that Python could not set again.
    before = {number: handler for number, handler in before.items() if handler is not None}
    # A shell that starts a command behind it may have it ignore Ctrl-C.
    for number, handler in before.items():
        if handler is not signal.SIG_IGN:
            signal.signal(number, _stop)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def when_stopped(words: Callable[[], str]) -> None:
    """From here on something may be under way: a signal unwinds the stack, and these words follow "stopped".

    Args:
        words: Asked for when everything has been put away: what is kept, and which command goes on.
    """
    _state.words = words


def finished() -> None:
    """The command has ended by itself; from here on a signal changes nothing."""
    _state.finished = True


def exit_code() -> int | None:
    """128 + the signal that came, as shells have it: 130, 143; None where none came."""
    return None if _state.number is None else 128 + _state.number


def raise_if_stopped() -> None:
    """Raise again what a library has swallowed.

    Raises:
        KeyboardInterrupt: A signal came before.
    """
    if _state.number is not None:
        raise KeyboardInterrupt


def last_words() -> str:
    """The line that ends a stopped command."""
    if _state.words is None:
        return f"stopped before anything was begun; nothing was changed; to start again: {same_command()}"
    return f"stopped; {_state.words()}"


def same_command() -> str:
    """The command that runs, to be typed again."""
    return shlex.join([*program(), *sys.argv[1:]])


def program() -> list[str]:
    """The words by which this program is called."""
    return ["hf", "tmerge"] if Path(sys.argv[0]).stem == "hf-tmerge" else ["tmerge"]


def nothing_changed() -> str:
    """For commands that keep nothing, and yet have files of their own to put away."""
    return f"nothing was changed; to start again: {same_command()}"


def stages_kept(folder: Path) -> str:
    """What is kept of a run in its folder, and the command that continues it."""
    # By their notes: the run itself would have to be imported, and may be what was stopped.
    notes = sorted((folder / "tmerge" / "cache").glob("*.json"), key=lambda path: path.stat().st_mtime_ns)
    stages = [path.stem for path in notes if path.stem not in ("request", "calibration", "data")]
    if not stages:
        return f"no stage had finished, and nothing is kept; to start again: {same_command()}"
    # One of an earlier call may be of a dataset or a model that is another by now, which is known to the run alone.
    if any(path.stat().st_mtime_ns < _state.began for path in notes if path.stem in stages):
        return f"what is finished is kept in {folder}; to continue: {same_command()}"
    return f"the finished stages ({', '.join(stages)}) are kept in {folder}; to continue: {same_command()}"


def _stop(number: int, frame: FrameType | None) -> None:
    if os.getpid() != _state.process:
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)
        return
    if _state.finished:
        return
    # The second signal does not wait for the first one's stack to unwind; what is written is written under temporary
    # names, and half of it is never taken for the whole. And where nothing has been begun there is nothing to put
    # away: an interrupt in the midst of an import may be swallowed by what is imported.
    if _state.number is None and _state.words is not None:
        _state.number = number
        raise KeyboardInterrupt
    said = last_words() if _state.number is None else f"stopped at once; to go on: {same_command()}"
    os.write(2, f"{said}\n".encode())
    os._exit(128 + number)
