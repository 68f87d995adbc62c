"""An adapter that stands for a model: its base is recorded at its commit too, and read there when it is run again."""

from __future__ import annotations

import json

import yaml

from tests.hub import LoopbackHub, Repo, run_client
from tests.pico import save_pico
from tests.pico_adapter import save_adapter

SCRIPT = """
import json
from tests.hub.commands import command
print("RESULTS" + json.dumps(command(*WORDS)))
"""


def called(hub, tmp_path, *words):
    ended = run_client(hub, tmp_path / "home", f"WORDS = {list(map(str, words))!r}\n{SCRIPT}")
    assert ended.returncode == 0, ended.stderr[-3000:]
    result = json.loads(ended.stdout.partition("RESULTS")[2])
    assert result["code"] == 0, result["err"]
    return result


def test_a_base_that_has_moved_is_read_where_it_was(tmp_path):
    target = save_pico("qwen2", tmp_path / "target", layers=2)
    first, later = (save_pico("llama", tmp_path / f"base{seed}", layers=2, seed=seed) for seed in (1, 2))
    lora = save_adapter(first, tmp_path / "lora", target_modules=["q_proj", "down_proj"])
    config = json.loads((lora / "adapter_config.json").read_text()) | {"base_model_name_or_path": "user/base"}
    (lora / "adapter_config.json").write_text(json.dumps(config))
    repos = {f"user/{name}": Repo() for name in ("target", "base", "lora")}
    repos["user/target"].commit(target)
    of_base, of_lora = repos["user/base"].commit(first), repos["user/lora"].commit(lora)
    small = ["calibration.texts=80", "calibration.max_tokens=32", "fusion.alpha=0.2", "evaluation.bootstrap=100"]
    words = [word for setting in small for word in ("--set", setting)]
    pair = ["--target", "user/target", "--source", "user/lora", "--dataset", "samples:english"]
    with LoopbackHub(repos) as hub:
        called(hub, tmp_path, "merge", *pair, *words, "--out", tmp_path / "run")
        repos["user/base"].commit(later)
        again = ["reproduce", tmp_path / "run", "--out", tmp_path / "again", "--json"]
        assert json.loads(called(hub, tmp_path, *again)["out"])["same"] is True
    recipe = yaml.safe_load((tmp_path / "run" / "tmerge" / "recipe.yaml").read_text())
    assert recipe["source"] == f"user/lora@{of_lora}"
    assert recipe["bases"] == {f"user/lora@{of_lora}": f"user/base@{of_base}"}
