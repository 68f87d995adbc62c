"""The entry of the Space on a CPU."""

from __future__ import annotations

import sys

if __name__ == "__main__":
    from tmerge.errors import TmergeError
    from tmerge.ui import launch
    from tmerge.ui.server.on_space import fetch_demo

    fetch_demo()
    try:
        launch()
    except TmergeError as error:
        sys.exit(f"error: {error}")
