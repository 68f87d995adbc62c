"""An app of the Look and Try tabs over one finished pico run, on loopback, and a page of Chromium that opens it."""

import contextlib
import socket
import time

import gradio as gr

from tests.pico import save_pico
from tmerge.recipe import Recipe
from tmerge.ui.context import AppContext
from tmerge.ui.parts.figure import plotly_route
from tmerge.ui.parts.quiet import tell_one_field
from tmerge.ui.parts.style import CSS, HEAD, theme
from tmerge.ui.server.limits import AppSettings
from tmerge.ui.server.runs import RunStore
from tmerge.ui.tabs.look import build_look
from tmerge.ui.tabs.try_out import build_try

TARGET_LAYERS, SOURCE_LAYERS, KEPT = 4, 5, 2
TARGET_WIDE, SOURCE_WIDE = 600, 520  # of the MLP: more neurons than a map has cells


def finished_run(folder):
    """A store with one finished run, and its id."""
    save_pico("llama", folder / "target", layers=TARGET_LAYERS, chat=True, intermediate_size=TARGET_WIDE)
    wide = {"hidden_size": 48, "intermediate_size": SOURCE_WIDE}
    save_pico("qwen2", folder / "source", layers=SOURCE_LAYERS, seed=1, **wide)
    recipe = Recipe.from_mapping(
        {
            "target": str(folder / "target"),
            "source": str(folder / "source"),
            "dtype": "float32",
            "calibration": {"dataset": "samples:indonesian", "texts": 48, "max_tokens": 32, "held_out": 0.3},
            "transport": {"layers_kept": KEPT},
            "fusion": {"alpha": 0.2, "top_k": 8, "projections": ["q", "o", "gate"]},
            "evaluation": {"texts": 8, "bootstrap": 100, "descent": 2},
        }
    )
    store = RunStore(AppSettings())
    run_id = store.start(recipe, "visitor")
    end = time.monotonic() + 120
    while store.get(run_id).state not in ("done", "failed"):
        assert time.monotonic() < end, "the pico run took too long"
        time.sleep(0.1)
    assert store.get(run_id).state == "done", store.get(run_id).error
    return store, run_id


@contextlib.contextmanager
def served(store):
    """The address of the two tabs' app; ``?run=ID`` is the run that a page looks at."""
    with gr.Blocks(title="look and try", analytics_enabled=False) as blocks:
        app = AppContext(store, AppSettings(), blocks)
        with app.tabs.render():
            with gr.Tab("Look", id="look"):
                build_look(app)
            with gr.Tab("Try", id="try"):
                build_try(app)

        def of_the_link(request: gr.Request):
            return request.query_params.get("run", "")

        blocks.load(of_the_link, None, app.run_id, show_progress="hidden")
    tell_one_field(blocks, app.ended)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    blocks.launch(
        server_name="127.0.0.1",
        server_port=port,
        prevent_thread_lock=True,
        quiet=True,
        app_kwargs={"routes": [plotly_route()]},
        theme=theme(),
        css=CSS,
        head=HEAD,
        footer_links=[],
        run_history=False,
        ssr_mode=False,
    )
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        blocks.close()


@contextlib.contextmanager
def opened(visitors, url, run_id, tab, width=1280, dark=False, **device):
    """A page on one tab of a run; whatever it complains of, or asks of another host, fails the test."""
    page = visitors.page(width, 900, **device)
    page.set_default_timeout(40_000)
    faults = []
    page.on("pageerror", lambda error: faults.append(str(error)))
    page.on("console", lambda line: faults.append(line.text) if line.type == "error" else None)
    page.on(
        "request", lambda asked: None if asked.url.startswith((url, "data:", "blob:")) else faults.append(asked.url)
    )
    page.goto(f"{url}/?run={run_id}{'&__theme=dark' if dark else ''}")
    page.get_by_role("tab", name=tab).click()
    page.locator(f"#{tab.lower()}").wait_for()
    try:
        yield page
    finally:
        told = list(faults)
        visitors.leave(page, url)
    assert told == [], told
