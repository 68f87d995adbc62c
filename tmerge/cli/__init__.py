"""The command line: parse, call, show. Progress goes to stderr, results to stdout.

Exit codes: 0 done, 2 the user's mistake or bad input, 1 a fault of ours, 130 interrupted, 143 by SIGTERM.
"""

from __future__ import annotations

import sys

from tmerge.cli import stopping

__all__ = ["main"]


def main() -> None:
    """The console script: hear signals first, then import what takes seconds."""
    with stopping.signals_heard():
        try:
            from tmerge.cli.running import run

            code = run()
            stopping.finished()
        except BaseException:
            # Whatever came of a stop: libraries wrap it, and lose it.
            if stopping.exit_code() is None:
                raise
            code = 1
        stopped = stopping.exit_code()
        if stopped is not None:
            sys.stderr.write(f"{stopping.last_words()}\n")
            code = stopped
    sys.exit(code)
