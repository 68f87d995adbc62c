"""The real app on loopback, Debian's Chromium, and pico models that it may read."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("gradio", reason="the app extra is not installed")

from tests.pico import save_pico
from tests.ui.search_hub import SearchHub
from tmerge.calibration import sample_texts
from tmerge.recipe import Recipe
from tmerge.ui import AppSettings, build, close, launch_options
from tmerge.ui.context import AppContext
from tmerge.ui.visitor_run import VisitorRun

# The form begins without the demo's models, which take a quarter of a minute to check and are not always installed.
BEGIN: dict[str, Any] = {"calibration": {"dataset": "samples:indonesian"}, "dtype": "float32"}
CHROMIUM = os.environ.get("TMERGE_CHROMIUM", shutil.which("chromium") or "/usr/bin/chromium")


@dataclass
class Served:
    """A running app."""

    url: str
    context: AppContext
    root: Path
    hub: SearchHub

    def recipe(self, **changes: Any) -> Recipe:
        """A merge of the two pico models that takes a second."""
        data: dict[str, Any] = {
            "target": str(self.root / "target"),
            "source": str(self.root / "source"),
            "dtype": "float32",
            "calibration": {"dataset": str(self.root / "texts.txt"), "texts": 80},
            "evaluation": {"bootstrap": 100},
        }
        return Recipe.from_mapping(data | changes)

    def ended(self, run_id: str, seconds: float = 60) -> VisitorRun:
        """Wait for a run to be over."""
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            run = self.context.store.get(run_id)
            assert run is not None
            if run.over:
                return run
            time.sleep(0.05)
        raise AssertionError(f"still {run.state} after {seconds} s: {list(run.log)[-3:]}")


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two pico models of different architecture and some texts."""
    root = tmp_path_factory.mktemp("models")
    save_pico("llama", root / "target", layers=3, seed=1)
    save_pico("qwen3", root / "source", layers=4, seed=2)
    (root / "texts.txt").write_text("\n".join(sample_texts("indonesian")[:80]), encoding="utf-8")
    return root


@pytest.fixture(scope="session")
def served(models: Path) -> Iterator[Served]:
    """The app, whose Hub is a loopback one that knows some names only."""
    import huggingface_hub.constants

    patch = pytest.MonkeyPatch()
    with SearchHub() as hub:
        # For the app itself, and for its side process, which starts with this environment.
        patch.setattr(huggingface_hub.constants, "ENDPOINT", hub.endpoint)
        patch.setenv("HF_ENDPOINT", hub.endpoint)
        patch.setenv("OMP_NUM_THREADS", "1")
        app = build(AppSettings(local_root=models), {"target": "", "source": ""} | BEGIN)
        _, url, _ = app.launch(prevent_thread_lock=True, quiet=True, **launch_options())
        yield Served(url.rstrip("/"), app.context, models, hub)
        app.close()
        close(app)
    patch.undo()


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if not Path(CHROMIUM).exists():
        pytest.skip("Chromium is not installed")
    # The machine may be busy with other things.
    sync_api.expect.set_options(timeout=20_000)
    with sync_api.sync_playwright() as driver:
        browser = driver.chromium.launch(
            executable_path=CHROMIUM, args=["--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu"]
        )
        yield browser
        browser.close()


def _complaint(message: Any) -> bool:
    # Gradio's client warns of this when it closes any of its streams.
    return message.type in ("error", "warning") and message.text != "Method not implemented."


@pytest.fixture
def visit(served: Served, browser: Any) -> Iterator[Callable[..., Any]]:
    """Opens the app as a visitor of its own; nothing may be said on the console, and no other host be asked."""
    contexts, said = [], []

    def visit(query: str = "", width: int = 1280, theme: str = "light", height: int = 900) -> Any:
        context = browser.new_context(viewport={"width": width, "height": height}, accept_downloads=True)
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(20_000)
        page.on("console", lambda message: said.append(message.text) if _complaint(message) else None)
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on(
            "request",
            lambda request: (
                None
                if request.url.startswith((served.url, "data:", "blob:"))
                else said.append(f"another host: {request.url}")
            ),
        )
        page.goto(f"{served.url}/?__theme={theme}{query}")
        page.wait_for_selector("#start", state="attached")
        page.wait_for_timeout(300)
        return page

    yield visit
    for context in contexts:
        context.close()
    assert said == []


@pytest.fixture
def slowly(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Slows every step of the merges down, so that there is something to see and to stop."""
    hear = VisitorRun.hear

    def slowly(seconds: float) -> None:
        def slow(self: VisitorRun, step: Any) -> None:
            hear(self, step)
            time.sleep(seconds)

        monkeypatch.setattr(VisitorRun, "hear", slow)

    return slowly
