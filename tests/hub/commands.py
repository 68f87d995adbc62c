"""For a client's script: tmerge's commands in its own process, one after the other, with what each of them said."""

from __future__ import annotations

import contextlib
import io
import json
import sys
from typing import Any

from huggingface_hub import constants, get_session

from tmerge.cli import main

__all__ = ["command", "set_hub"]


def command(*words: str) -> dict[str, Any]:
    """Run ``tmerge WORDS``: its exit code, and all it wrote on stdout and stderr."""
    out, err, before = io.StringIO(), io.StringIO(), sys.argv
    sys.argv = ["tmerge", *words]
    code = 0
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            main()
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else 1
    finally:
        sys.argv = before
    return {"code": code, "out": out.getvalue(), "err": err.getvalue()}


def set_hub(**settings: Any) -> None:
    """Set what the loopback Hub will do: its faults, what a job says and how it ends."""
    get_session().post(f"{constants.ENDPOINT}/_set", content=json.dumps(settings).encode()).raise_for_status()
