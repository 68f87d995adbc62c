"""Files' modes count for root too, while a test asks for it: most tests run as root, and root sees none of them."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["modes_count"]

# linux/capability.h: version 3, and the capabilities that let root pass over files' modes.
_VERSION = 0x20080522
_PASSING_OVER = 1 << 1 | 1 << 2


class _Header(ctypes.Structure):
    _fields_ = [("version", ctypes.c_uint32), ("pid", ctypes.c_int)]


class _Data(ctypes.Structure):
    _fields_ = [(name, ctypes.c_uint32) for name in ("effective", "permitted", "inheritable")]


@contextmanager
def modes_count() -> Iterator[None]:
    """While open, this thread is refused what the modes of files refuse to their owner."""
    if os.geteuid() != 0:
        yield
        return
    system, data = ctypes.CDLL(None, use_errno=True), (_Data * 2)()
    assert system.capget(ctypes.byref(_Header(_VERSION, 0)), data) == 0
    before = data[0].effective
    data[0].effective &= ~_PASSING_OVER
    assert system.capset(ctypes.byref(_Header(_VERSION, 0)), data) == 0
    try:
        yield
    finally:
        data[0].effective = before
        assert system.capset(ctypes.byref(_Header(_VERSION, 0)), data) == 0
