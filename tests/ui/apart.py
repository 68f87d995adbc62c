"""The app in a process of its own, as a user has it: its Hub, its token and its cache come from the environment."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tests import forked
from tests.hub import LoopbackHub

__all__ = ["Apart", "app_apart"]

_SCRIPT = """
import json, os, time
from pathlib import Path
from tmerge.ui import AppSettings, build, close, launch_options, settings_here
settings = AppSettings(**json.loads(os.environ["APP_SETTINGS"])) if "APP_SETTINGS" in os.environ else settings_here()
app = build(settings, json.loads(os.environ["APP_BEGIN"]) if "APP_BEGIN" in os.environ else None)
_, url, _ = app.launch(prevent_thread_lock=True, quiet=True, **launch_options(app))
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
        process: That serves it.
    """

    url: str
    root: Path
    process: forked.Forked

    @property
    def said(self) -> str:
        """All that it has written."""
        return self.process.so_far()


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
    process = forked.start(
        script=_SCRIPT,
        cwd=Path(__file__).parents[2],
        env={
            **inherited,
            "HF_ENDPOINT": hub.endpoint,
            "HF_HOME": str(home),
            "TMPDIR": str(home / "tmp"),
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_XET": "1",
            "OMP_NUM_THREADS": "1",
            **({} if token is None else {"HF_TOKEN": token}),
            **environment,
        },
    )
    try:
        yield _served(process)
    finally:
        process.send_signal(signal.SIGINT)
        process.communicate(20)


def _served(process: forked.Forked) -> Apart:
    """The app, once it says that it is there."""
    until = time.monotonic() + 300
    while time.monotonic() < until and process.poll() is None:
        said = dict(line.partition(" ")[::2] for line in process.so_far().splitlines())
        if "serving" in said:
            return Apart(said["serving"], Path(said["root"]), process)
        time.sleep(0.05)
    raise AssertionError(process.so_far())
