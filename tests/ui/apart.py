"""The app in a process of its own, as a user has it: its Hub, its token and its cache come from the environment."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from tests.hub import LoopbackHub

__all__ = ["Apart", "app_apart"]

_SCRIPT = """
import json, os, time
from pathlib import Path
from tmerge.ui import AppSettings, build, close, launch_options, settings_here
settings = AppSettings(**json.loads(os.environ["APP_SETTINGS"])) if "APP_SETTINGS" in os.environ else settings_here()
app = build(settings, json.loads(os.environ["APP_BEGIN"]) if "APP_BEGIN" in os.environ else None)
_, url, _ = app.launch(prevent_thread_lock=True, quiet=True, **launch_options())
print("root", app.context.store.root, flush=True)
print("serving", url.rstrip("/"), flush=True)
try:
    time.sleep(3600)
except BaseException:
    app.close()
    close(app)
"""


@dataclass
class Apart:
    """A running app.

    Attributes:
        url: Its address.
        root: Where it keeps its runs.
        said: All that it has written.
    """

    url: str = ""
    root: Path = Path()
    said: list[str] = field(default_factory=list)


@contextlib.contextmanager
def app_apart(hub: LoopbackHub, home: Path, *, token: str | None = None, **environment: str) -> Iterator[Apart]:
    """Serve the app until the end of the ``with``.

    Args:
        hub: Its Hub.
        home: Its cache; what it writes elsewhere is temporary, below this folder too.
        token: That of ``hf auth login``.
        environment: Further variables.
    """
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING", "SPACE_"))}
    (home / "tmp").mkdir(parents=True, exist_ok=True)
    process = subprocess.Popen(
        [sys.executable, "-c", _SCRIPT],
        cwd=Path(__file__).parents[2],
        env={
            **inherited,
            "HF_ENDPOINT": hub.endpoint,
            "HF_HOME": str(home),
            "TMPDIR": str(home / "tmp"),
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_XET": "1",
            "OMP_NUM_THREADS": "1",
            "PYTHONUNBUFFERED": "1",
            **({} if token is None else {"HF_TOKEN": token}),
            **environment,
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    app, there = Apart(), threading.Event()

    def read() -> None:
        assert process.stdout is not None
        for line in process.stdout:
            app.said.append(line)
            word, _, rest = line.strip().partition(" ")
            if word == "root":
                app.root = Path(rest)
            elif word == "serving":
                app.url = rest
                there.set()
        there.set()

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    try:
        assert there.wait(300) and app.url, "".join(app.said)
        yield app
    finally:
        process.send_signal(2)
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
        reader.join(5)
