"""The browser app: choose a pair, watch the merge run, look at its transport, try the result, push it."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable, Mapping
from typing import Any

import gradio as gr

from tmerge.ui.context import AppContext
from tmerge.ui.parts.figure import plotly_route
from tmerge.ui.parts.quiet import tell_one_field
from tmerge.ui.parts.returning import wire_returning
from tmerge.ui.parts.safe import render
from tmerge.ui.parts.style import CSS, HEAD, markup, theme
from tmerge.ui.server.downloads import download_routes
from tmerge.ui.server.limits import AppSettings, settings_here
from tmerge.ui.server.runs import RunStore
from tmerge.ui.tabs.choose import build_choose
from tmerge.ui.tabs.look import build_look
from tmerge.ui.tabs.push import build_push
from tmerge.ui.tabs.run import build_running
from tmerge.ui.tabs.try_out import build_try

__all__ = ["AppSettings", "build", "launch", "launch_options", "settings_here"]

# Uploads and downloads that Gradio keeps are removed this long after they were made.
_KEPT_FILES_SECONDS = 2 * 3600
# Of each event, at once, where it sets no limit of its own: nobody is kept waiting by another visitor's.
_AT_ONCE = 16


def build(settings: AppSettings | None = None, begin: Mapping[str, Any] | None = None) -> gr.Blocks:
    """The app, to be launched with `launch_options`.

    Args:
        settings: What visitors may do; as `settings_here` says if None.
        begin: The recipe's keys that the form begins with; the built-in demo if None.

    Returns:
        The app; its attribute ``context`` is the `AppContext`, whose store and side processes end with `close`.
    """
    settings = settings or settings_here()
    if settings.public:
        _use_no_token_of_our_own()
    if settings.zero_gpu:
        from tmerge.ui.server import zero

        zero.lent()
    with gr.Blocks(
        title="tmerge: merge language models by optimal transport",
        analytics_enabled=False,
        delete_cache=(600, _KEPT_FILES_SECONDS),
        fill_width=True,
    ) as app:
        context = AppContext(RunStore(settings), settings, app)
        context.aside.warm()
        context.store.warm()
        markup(render("cards.html", "masthead"), elem_id="masthead")
        with context.tabs.render():
            with gr.Tab("Choose", id="choose", render_children=True) as choose:
                build_choose(context, begin)
            with gr.Tab("Run", id="run", render_children=True) as run:
                build_running(context)
            with gr.Tab("Look", id="look") as look:
                build_look(context)
            with gr.Tab("Try", id="try") as try_out:
                build_try(context)
            with gr.Tab("Push", id="push", render_children=True) as push:
                build_push(context)
        wire_returning(context, (choose, run, look, try_out, push))
    tell_one_field(app, context.ended)
    app.queue(default_concurrency_limit=_AT_ONCE)
    app.context = context  # type: ignore[attr-defined]
    return app


def launch_options(app: gr.Blocks) -> dict[str, Any]:
    """What ``Blocks.launch`` is given: looks, and nothing shared, served or recorded beyond the app and its runs."""
    context: AppContext = app.context  # type: ignore[attr-defined]
    return {
        "app_kwargs": {"routes": [*download_routes(context.seen), plotly_route()]},
        "theme": theme(),
        "css": CSS,
        "head": HEAD,
        "share": False,
        "allowed_paths": [],
        "footer_links": [],
        "run_history": False,
        "show_error": False,
        "ssr_mode": False,
        "mcp_server": False,
        "max_file_size": settings_here().max_upload_bytes,
    }


def launch(port: int | None = None, *, raise_if_stopped: Callable[[], None] = lambda: None) -> None:
    """Build and serve the app until it is interrupted.

    Args:
        port: To listen on; the first free one from 7860 if None.
        raise_if_stopped: Raises where an interrupt came that was swallowed on the way, as Gradio may while it starts.

    Raises:
        OSError: The port is taken.
    """
    if port is not None:
        with socket.socket() as probe:
            # Gradio's own words for this list what it tried; ours name the port.
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(("127.0.0.1", port))
    app = build()
    try:
        app.launch(server_port=port, prevent_thread_lock=True, **launch_options(app))
        while app.is_running:
            raise_if_stopped()
            time.sleep(0.1)
    finally:
        app.close(verbose=False)
        close(app)


def close(app: gr.Blocks) -> None:
    """End what an app of `build` has begun: its run, its side processes, its folders."""
    context: AppContext = app.context  # type: ignore[attr-defined]
    context.store.close()
    context.aside.close()
    context.examples.close()


def _use_no_token_of_our_own() -> None:
    """On a public app no visitor reads with a token that its owner has set: not here, nor in the processes beside."""
    import huggingface_hub.constants

    os.environ["HF_HUB_DISABLE_IMPLICIT_TOKEN"] = "1"
    huggingface_hub.constants.HF_HUB_DISABLE_IMPLICIT_TOKEN = True
