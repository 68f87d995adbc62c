"""Keeping a page light: what each event makes Gradio's own script touch.

Whenever an event begins or ends, that script tells every component which any event so far has named as its output
that something is under way, and copies all that the component holds to do so: figures, tables, their scripts. A page
that watched a run spent half a core on it. An event that shows no progress names one field instead, a hidden one.
"""

from __future__ import annotations

import gradio as gr

__all__ = ["tell_one_field"]


def tell_one_field(app: gr.Blocks, field: gr.Number) -> None:
    """Let every event of the app that shows no progress report it on one field.

    Args:
        app: All of its events wired.
        field: Holds little, and is not seen.
    """
    for event in app.fns.values():
        if event.show_progress == "hidden" and event.show_progress_on is None:
            event.show_progress_on = [field]
    app.config = app.get_config_file()
