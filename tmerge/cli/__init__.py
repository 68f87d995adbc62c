"""The command line: parse, call, show. Progress goes to stderr, results to stdout.

Exit codes: 0 done, 2 the user's mistake or bad input, 1 a fault of ours, 130 interrupted, 143 by SIGTERM.
"""

from __future__ import annotations

import os
import sys

from tmerge.cli import stopping
from tmerge.processes import are_several

__all__ = ["main"]


def main() -> None:
    """The console script: hear signals first, then import what takes seconds."""
    if are_several():
        # torch's own remarks, which each of them would write; read when it is imported. Its errors are errors here too.
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
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
