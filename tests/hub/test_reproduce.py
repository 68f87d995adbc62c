"""A pushed run held against its own published weights, through the real client, on the loopback Hub."""

from __future__ import annotations

import json
import shutil

import pytest

from tests.comparison.test_reproduce import reproducible
from tests.hub import LoopbackHub, Repo, run_client
from tmerge.stages.merge import merge

SCRIPT = """
import json
from tests.hub.commands import command

results = {name: command("reproduce", f"user/{name}", "--out", OUT + name, "--json") for name in NAMES}
print("RESULTS" + json.dumps(results))
"""


@pytest.fixture(scope="module")
def repos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("published")
    recipe = reproducible(folder)
    merge(recipe, folder / "run")
    found = {}
    for name in ("fused", "swapped", "extra"):
        shutil.copytree(folder / "run", folder / name, ignore=shutil.ignore_patterns("cache"))
        if name != "fused":
            data = (folder / name / "model.safetensors").read_bytes()
            changed = data[:-1] + bytes([data[-1] ^ 1])
            (folder / name / ("model.safetensors" if name == "swapped" else "other.safetensors")).write_bytes(changed)
        found[f"user/{name}"] = Repo()
        found[f"user/{name}"].commit(folder / name)
    return found


def reproduced(hub, tmp_path, *names):
    script = f"OUT, NAMES = {str(tmp_path) + '/'!r}, {names!r}\n" + SCRIPT
    ended = run_client(hub, tmp_path / "home", script)
    assert ended.returncode == 0, ended.stderr[-3000:]
    return json.loads(ended.stdout.partition("RESULTS")[2])


def downloads(hub):
    return [line for line in hub.requests if "/resolve/" in line and line.split("?")[0].endswith("model.safetensors")]


@pytest.mark.slow
def test_published_weights_are_known_by_the_hubs_digests(repos, tmp_path):
    with LoopbackHub(repos) as hub:
        results = reproduced(hub, tmp_path, "fused", "swapped", "extra")
        assert not downloads(hub)
    result = json.loads(results["fused"]["out"])
    assert results["fused"]["code"] == 0 and result["same"] is True, results["fused"]["err"]
    pair = result["weights"]["model.safetensors"]
    assert pair["there"] == pair["published"] == pair["here"]
    for name, words in (
        ("swapped", "model.safetensors: the published file is another than its report names, and than came out here"),
        ("extra", "other.safetensors is published and not named in its report"),
    ):
        assert results[name]["code"] == 1 and json.loads(results[name]["out"])["same"] is False
        line = results[name]["err"].strip().splitlines()[-1]
        assert line.startswith("error: ") and words in line, line


@pytest.mark.slow
def test_where_the_hub_states_no_digest_the_file_is_read(repos, tmp_path):
    with LoopbackHub(repos) as hub:
        hub.states_digests = False
        results = reproduced(hub, tmp_path, "fused", "swapped")
        assert len(downloads(hub)) >= 2
    assert results["fused"]["code"] == 0, results["fused"]["err"]
    assert results["swapped"]["code"] == 1
    assert "the published file is another than its report names" in results["swapped"]["err"]
