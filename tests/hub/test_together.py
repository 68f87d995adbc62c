"""Several processes and the Hub: one commit of each repo for all of them, and each file fetched once a machine."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass

import pytest

from tests.hub import LoopbackHub, Repo, run_client
from tests.launched import begun
from tests.pico import save_pico
from tests.pico_adapter import save_adapter

SCRIPT = """
import json
from tests.meeting import Together
from tmerge.preflight.models import Models
from tmerge.recipe import Recipe

recipe = Recipe.from_mapping({
    "target": "user/target", "source_base": "user/base", "device": "cpu",
    "sources": [{"adapter": "user/lora"}, {"source": "user/tuned"}],
})

def found(models):
    return [models.pinned(), models.pinned_sources(), [model.commit for model in models.sources]]

together = Together(3).run(lambda processes: found(Models.agreed(recipe, processes)))
print("RESULTS" + json.dumps({"together": together, "alone": [found(Models.of(recipe)) for _ in range(2)]}))
"""


@dataclass
class PushedTo(Repo):
    """A repo that somebody pushes to whenever it has been asked for its main branch."""

    def find(self, revision):
        found = super().find(revision)
        if revision == "main":
            self.refs["main"] = next(commit for commit in self.commits if commit != found)
        return found


def pushed_to(*folders):
    """A repo of two commits; of one folder, the second has another card."""
    repo = PushedTo()
    for number, folder in enumerate(folders):
        (folder / "README.md").write_text(f"---\nlicense: apache-2.0\n---\n{number}\n")
        repo.commit(folder)
    return repo


def test_a_push_does_not_come_between_them(tmp_path):
    base = save_pico("llama", tmp_path / "base", layers=3, seed=1)
    lora = save_adapter(base, tmp_path / "lora", target_modules=["q_proj"])
    folders = {"base": base, "lora": lora}
    folders |= {name: save_pico("llama", tmp_path / name, layers=3) for name in ("target", "tuned")}
    hub = LoopbackHub({f"user/{name}": pushed_to(folder, folder) for name, folder in folders.items()})
    with hub:
        ended = run_client(hub, tmp_path / "home", SCRIPT)
    assert ended.returncode == 0, ended.stderr[-2000:]
    results = json.loads(ended.stdout.rpartition("RESULTS")[2])
    first, *others = results["together"]
    assert others == [first, first]
    assert results["alone"][0] != results["alone"][1]  # who asks again finds another


@pytest.mark.slow
def test_processes_merge_one_commit_and_fetch_each_file_once(tmp_path):
    models = {
        name: [save_pico("llama", tmp_path / name / str(seed), seed=seed) for seed in seeds]
        for name, seeds in (("a", (1, 2)), ("b", (3, 4)))
    }
    hub = LoopbackHub({f"user/{name}": pushed_to(*folders) for name, folders in models.items()})
    words = ["merge", "--target", "user/a", "--source", "user/b", "--dataset", "samples:english"]
    for setting in ("calibration.texts=60", "calibration.held_out=0.3", "evaluation.texts=8", "dtype=float32"):
        words += ["--set", setting]
    with hub:
        environment = {"HF_ENDPOINT": hub.endpoint, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "0"}
        launcher = begun([*words, "--out", str(tmp_path / "fused")], HF_HUB_DISABLE_XET="1", **environment)
        said = launcher.communicate(timeout=300)[1]
    assert launcher.returncode == 0, said
    # A header is asked for by a range; a file's body, by none.
    fetched = Counter(line for line in hub.requests if line.startswith("GET ") and line.endswith("model.safetensors"))
    assert len(fetched) == 2 and set(fetched.values()) == {1}, fetched
