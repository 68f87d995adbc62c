"""One command, run: one line for what a user can mend, a traceback for what they cannot."""

from __future__ import annotations

import os
import signal
import sys
import time

import typer

# Each module adds its commands to the app, in the order in which help lists them.
from tmerge.cli import extending, merging, publishing, serving, training  # noqa: F401
from tmerge.cli.shared import app
from tmerge.cli.stopping import raise_if_stopped
from tmerge.cli.usage import usage_words
from tmerge.errors import Cancelled, EndedElsewhereError, ProcessesError, ProcessLostError, TmergeError, of_the_system
from tmerge.processes import are_several, rank_of_this

__all__ = ["run"]

_TOGETHER = ("adapt", "compare", "demo", "merge")
"""Commands that several processes run together."""

# Seconds by which the first of several processes may be behind another, where many are begun at once.
_BEHIND = 20.0


def run() -> int:
    """Run the command that the words of the command line name.

    Returns:
        The exit code.

    Raises:
        KeyboardInterrupt: A signal has stopped it.
        Exception: A fault of ours.
    """
    try:
        _refuse_what_is_not_shared()
        result = app(standalone_mode=False)
    except Exception as error:  # noqa: BLE001 - what is nobody's mistake is raised again by `_told`
        raise_if_stopped()
        return _told(error)
    # Without its own exit, typer returns a code where a command ends itself, and for an interrupt.
    raise_if_stopped()
    return result if isinstance(result, int) else 0


def _refuse_what_is_not_shared() -> None:
    """Say which commands several processes can run together, before each of them does all of it."""
    if are_several() and not set(_TOGETHER).intersection(sys.argv[1:2]):
        raise ProcessesError(
            f"tmerge {' '.join(sys.argv[1:2])} runs in one process, and {os.environ['WORLD_SIZE']} were begun; leave "
            f"out torchrun or accelerate launch, which are for {', '.join(_TOGETHER[:-1])} and {_TOGETHER[-1]}"
        )


def _let_the_first_speak() -> None:
    """Wait for what the first process has to say: when it ends, its launcher ends this one, and the other way round."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    time.sleep(_BEHIND)


def _told(error: Exception) -> int:
    """Say what a user can mend, and give its exit code; raise anything else again."""
    # Without a word there is nothing amiss, and typer's message is the help.
    if isinstance(error, typer.TyperException) and sys.argv[1:]:
        error = TmergeError(usage_words(error, sys.argv[1:]))
    if isinstance(error, TmergeError) and rank_of_this() and not isinstance(error, ProcessLostError):
        _let_the_first_speak()
        if isinstance(error, EndedElsewhereError):
            return error.exit_code
        # The first has not met this error.
        error = ProcessLostError(f"process {rank_of_this()}: {error}")
    if isinstance(error, TmergeError):
        typer.echo(f"error: {' '.join(str(error).split(chr(10)))}", err=True)  # a file's name may hold a line break
        return error.exit_code
    if isinstance(error, typer.Abort):
        typer.echo("stopped", err=True)
        return Cancelled.exit_code
    if isinstance(error, typer.TyperException):
        typer.echo(error.format_message(), err=True)
        return error.exit_code
    # Room and rights were looked for before; somebody has taken them since, or nobody could look.
    if (told := of_the_system(error)) is not None:
        typer.echo(f"error: {told}", err=True)
        return told.exit_code
    raise error
