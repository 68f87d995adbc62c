"""What each of two processes has in memory for itself alone, beside one that does everything."""

from __future__ import annotations

import time

import psutil
import pytest

from tests.bench.processes import Memory
from tests.launched import begun
from tests.pico import save_pico

_LARGE = {"layers": 2, "hidden_size": 768, "intermediate_size": 8192}


def _seen(count, words):
    """The most that any process of a merge has for itself alone, and that all have together; bytes."""
    memory = Memory()
    with begun(words, count) as launcher:
        process = psutil.Process(launcher.pid)
        while launcher.poll() is None:
            memory.look(process)
            time.sleep(0.05)
        assert launcher.returncode == 0, launcher.stderr.read()
    return memory


@pytest.mark.slow
def test_weights_that_are_computed_as_they_are_stored_are_there_once_for_both(tmp_path):
    sizes = {}
    for seed, name in enumerate(("target", "source")):
        save_pico("llama", tmp_path / name, seed=seed, **_LARGE)
        sizes[name] = (tmp_path / name / "model.safetensors").stat().st_size
    settings = ["calibration.dataset=samples:english", "calibration.texts=80", "calibration.max_tokens=16"]
    settings += ["memory=resident", "fusion.alpha=0.2", "evaluation.texts=8", "evaluation.controls=[]", "dtype=float32"]
    words = ["merge", "--target", str(tmp_path / "target"), "--source", str(tmp_path / "source")]
    words += [word for setting in settings for word in ("--set", setting)]
    alone, both = (_seen(count, [*words, "--out", str(tmp_path / f"of-{count}")]) for count in (1, 2))
    # Of a model the target is there throughout.
    assert both.own < alone.own - sizes["target"] / 2
    assert both.together < 2 * alone.together - sizes["target"]
