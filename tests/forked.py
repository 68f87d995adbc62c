"""Python in a process of its own, seconds sooner than a new interpreter: forked off one that has imported torch.

What is imported before the fork reads no environment variable of the Hub's, so a script's client is set up by the
script's own environment, as ever. Signals, exit codes, file locks and both streams are a real process's.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

_BEFORE = ["torch", "torch._dynamo", "torch.distributed.tensor", "scipy.optimize", "tests.forked"]
FORKING = multiprocessing.get_context("forkserver")
FORKING.set_forkserver_preload(_BEFORE)


class Forked:
    """A process under way, with what is used of ``subprocess.Popen``."""

    def __init__(
        self, words: Sequence[str], script: str | None, env: Mapping[str, str] | None, cwd: Path | None
    ) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="forked-")
        self._streams = [Path(self._folder.name, name) for name in ("out", "err")]
        begin = (list(map(str, words)), script, dict(os.environ if env is None else env), str(cwd or Path.cwd()))
        self._process = FORKING.Process(target=_begin, args=(*begin, *map(str, self._streams)))
        self._process.start()
        self.pid = self._process.pid

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self.returncode

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def so_far(self) -> str:
        """What it has written until now, stdout first."""
        return "".join(path.read_text(encoding="utf-8") for path in self._streams if path.exists())

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """Wait for its end: what it wrote on stdout and stderr."""
        self._process.join(timeout)
        if self.returncode is None:
            self._process.kill()
            raise subprocess.TimeoutExpired("a forked process", timeout or 0)
        out, err = (path.read_text(encoding="utf-8") if path.exists() else "" for path in self._streams)
        self._folder.cleanup()
        return out, err


def start(
    words: Sequence[Any] = (),
    script: str | None = None,
    *,
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
) -> Forked:
    """Start ``tmerge`` with these words, or a script with them in ``sys.argv``.

    Args:
        words: What follows the command's name.
        script: Python to run instead of the command line.
        env: The whole environment; this process's if None.
        cwd: The working folder; this process's if None.
    """
    return Forked(words, script, env, cwd)


def run(
    words: Sequence[Any] = (), script: str | None = None, *, timeout: float = 300, **where: Any
) -> subprocess.CompletedProcess[str]:
    """`start`, and wait for the end."""
    process = start(words, script, **where)
    out, err = process.communicate(timeout)
    return subprocess.CompletedProcess(list(words), process.returncode or 0, out, err)


def _begin(words: list[str], script: str | None, env: dict[str, str], cwd: str, out: str, err: str) -> None:
    import torch

    for path, stream in ((out, 1), (err, 2)):
        file = os.open(path, os.O_CREAT | os.O_WRONLY | os.O_APPEND, 0o600)
        os.dup2(file, stream)
        os.close(file)
    os.environ.clear()
    os.environ.update(env)
    os.chdir(cwd)
    sys.path[:0] = filter(None, env.get("PYTHONPATH", "").split(os.pathsep))
    torch.set_num_threads(int(env.get("OMP_NUM_THREADS", "1")))
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if script is None:
        sys.argv = ["tmerge", *words]
        runpy.run_module("tmerge.cli", run_name="__main__", alter_sys=True)
    else:
        sys.argv = ["-c", *words]
        exec(compile(script, "<string>", "exec"), {"__name__": "__main__"})  # noqa: S102 - a test's own script
