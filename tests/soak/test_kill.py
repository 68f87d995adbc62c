"""A merge that is killed, starved of disk and done again: it goes on, and ends with the same bytes."""

from __future__ import annotations

import os
import random
import resource
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests import forked
from tests.pico import save_pico
from tests.stages.test_merge import digest, recipe_for
from tmerge.recipe import Recipe
from tmerge.stages.merge import STAGES, merge

pytestmark = pytest.mark.slow

KILLS, MERGES = 20, 50
FULL_DISK = "error: the disk is full; make room, and the same command continues"


@pytest.fixture(scope="module")
def pair(tmp_path_factory: Any) -> Path:
    """Two of the demo's kinds: a llama with several chat templates, and a Gemma 3."""
    folder: Path = tmp_path_factory.mktemp("models")
    target = save_pico("llama", folder / "target", layers=4, chat=True)
    (target / "additional_chat_templates").mkdir()
    (target / "additional_chat_templates" / "tool_use.jinja").write_text("tools: {{ messages[0]['content'] }}")
    save_pico("gemma3", folder / "source", layers=4, seed=1)
    save_pico("llama", folder / "other", layers=5, seed=2)
    return folder


def _recipe(pair: Path, kind: str) -> Recipe:
    if kind == "weights":
        parts: dict[str, Any] = {"evaluation": {"descent": 4, "texts": 12, "bootstrap": 200}}
        return recipe_for(pair, **parts, save={"max_shard_size": "100KB"})
    return Recipe.from_mapping(
        {
            "target": str(pair / "target"),
            "source": str(pair / "other"),
            "dtype": "float32",
            "calibration": {"dataset": "samples:indonesian", "texts": 70, "held_out": 0.3, "token_rows": 200},
            "fusion": {"what": "reconstruct", "alpha": 1.0, "keep": "samples:english", "keep_texts": 60},
            "evaluation": {"texts": 12, "bootstrap": 200, "controls": ["permuted"]},
        }
    )


@pytest.fixture(scope="module", params=["weights", "reconstruct"])
def whole(request: Any, pair: Path, tmp_path_factory: Any) -> tuple[Path, dict[str, str]]:
    """A recipe's file, and the digests of what it gives undisturbed."""
    folder: Path = tmp_path_factory.mktemp("whole")
    recipe = _recipe(pair, request.param)
    (folder / "recipe.yaml").write_text(recipe.to_yaml())
    merge(recipe, folder / "fused")
    return folder / "recipe.yaml", digest(folder / "fused")


def _start(recipe: Path, out: Path, **environment: str) -> forked.Forked:
    words = ["merge", str(recipe), "--out", str(out)]
    root = str(Path(__file__).parents[2])
    env = {**os.environ, "PYTHONPATH": root, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", **environment}
    return forked.start(words, env=env)


def test_killed_at_random_it_ends_with_the_same_bytes(whole: tuple[Path, dict[str, str]], tmp_path: Path) -> None:
    recipe, expected = whole
    draw, out = random.Random(recipe.read_text()), tmp_path / "fused"
    began = time.monotonic()
    first = _start(recipe, tmp_path / "timed")
    assert first.communicate(300) and first.returncode == 0
    seconds = time.monotonic() - began
    killed = 0
    for number in range(KILLS):
        if number == KILLS // 2:
            shutil.rmtree(out, ignore_errors=True)  # once more from the beginning
        process = _start(recipe, out)
        time.sleep(seconds * draw.uniform(0.1, 0.8))
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
            killed += 1
        process.communicate(60)
    assert killed >= KILLS // 4
    last = _start(recipe, out)
    _, said = last.communicate(300)
    assert last.returncode == 0, said
    assert digest(out) == expected == digest(tmp_path / "timed")
    left = {path.relative_to(out) for path in out.rglob("*")} ^ {
        path.relative_to(tmp_path / "timed") for path in (tmp_path / "timed").rglob("*")
    }
    assert not left


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[int], Path]]:
    """Makes a disk of so many bytes; skips where mounting is not allowed."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted: list[Path] = []

    def make(size: int) -> Path:
        words = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(disk)]
        if shutil.which("mount") is None or subprocess.run(words, capture_output=True).returncode:
            pytest.skip("no file system can be mounted here")
        mounted.append(disk)
        return disk

    yield make
    for path in mounted:
        subprocess.run(["umount", "-l", str(path)], check=True)


@pytest.mark.parametrize("stage", [stage for stage in STAGES if stage not in ("choose", "reconstruct")])
def test_a_disk_that_is_full_in_any_stage(
    whole: tuple[Path, dict[str, str]], small_disk: Callable[[int], Path], tmp_path: Path, stage: str
) -> None:
    recipe, expected = whole
    names = Recipe.from_mapping(_read(recipe)).fusion.what
    if stage == "fuse" and names == "reconstruct":
        stage = "reconstruct"
    disk = small_disk(256 << 20)
    out, filler = disk / "fused", disk / "filler"
    # Up to the stage with room, then with none but for the few pages that a file system needs.
    full = (
        "import sys\nfrom pathlib import Path\nfrom tmerge.stages.runner import Runner\n"
        f"call = Runner.__call__\n"
        "def filled(self, stage):\n"
        f"    if stage.name == {stage!r}:\n"
        f"        with open({str(filler)!r}, 'wb') as file:\n"
        "            try:\n"
        "                while True: file.write(bytes(4096)); file.flush()\n"
        "            except OSError: pass\n"
        "    return call(self, stage)\n"
        "Runner.__call__ = filled\n"
        "from tmerge.cli import main\nmain()\n"
    )
    words = ["merge", str(recipe), "--out", str(out)]
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    process = forked.start(words, full, env=env)
    _, said = process.communicate(300)
    errors = [line for line in said.splitlines() if line.startswith("error: ")]
    assert process.returncode == 2 and "Traceback" not in said, said
    assert len(errors) == 1 and said.rstrip().endswith(errors[0])
    assert "disk" in errors[0] or "free; make room" in errors[0]
    assert not (out / "config.json").exists()
    filler.unlink()
    again = _start(recipe, out)
    _, said = again.communicate(300)
    assert again.returncode == 0, said
    assert digest(out) == expected and not list(out.rglob("*.part"))


def _read(path: Path) -> Any:
    from tmerge.recipe.strict_yaml import load_yaml

    return load_yaml(path.read_text(), "recipe")


def test_many_merges_in_one_process_take_no_more_memory_than_a_few(pair: Path, tmp_path: Path) -> None:
    recipe = recipe_for(pair, evaluation={"descent": 0})
    resident: list[int] = []
    for number in range(MERGES):
        merge(recipe, tmp_path / f"run{number}")
        shutil.rmtree(tmp_path / f"run{number}")
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        resident.append(pages * resource.getpagesize())
    # The first few fill caches; what comes after is level, but for what the allocator holds back.
    assert resident[-1] - resident[MERGES // 5] < 40 << 20, [size >> 20 for size in resident]
    assert threading.active_count() < 10
