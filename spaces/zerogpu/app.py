"""The entry of the Space on ZeroGPU."""

from __future__ import annotations

import os
import sys

# Before torch: it puts a stand-in for the GPU into torch, which here exists only within the calls that are lent one.
import spaces  # noqa: F401

# Whatever the stand-in says, this process has a CPU; a call that is lent a GPU sets this aside (tmerge.ui.server.zero).
os.environ.setdefault("TMERGE_DEVICE", "cpu")

if __name__ == "__main__":
    from tmerge.errors import TmergeError
    from tmerge.ui import launch
    from tmerge.ui.server.on_space import fetch_demo

    fetch_demo()
    try:
        launch()
    except TmergeError as error:
        sys.exit(f"error: {error}")
