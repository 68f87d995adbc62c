"""Several sources on the Hub: each pinned to its commit, its weights fetched once, its licence asked."""

from __future__ import annotations

import json

import pytest

from tests.hub import LoopbackHub, Repo, run_client
from tests.pico import save_pico
from tests.pico_adapter import save_adapter
from tmerge.errors import RemoteError
from tmerge.hub.jobs import _refuse_local
from tmerge.recipe import Recipe

SCRIPT = """
import json
from tmerge.preflight.check import check
from tmerge.preflight.models import Models
from tmerge.recipe import Recipe

recipe = Recipe.from_mapping({
    "target": "user/target", "source_base": "user/pico@v1", "device": "cpu",
    "sources": [{"adapter": "user/lora@first"}, {"source": "user/tuned", "weight": 0.5}, {"adapter": "user/other"}],
})
models = Models.of(recipe)
found = check(recipe, models)
print("RESULTS" + json.dumps({
    "pinned": models.pinned(), "sources": models.pinned_sources(), "refusals": found.licence.refusals,
    "why": found.licence.why, "links": found.licence.links, "download": found.estimate.download_bytes,
    "commits": [relative.facts.commit for relative in found.sources],
}))
"""


def test_each_is_pinned_fetched_once_and_asked_for_its_licence(tmp_path):
    base, tuned = (save_pico("llama", tmp_path / name, layers=3, seed=seed) for name, seed in (("b", 1), ("t", 2)))
    loras = [save_adapter(base, tmp_path / f"lora{seed}", seed=seed, target_modules=["q_proj"]) for seed in (1, 2)]
    for folder, licence in ((base, "apache-2.0"), (tuned, "cc-by-nc-4.0"), (loras[1], "gpl-3.0")):
        (folder / "README.md").write_text(f"---\nlicense: {licence}\n---\n")
    repos = {name: Repo() for name in ("target", "pico", "lora", "tuned", "other")}
    commits = {
        "target": repos["target"].commit(save_pico("llama", tmp_path / "target"), "main"),
        "pico": repos["pico"].commit(base, "v1"),
        "lora": repos["lora"].commit(loras[0], "main", "first"),
        "tuned": repos["tuned"].commit(tuned, "main"),
        "other": repos["other"].commit(loras[1], "main"),
    }
    hub = LoopbackHub({f"user/{name}": repo for name, repo in repos.items()})
    with hub:
        ended = run_client(hub, tmp_path / "home", SCRIPT)
    assert ended.returncode == 0, ended.stderr[-2000:]
    found = json.loads(ended.stdout.rpartition("RESULTS")[2])
    assert found["pinned"]["source_base"] == found["pinned"]["source"] == f"user/pico@{commits['pico']}"
    assert found["sources"] == [
        {"adapter": f"user/lora@{commits['lora']}"},
        {"source": f"user/tuned@{commits['tuned']}"},
        {"adapter": f"user/other@{commits['other']}"},
    ]
    assert len(set(found["commits"])) == 3 and found["commits"][1] == commits["tuned"]
    # Target, base and the model that was tuned; the adapters' base is one of them.
    sizes = [(folder / "model.safetensors").stat().st_size for folder in (tmp_path / "target", base, tuned)]
    assert 0.9 * sum(sizes) < found["download"] < 1.1 * sum(sizes)  # and tokenizers
    said = " ".join([found["why"], *found["refusals"]])
    assert "source 2's" in said and "source 3's adapter's" in said


def test_a_source_of_this_machine_is_none_for_a_job(tmp_path):
    sources = [{"adapter": "user/lora"}, {"source": str(tmp_path)}]
    recipe = Recipe.from_mapping({"target": "user/target", "source_base": "user/base", "sources": sources})
    with pytest.raises(RemoteError, match="source 2 .* is on this machine alone"):
        _refuse_local(recipe)


def test_nor_is_a_base_that_lies_here(tmp_path):
    recipe = Recipe.from_mapping(
        {"target": "user/target", "source": "user/lora", "bases": {"user/lora": str(tmp_path)}}
    )
    with pytest.raises(RemoteError, match="bases.user/lora .* is on this machine alone"):
        _refuse_local(recipe)
