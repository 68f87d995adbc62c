"""The real app on loopback, Debian's Chromium, and pico models that it may read."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("gradio", reason="the app extra is not installed")

from tests.pico import save_pico
from tests.ui import looked, soon
from tests.ui.chromium import CHROMIUM
from tests.ui.search_hub import SearchHub
from tmerge import child
from tmerge.calibration import sample_texts
from tmerge.recipe import Recipe
from tmerge.ui import AppSettings, build, close, launch_options
from tmerge.ui.context import AppContext
from tmerge.ui.server.runs import RunStore
from tmerge.ui.server.visitor_run import VisitorRun

# The form begins without the demo's models, which take a quarter of a minute to check and are not always installed.
BEGIN: dict[str, Any] = {"calibration": {"dataset": "samples:indonesian"}, "dtype": "float32"}


@pytest.fixture(scope="session", autouse=True)
def soon_started() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(child, "_START", soon)
        yield


@dataclass
class Served:
    """A running app."""

    url: str
    context: AppContext
    root: Path
    hub: SearchHub
    app: Any

    def recipe(self, **changes: Any) -> Recipe:
        """A merge of the two pico models that takes a second."""
        data: dict[str, Any] = {
            "target": str(self.root / "target"),
            "source": str(self.root / "source"),
            "dtype": "float32",
            "calibration": {"dataset": str(self.root / "texts.txt"), "texts": 80},
            # Choosing the strength takes a third of such a merge.
            "fusion": {"alpha": 0.1},
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
        _, url, _ = app.launch(prevent_thread_lock=True, quiet=True, **launch_options(app))
        yield Served(url.rstrip("/"), app.context, models, hub, app)
        app.close()
        close(app)
    patch.undo()


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if not Path(CHROMIUM["executable_path"]).exists():
        pytest.skip("Chromium is not installed")
    # The machine may be busy with other things.
    sync_api.expect.set_options(timeout=20_000)
    with sync_api.sync_playwright() as driver:
        browser = driver.chromium.launch(**CHROMIUM)
        yield browser
        browser.close()


class Visitors:
    """Profiles of the browser: each is one visitor's at a time, then cleaned for the next, who finds scripts cached."""

    def __init__(self, browser: Any) -> None:
        self._browser = browser
        self._free: list[Any] = []

    def page(self, width: int, height: int, **device: Any) -> Any:
        """A page of a visitor that nobody else is meanwhile; on a device of its own where one is described."""
        if device or not self._free:
            context = self._browser.new_context(accept_downloads=True, **device)
        else:
            context = self._free.pop()
        page = context.new_page()
        page.set_viewport_size({"width": width, "height": height})
        page.set_default_timeout(20_000)
        return page

    def leave(self, page: Any, url: str) -> None:
        """The visitor goes: nothing of the app at this address stays in the profile but its files."""
        context = page.context
        page.close()
        empty = context.new_page()
        empty.goto(f"{url}/theme.css")
        empty.evaluate("localStorage.clear()")
        empty.close()
        context.clear_cookies()
        self._free.append(context)


@pytest.fixture(scope="session")
def visitors(browser: Any) -> Visitors:
    return Visitors(browser)


@pytest.fixture(scope="session")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[RunStore, str]]:
    """The store and the id of a finished run, which the Look and the Try tab are tested with; read, never changed."""
    store, run_id = looked.finished_run(tmp_path_factory.mktemp("looked"))
    yield store, run_id
    store.close()


@pytest.fixture(scope="session")
def url(run: tuple[RunStore, str]) -> Iterator[str]:
    """Of an app with those two tabs alone."""
    with looked.served(run[0]) as address:
        yield address


def _complaint(message: Any) -> bool:
    # Gradio's client warns of this when it closes any of its streams.
    return message.type in ("error", "warning") and message.text != "Method not implemented."


# What Gradio's client says of a stream that ended under it.
_CUT = ("BodyStreamBuffer was aborted", "Connection errored out", "AbortError")


class Visits:
    """Opens the app as a visitor of its own; nothing may be said on the console, and no other host be asked."""

    def __init__(self, served: Served, visitors: Visitors) -> None:
        self._served, self._visitors = served, visitors
        self.said: list[str] = []
        self._given: list[Any] = []

    def __call__(self, query: str = "", width: int = 1280, theme: str = "light", height: int = 900) -> Any:
        self._given.append(page := self._visitors.page(width, height))
        page.on("console", lambda message: self.said.append(message.text) if _complaint(message) else None)
        page.on("pageerror", lambda error: self.said.append(str(error)))
        page.on("request", self._hear_request)
        page.goto(f"{self._served.url}/?__theme={theme}{query}")
        page.wait_for_selector("#start", state="attached")
        # What the page asks for as it opens has been answered.
        page.wait_for_function("!document.querySelector('#expected').textContent.includes('Checking the two models')")
        return page

    def reload(self, page: Any, query: str | None = None) -> None:
        """Load a page again, with another query if one is given.

        That its streams end when it is left, Gradio's client may say, or may have no time to.
        """
        before = len(self.said)
        page.reload() if query is None else page.goto(f"{self._served.url}/?__theme=light{query}")
        self.said[before:] = [text for text in self.said[before:] if not any(cut in text for cut in _CUT)]

    def _hear_request(self, request: Any) -> None:
        if not request.url.startswith((self._served.url, "data:", "blob:")):
            self.said.append(f"another host: {request.url}")

    def end(self) -> None:
        """All pages are left."""
        for page in self._given:
            self._visitors.leave(page, self._served.url)


@pytest.fixture
def visit(served: Served, visitors: Visitors) -> Iterator[Visits]:
    visits = Visits(served, visitors)
    yield visits
    told = list(visits.said)
    visits.end()
    assert told == []


@dataclass
class Gate:
    """Where merges wait: at a stage, once `rows` rows of the transport are solved, until it is opened."""

    stage: str = ""
    rows: int = 0
    _open: threading.Event = field(default_factory=threading.Event)

    def close_at(self, stage: str, rows: int = 0) -> None:
        """Let every merge go on to a stage, and to some rows of its transport, and wait there."""
        self.stage, self.rows = stage, rows

    def open(self) -> None:
        self._open.set()

    def pass_by(self, run: VisitorRun, step: Any) -> None:
        """As a step of a merge that takes long: it ends when the gate opens, or its visitor wants it to."""
        if step.stage == self.stage and len(run.rows) >= self.rows:
            while not self._open.wait(0.05):
                run.stop_if_cancelled()


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gate]:
    """Merges wait at it, so that there is something to see and to stop, however fast or busy the machine is."""
    gate, hear = Gate(), VisitorRun.hear

    def slow(self: VisitorRun, step: Any) -> None:
        hear(self, step)
        gate.pass_by(self, step)

    monkeypatch.setattr(VisitorRun, "hear", slow)
    yield gate
    gate.open()
