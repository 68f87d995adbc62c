"""The most memory that this process came to take, as Linux counts it."""

from __future__ import annotations

import ctypes
import gc
from pathlib import Path

from tmerge.models import give_back_memory

_M_MMAP_THRESHOLD = -3  # of malloc.h


def return_what_is_freed() -> None:
    """Let large blocks go back to the system when they are freed, so that a peak is what was held together.

    glibc raises the size from which a block is mapped on its own with what was freed, and lays smaller ones where it
    found room: by that, the same work took from 3 to 10 tensors' room. A threshold that is set stays; to be called
    before anything large was made, as room that was found once is used again.
    """
    getattr(ctypes.CDLL(None), "mallopt", lambda *_: None)(_M_MMAP_THRESHOLD, 1 << 20)


class Peak:
    """Begins when it is made."""

    def __init__(self) -> None:
        gc.collect()
        give_back_memory()
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
        self._before = _status("VmRSS")

    def grown(self) -> int:
        """Bytes at the peak above those at the beginning."""
        return _status("VmHWM") - self._before


def _status(name: str) -> int:
    return int(Path("/proc/self/status").read_text().split(f"{name}:")[1].split()[0]) * 1024
