"""A fault of ours: a visitor is told its number, and the log has what was wrong under it."""

from __future__ import annotations

import logging
import secrets
import traceback

from tmerge.errors import TmergeError

__all__ = ["FaultError", "fault_line"]

_log = logging.getLogger(__name__)


class FaultError(TmergeError):
    """What no visitor can mend went wrong; the text is of `fault_line`."""


def fault_line(what: str, details: str | None = None) -> str:
    """Log a fault, and give the line that a visitor is told.

    Args:
        what: Failed, for the log.
        details: For the log alone; the traceback of what is being handled if None.
    """
    number = secrets.token_hex(4)
    _log.error("%s, fault %s\n%s", what, number, details or traceback.format_exc())
    return f"a fault of ours; the server's log has it under {number}"
