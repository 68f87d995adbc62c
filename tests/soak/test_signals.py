"""Ctrl-C and SIGTERM wherever a command may be: its exit code, what is kept, and nothing left running."""

from __future__ import annotations

import itertools
import os
import shlex
import signal
import socket
import time
import urllib.request
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests import forked
from tests.hub import Repo, WritableHub
from tests.pico import save_pico
from tests.stages.test_merge import digest, recipe_for
from tmerge.recipe import Recipe
from tmerge.stages.merge import STAGES, merge

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
both = pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["SIGINT", "SIGTERM"])

# Stages that not every merge has.
_ALONE = {
    "choose": {"fusion": {"alpha": "auto"}},
    "reconstruct": {"fusion": {"what": "reconstruct", "keep": None, "alpha": 1.0}},
}


def _in_turn(stages: Iterable[str]) -> pytest.MarkDecorator:
    """What hears both signals is one thing, so a stage after the other is stopped by one of them in turn."""
    turns = zip(stages, itertools.cycle([signal.SIGINT, signal.SIGTERM]), strict=False)
    cases = [pytest.param(stage, number, id=f"{stage}-{number.name}") for stage, number in turns]
    return pytest.mark.parametrize(("stage", "number"), cases)


# A merge that says when a stage begins.
IN_A_STAGE = """
import time
from pathlib import Path
from tmerge.stages.runner import Runner

call = Runner.__call__

def waiting(self, stage):
    if stage.name == {stage!r}:
        whole = type(stage).do
        def do(stage, *words):
            Path({ready!r}).touch()
            time.sleep(0.05)
            return whole(stage, *words)
        type(stage).do = do
    return call(self, stage)

Runner.__call__ = waiting
from tmerge.cli import main
main()
"""


@pytest.fixture(scope="module")
def pair(tmp_path_factory: Any) -> Path:
    folder: Path = tmp_path_factory.mktemp("models")
    for name, family, seed in (("target", "llama", 0), ("source", "gpt2", 1), ("other", "llama", 2)):
        save_pico(family, folder / name, layers=2, seed=seed)
        (folder / name / "README.md").write_text("---\nlicense: apache-2.0\n---\n")
    return folder


@pytest.fixture(scope="module")
def finished(pair: Path, tmp_path_factory: Any) -> Path:
    folder: Path = tmp_path_factory.mktemp("finished") / "fused"
    merge(recipe_for(pair, adaptation={"steps": 400, "batch_size": 4}), folder)
    return folder


class Stopped:
    """A command that was stopped: its code, its last line, and what it left."""

    def __init__(self, process: forked.Forked, number: int, temporary: Path) -> None:
        descendants = _descendants(process.pid)
        process.send_signal(number)
        began = time.monotonic()
        self.printed, self.said = process.communicate(60)
        self.seconds = time.monotonic() - began
        assert "Traceback" not in self.said, self.said
        assert process.returncode == 128 + number, self.said
        lines = self.said.strip().splitlines()
        self.line = lines[-1]
        assert self.line.startswith("stopped"), self.said
        assert not [pid for pid in descendants if _runs(pid)]
        assert not list(temporary.iterdir())


def _descendants(pid: int) -> list[int]:
    children = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(path.read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue
        if parent == pid:
            children.append(int(path.parent.name))
    return children + [below for child in children for below in _descendants(child)]


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


@pytest.fixture
def begin(tmp_path: Path) -> Iterator[Callable[..., forked.Forked]]:
    """Starts a command whose temporary files lie in a folder of its own."""
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    started: list[forked.Forked] = []

    def start(words: list[Any], script: str | None = None, **environment: str) -> forked.Forked:
        env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "TMPDIR": str(temporary), **environment}
        process = forked.start(list(map(str, words)), script, env={"HF_HUB_OFFLINE": "1", **env})
        started.append(process)
        return process

    yield start
    for process in started:
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)


def _until(process: forked.Forked, true: Callable[[], bool]) -> None:
    limit = time.monotonic() + 120
    while not true():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < limit, process.so_far()
        time.sleep(0.02)


@_in_turn(_ALONE)
def test_stages_that_not_every_merge_has(
    pair: Path, tmp_path: Path, begin: Callable[..., forked.Forked], stage: str, number: int
) -> None:
    recipe, ready, out = tmp_path / "recipe.yaml", tmp_path / "ready", tmp_path / "fused"
    calibration = {"dataset": "samples:english", "texts": 90, "held_out": 0.3, "choosing": 0.3, "token_rows": 200}
    both_models = {"target": str(pair / "target"), "source": str(pair / "other"), "dtype": "float32"}
    whole = {**both_models, "calibration": calibration, **_ALONE[stage], "evaluation": {"texts": 12, "bootstrap": 200}}
    recipe.write_text(Recipe.from_mapping(whole).to_yaml())
    words = ["merge", recipe, "--out", out]
    process = begin(words, IN_A_STAGE.format(stage=stage, ready=str(ready)))
    _until(process, ready.exists)
    stopped = Stopped(process, number, tmp_path / "temporary")
    assert stopped.line.startswith("stopped; the finished stages (texts, target, source, transport")
    again = begin(words)
    assert again.communicate(120) and again.returncode == 0 and (out / "config.json").is_file()


