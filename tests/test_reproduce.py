"""A run again, from its own folder: the same bytes, and what is said when they are not."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys

import pytest

from tests.pico import save_pico
from tmerge.errors import ModelNotFoundError
from tmerge.pipeline import merge
from tmerge.recipe import Recipe
from tmerge.reproduce import difference_words, reproduce


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("reproduce")
    for name, family, seed in (("target", "llama", 1), ("source", "gpt2", 2)):
        save_pico(family, folder / name, seed=seed)
    recipe = Recipe(
        target=str(folder / "target"),
        source=str(folder / "source"),
        calibration={"dataset": "samples:english", "texts": 90},
        fusion={"top_k": 16},
        adaptation={"steps": 2, "batch_size": 2},
    )
    merge(recipe, folder / "fused")
    return folder


def test_the_same_bytes(finished, tmp_path):
    result = reproduce(str(finished / "fused"), tmp_path / "again")
    assert result["same"] is True and result["differs"] == {}
    assert result["scores"]["there"] == result["scores"]["here"]
    written = (tmp_path / "again/model.safetensors").read_bytes()
    assert written == (finished / "fused/model.safetensors").read_bytes()


def test_other_bytes_end_with_1_and_say_what_differs(finished, tmp_path):
    shutil.copytree(finished / "fused", tmp_path / "fused")
    path = tmp_path / "fused/tmerge/report.json"
    report = json.loads(path.read_text())
    report["weights"] = dict.fromkeys(report["weights"], "0" * 64)
    report["versions"]["torch"] = "1.0"
    path.write_text(json.dumps(report))
    command = [sys.executable, "-m", "tmerge.cli", "reproduce", str(tmp_path / "fused"), "--out", str(tmp_path / "o")]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert ended.returncode == 1, ended.stderr
    line = ended.stderr.strip().splitlines()[-1]
    assert line.startswith("error: the weights differ from those of") and "torch 1.0 there" in line
    assert "Traceback" not in ended.stderr


def test_a_model_that_is_another_by_now_is_refused_before_it_is_merged(finished, tmp_path):
    shutil.copytree(finished / "fused", tmp_path / "fused")
    save_pico("llama", tmp_path / "target", seed=9)
    path = tmp_path / "fused/tmerge/recipe.yaml"
    path.write_text(path.read_text().replace(str(finished / "target"), str(tmp_path / "target")))
    with pytest.raises(ModelNotFoundError, match="is not the target that .* was made from"):
        reproduce(str(tmp_path / "fused"), tmp_path / "again")
    assert not (tmp_path / "again").exists()


def test_a_trained_run_is_merged_and_trained_again(finished, tmp_path):
    pytest.importorskip("trl", reason="the adapt extra is not installed")
    from tmerge.adapted import adapt_run

    trained = adapt_run(finished / "fused", finished / "trained", {})
    result = reproduce(str(finished / "trained"), tmp_path / "again")
    assert result["same"] is True, difference_words(result)
    assert result["weights"]["model.safetensors"]["here"] == trained["weights"]["model.safetensors"]
    assert result["folder"] == str(tmp_path / "again/trained")
