"""The command line: parse, call, show. Progress goes to stderr, results to stdout.

Exit codes: 0 done, 2 the user's mistake or bad input, 1 a fault of ours, 130 interrupted.
"""

from __future__ import annotations

import errno
import os
import signal
import sys
from typing import Any

import typer

# Each module adds its commands to the app, in the order in which help lists them.
from tmerge.cli import extending, merging, publishing, serving, training  # noqa: F401
from tmerge.cli.shared import app
from tmerge.errors import Cancelled, NotEnoughDiskError, TmergeError

__all__ = ["app", "main"]


def main() -> None:
    """The console script: one line for what a user can mend, a traceback for what they cannot."""
    signal.signal(signal.SIGTERM, _stop)
    try:
        app(standalone_mode=False)
    except TmergeError as error:
        typer.echo(f"error: {error}", err=True)
        sys.exit(error.exit_code)
    except (KeyboardInterrupt, typer.Abort):
        typer.echo("stopped; finished stages are kept, and the same command continues", err=True)
        sys.exit(Cancelled.exit_code)
    except typer.Exit as ended:
        sys.exit(ended.exit_code)
    except typer.TyperException as error:
        # A usage error shows the command's usage with itself; the class it comes from has no public name.
        show = getattr(error, "show", None)
        if show is None:
            typer.echo(f"error: {error.format_message()}", err=True)
        else:
            show()
        sys.exit(error.exit_code)
    except Exception as error:
        # Room was looked for before; somebody else has taken it since.
        if not _disk_is_full(error):
            raise
        typer.echo("error: the disk is full; make room, and the same command continues", err=True)
        sys.exit(NotEnoughDiskError.exit_code)


def _disk_is_full(error: Exception) -> bool:
    # safetensors says it in words alone.
    return getattr(error, "errno", None) == errno.ENOSPC or os.strerror(errno.ENOSPC) in str(error)


def _stop(number: int, frame: Any) -> None:
    raise KeyboardInterrupt