@_in_turn(STAGES)
def test_every_stage_of_a_merge(
    pair: Path, finished: Path, tmp_path: Path, begin: Callable[..., forked.Forked], stage: str, number: int
) -> None:
    recipe, ready, out = tmp_path / "recipe.yaml", tmp_path / "ready", tmp_path / "fused"
    recipe.write_text(recipe_for(pair, adaptation={"steps": 400, "batch_size": 4}).to_yaml())
    words = ["merge", recipe, "--out", out]
    process = begin(words, IN_A_STAGE.format(stage=stage, ready=str(ready)))
    _until(process, ready.exists)
    stopped = Stopped(process, number, tmp_path / "temporary")
    assert stopped.seconds < 20
    again = shlex.join(["tmerge", *map(str, words)])
    if stage == "texts":
        assert stopped.line == f"stopped; no stage had finished, and nothing is kept; to start again: {again}"
        assert not out.exists()
    else:
        kept = ", ".join(STAGES[: STAGES.index(stage)])
        assert stopped.line.startswith("stopped; the finished stages (") and stopped.line.endswith(again), kept
    whole = begin(words)
    assert whole.communicate(120) and whole.returncode == 0
    assert digest(out) == digest(finished) and not list(out.rglob("*.part"))


@pytest.fixture
def hub(pair: Path) -> Iterator[WritableHub]:
    hub = WritableHub(token="hf_TheSecretOfThisTest")
    for name in ("target", "source"):
        hub.repos[f"user/{name}"] = Repo()
        hub.repos[f"user/{name}"].commit(pair / name)
    with hub:
        yield hub
        hub.released.set()


def _online(hub: WritableHub, home: Path) -> dict[str, str]:
    return {
        "HF_HUB_OFFLINE": "0",
        "HF_ENDPOINT": hub.endpoint,
        "HF_HOME": str(home),
        "HF_TOKEN": hub.token,
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
    }


@both
def test_a_download(hub: WritableHub, tmp_path: Path, begin: Callable[..., forked.Forked], number: int) -> None:
    hub.hold, out = "model.safetensors", tmp_path / "fused"
    words = ["merge", "--target", "user/target", "--source", "user/source", "--dataset", "samples:english"]
    words += ["--set", "calibration.texts=60", "--set", "calibration.held_out=0.3", "--out", str(out)]
    process = begin(words, **_online(hub, tmp_path / "home"))
    _until(process, hub.reached.is_set)
    stopped = Stopped(process, number, tmp_path / "temporary")
    assert "to continue: tmerge merge" in stopped.line or "to start again: tmerge merge" in stopped.line
    assert hub.token not in stopped.said
    # What had come is there, and the rest is asked for.
    hub.released.set()
    again = begin(words, **_online(hub, tmp_path / "home"))
    assert again.communicate(120) and again.returncode == 0 and (out / "config.json").is_file()


@both
def test_an_upload(
    hub: WritableHub, finished: Path, tmp_path: Path, begin: Callable[..., forked.Forked], number: int
) -> None:
    words = ["push", str(finished), "--repo", "user/fused", "--even-if-worse"]
    hub.hold = "lfs"
    process = begin(words, **_online(hub, tmp_path / "home"))
    _until(process, hub.reached.is_set)
    stopped = Stopped(process, number, tmp_path / "temporary")
    assert stopped.line.startswith(f"stopped; {finished} is kept, and user/fused has all of it or nothing of it")
    repo = hub.repos["user/fused"]
    assert not any(name.endswith(".safetensors") for files in repo.commits.values() for name in files)
    hub.released.set()
    again = begin(words, **_online(hub, tmp_path / "home"))
    assert again.communicate(120) and again.returncode == 0
    assert "model.safetensors" in repo.commits[repo.refs["main"]]


@both
def test_a_training(finished: Path, tmp_path: Path, begin: Callable[..., forked.Forked], number: int) -> None:
    pytest.importorskip("trl", reason="the adapt extra is not installed")
    out = tmp_path / "trained"
    process = begin(["adapt", finished, "--out", out])
    _until(process, lambda: "/400 steps" in process.so_far())
    stopped = Stopped(process, number, tmp_path / "temporary")
    assert "to start again: tmerge adapt" in stopped.line or "to continue: tmerge adapt" in stopped.line
    assert not (out / "config.json").exists()


@both
def test_the_app(tmp_path: Path, begin: Callable[..., forked.Forked], number: int) -> None:
    pytest.importorskip("gradio", reason="the app extra is not installed")
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    process = begin(["app", "--port", port], PYTHONUNBUFFERED="1", GRADIO_ANALYTICS_ENABLED="False")

    def served() -> bool:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/config", timeout=5) as answer:
                return bool(answer.status == 200) and "public link" in process.so_far()
        except OSError:
            return False

    _until(process, served)
    process.send_signal(number)
    _, said = process.communicate(60)
    assert process.returncode == 128 + number and "Traceback" not in said, said
    with pytest.raises(OSError):
        urllib.request.urlopen(f"http://127.0.0.1:{port}/config", timeout=5)
    assert not _descendants(process.pid)
