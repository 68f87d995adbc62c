"""The entry of the Space on a CPU."""

from __future__ import annotations

if __name__ == "__main__":
    from tmerge.ui import launch
    from tmerge.ui.on_space import fetch_demo

    fetch_demo()
    launch()
