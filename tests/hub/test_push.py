"""From two repos to a pushed merge and back, through the real client, against a Hub on the loopback interface."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import get_args

import pytest

from tests.hub import Repo, WritableHub, run_client
from tests.pico import save_pico
from tmerge.evaluation import Verdict

TOKEN = "hf_TheSecretOfThisTestThatNobodyMayRead"
READER = "hf_AnotherSecretThatOnlyReads"

# One process for all cases: importing torch and transformers costs seconds.
SCRIPT = """
import json, os, shutil
from pathlib import Path
from tests.hub.commands import command, set_hub
from tmerge.hub import push, plan_push

work = Path(os.environ["WORK"])
os.chdir(work)
results = {}
MERGE = ["--dataset", "samples:indonesian", "--set", "calibration.texts=60", "--set", "fusion.top_k=16",
    "--set", "calibration.max_tokens=48", "--set", "transport.eta=1"]

def case(name, *words):
    results[name] = command(*words)

case("check", "check", "--target", "user/target", "--source", "user/source", "--json")
case("check shown", "check", "--target", "user/target", "--source", "user/source")
case("merge", "merge", "--target", "user/target", "--source", "user/source", *MERGE, "--set", "fusion.alpha=0.3")
before = sorted((str(p), p.stat().st_mtime_ns) for p in Path("fused").rglob("*") if p.is_file())

report = json.loads(Path("fused/tmerge/report.json").read_text())
gate = ["--even-if-worse"] if report["verdict"] == "hurts" else []
token = os.environ.pop("HF_TOKEN")
case("no token", "push", "--repo", "user/fused", *gate)
case("no token for merge", "merge", "demo", "--push", "user/f", "--out", "x")
os.environ["HF_TOKEN"] = os.environ["READER"]
case("reader", "push", "--repo", "user/fused", *gate)
os.environ["HF_TOKEN"] = "hf_unknown"
case("unknown token", "push", "--repo", "user/fused", *gate)
os.environ["HF_TOKEN"] = token

case("dry run", "push", "--repo", "user/fused", "--dry-run", *gate)
case("dry run json", "push", "--repo", "user/fused", "--dry-run", "--json", *gate)
case("no repo", "push", *gate)
case("bad name", "push", "--repo", "user/what/ever", *gate)
case("not a run", "push", "nothing", "--repo", "user/fused", *gate)
case("another's", "push", "--repo", "stranger/new", *gate)
case("another model", "push", "--repo", "user/target", *gate)
case("both", "push", "--repo", "user/fused", "--create-pr", "--revision", "x", *gate)

# Network lost in the middle of the large files; every retry of the client is lost as well (and not waited for).
import huggingface_hub.utils._http as http
from types import SimpleNamespace
clock, http.time = http.time, SimpleNamespace(sleep=lambda seconds: None, time=http.time.time)
set_hub(faults=[{"path": "part=2", "method": "PUT", "times": 50}])
case("lost", "push", "--repo", "user/fused", *gate)
http.time = clock
set_hub(faults=[{"path": "/commit/", "status": 403, "message": "Private repository storage limit reached"}])
case("quota", "push", "--repo", "user/fused", *gate)
set_hub(faults=[{"path": "/api/repos/create", "status": 409, "message": "This name is taken by a collection"}])
case("taken", "push", "--repo", "user/other", *gate)
set_hub(faults=[{"path": "/preupload/", "status": 429, "times": 1, "headers": {"Retry-After": "0"}}])
case("push", "push", "--repo", "user/fused", *gate)
case("again", "push", "--repo", "user/fused", "--json", *gate)
case("public", "push", "--repo", "user/fused", "--private", *gate)
case("own name", "push", "--repo", "mine", "--private", "--json", *gate)
case("branch", "push", "--repo", "user/fused", "--revision", "trial", *gate)
case("pull request", "push", "--repo", "stranger/fused", "--create-pr", *gate)
after = sorted((str(p), p.stat().st_mtime_ns) for p in Path("fused").rglob("*") if p.is_file())
results["untouched"] = before == after

from transformers import AutoModelForCausalLM, AutoTokenizer
there = AutoModelForCausalLM.from_pretrained("user/fused")
here = AutoModelForCausalLM.from_pretrained("fused")
import torch
results["equal"] = all(
    torch.equal(a, b) for a, b in zip(there.state_dict().values(), here.state_dict().values(), strict=True)
)
results["tokens"] = AutoTokenizer.from_pretrained("user/fused")("halo dunia")["input_ids"]

case("inspect", "inspect", "user/fused", "--json")
case("inspect page", "inspect", "user/fused", "--html", "page.html")
case("plan", "merge", "--plan", "user/fused", "--set", "fusion.alpha=0.1", "--out", "swept")
case("reproduce", "reproduce", "user/fused", "--json")

# Weights that are not those that were scored.
shutil.copytree("fused", "changed")
weights = Path("changed/model.safetensors")
weights.write_bytes(weights.read_bytes()[:-1] + b"!")
case("changed", "push", "changed", "--repo", "user/changed", *gate)

# A verdict that hurts: needs its flag, and the card says so first.
shutil.copytree("fused", "worse")
path = Path("worse/tmerge/report.json")
worse = json.loads(path.read_text())
worse["verdict"] = "hurts"
worse["evaluation"]["difference"] = {"value": 0.5, "ci95": [0.4, 0.6]}
path.write_text(json.dumps(worse))
case("worse", "push", "worse", "--repo", "user/worse")
case("worse all the same", "push", "worse", "--repo", "user/worse", "--even-if-worse")
card = plan_push("worse", "user/worse", even_if_worse=True).card
silent, spoilt = card.replace("+0.5000", "nothing", 1), card.replace("base_model:", "base_model: [", 1)
for name, text in (("silent", silent), ("spoilt", spoilt)):
    try:
        push("worse", "user/worse", even_if_worse=True, card=text)
        results[name] = "pushed"
    except Exception as error:
        results[name] = f"{type(error).__name__}: {error}"
edited = push("worse", "user/edited", even_if_worse=True, card=card.replace("## Use", "## How to use", 1), token=token)
results["edited"] = edited.repo
try:
    push("worse", "user/refused", even_if_worse=True, card=card.replace("license:", "language: [PT-br]\\nlicense:", 1))
    results["refused card"] = "pushed"
except Exception as error:
    results["refused card"] = f"{type(error).__name__}: {error}"

# Another run into the same repo, in shards, beside files that are nobody's business.
case("sharded", "merge", "--target", "user/target", "--source", "user/source", *MERGE, "--set", "fusion.alpha=0.2",
     "--set", "save.max_shard_size=100KB", "--out", "sharded")
Path("sharded/secrets.txt").write_text("x")
Path("sharded/other.gguf").write_text("x")
case("sharded dry", "push", "sharded", "--repo", "user/fused", "--dry-run", "--json", "--even-if-worse")
case("sharded push", "push", "sharded", "--repo", "user/fused", "--even-if-worse")
there = AutoModelForCausalLM.from_pretrained("user/fused")
here = AutoModelForCausalLM.from_pretrained("sharded")
results["sharded equal"] = all(
    torch.equal(a, b) for a, b in zip(there.state_dict().values(), here.state_dict().values(), strict=True)
)
print("RESULTS" + json.dumps(results))
"""


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    hub = WritableHub(token=TOKEN)
    hub.readers.add(READER)
    for name, family, licence, seed in (("target", "llama", "apache-2.0", 1), ("source", "qwen2", "gemma", 2)):
        folder = save_pico(family, root / name, seed=seed, layers=3)
        (folder / "README.md").write_text(f"---\nlicense: {licence}\nlanguage: [id]\n---\n# Pico\n")
        (folder / "LICENSE").write_text(f"of the {name}")
        hub.repos[f"user/{name}"] = Repo()
        hub.repos[f"user/{name}"].commit(folder)
    # A run of somebody else's, to open a pull request on.
    hub.repos["stranger/fused"] = Repo()
    hub.repos["stranger/fused"].commit(root / "target")
    with hub:
        yield hub


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    return tmp_path_factory.mktemp("work")


@pytest.fixture(scope="module")
def results(hub, work, tmp_path_factory):
    environment = {"WORK": str(work), "READER": READER}
    ended = run_client(hub, tmp_path_factory.mktemp("home"), SCRIPT, token=TOKEN, **environment)
    assert ended.returncode == 0, ended.stderr[-3000:]
    everything = ended.stdout + ended.stderr
    assert TOKEN not in everything and READER not in everything
    return json.loads(ended.stdout.rpartition("RESULTS")[2])


def test_check_reads_headers_and_no_weight(hub, results):
    found = json.loads(results["check"]["out"])
    for role in ("target", "source"):
        model = found[role]
        assert len(model["commit"]) == 40 and model["gated"] is False and model["private"] is False
        assert set(model["stored"]) == {"F32"} and sum(model["stored"].values()) >= model["parameters"]
        # Nothing was there before: the weights, the tokenizer and its settings are still to come, config.json is not.
        files = hub.repos[f"user/{role}"].commits[model["commit"]]
        tokenizer = [name for name in files if name.startswith("tokenizer")]
        names = ["model.safetensors", "generation_config.json", *tokenizer]
        assert model["download_bytes"] == sum(len(files[name]) for name in names)
        assert model["tied_embeddings"] in (True, False)
    assert found["estimate"]["download_bytes"] == sum(found[role]["download_bytes"] for role in ("target", "source"))
    assert found["licence"]["id"] == "gemma" and any("Notice" in duty for duty in found["licence"]["duties"])
    shown = results["check shown"]["out"]
    assert "to download" in shown and "Gemma Terms of Use" in shown and "F32" in shown
    # Until the merge asked for a tokenizer, of the weights only headers had been asked for.
    merged = next(n for n, line in enumerate(hub.requests) if "tokenizer_config.json" in line)
    asked = [line for line in hub.requests[:merged] if line.startswith("GET") and "model.safetensors" in line]
    assert asked and all(line.endswith(" bytes=0-100000") for line in asked)


def test_what_is_pushed_is_the_run_and_nothing_else(hub, work, results):
    assert results["push"]["code"] == 0, results["push"]["err"]
    url, commit = results["push"]["out"].split("\n")[:2]
    assert url == f"{hub.endpoint}/user/fused"
    sha = commit.removeprefix("commit ")
    files = hub.repos["user/fused"].commits[sha]
    fused = work / "fused"
    expected = {
        path.relative_to(fused).as_posix()
        for path in fused.rglob("*")
        if path.is_file() and "tmerge/cache" not in path.as_posix()
    }
    assert set(files) == expected | {".gitattributes"}
    assert {"tmerge/recipe.yaml", "tmerge/report.json", "tmerge/transport.safetensors"} < set(files)
    assert sum(name.endswith(".png") for name in files) == 2
    assert files["LICENSE"] == b"of the target"
    for name in expected - {"README.md"}:
        assert files[name] == (fused / name).read_bytes(), name
    assert results["equal"] is True and len(results["tokens"]) > 1
    assert results["untouched"] is True


def test_the_same_push_continues_where_it_stopped(hub, results):
    assert results["lost"]["code"] == 2
    assert len(results["lost"]["err"].strip().splitlines()[-1].split("; ")) >= 2
    assert "the same command continues" in results["lost"]["err"]
    # What had come in whole was not sent again: every object was uploaded once.
    assert len(hub.uploads) == len(set(hub.uploads)) > 1
    again = json.loads(results["again"]["out"])
    assert again["repo"] == "user/fused" and again["commit"] in hub.repos["user/fused"].commits


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("no token", "hf auth login"),
        ("no token for merge", "hf auth login"),
        ("reader", "may not write there"),
        ("unknown token", "does not accept this token"),
        ("no repo", "--repo user/fused"),
        ("bad name", "is no name of a repo"),
        ("not a run", "nothing is not a run of tmerge"),
        ("another's", "may not write there"),
        ("another model", "holds another model"),
        ("both", "--create-pr opens a pull request"),
        ("lost", "was lost; nothing here was changed, and the same command continues"),
        ("quota", "quota is used up (Private repository storage limit reached)"),
        ("taken", "the name is taken"),
        ("public", "--private cannot be kept"),
        ("changed", "is not the file that the report was measured on"),
        ("worse", "--even-if-worse"),
    ],
)
def test_every_failure_is_one_line(results, name, words):
    result = results[name]
    assert result["code"] == 2, result
    line = result["err"].strip().splitlines()[-1]
    assert line.startswith("error: ") and words in line, result["err"]
    assert "Traceback" not in result["err"]


def test_private_branch_and_pull_request(hub, results):
    own = json.loads(results["own name"]["out"])
    assert own["repo"] == "user/mine" and hub.repos["user/mine"].access == "private"
    assert results["branch"]["code"] == 0 and results["branch"]["out"].startswith(
        f"{hub.endpoint}/user/fused/tree/trial"
    )
    assert "tmerge/report.json" in hub.repos["user/fused"].commits[hub.repos["user/fused"].refs["trial"]]
    assert results["pull request"]["code"] == 0, results["pull request"]["err"]
    assert results["pull request"]["out"].startswith(f"{hub.endpoint}/stranger/fused/discussions/1")
    theirs = hub.repos["stranger/fused"]
    assert "tmerge/report.json" not in theirs.commits[theirs.refs["main"]]
    assert "tmerge/report.json" in theirs.commits[theirs.refs["refs/pr/1"]]


def test_a_dry_run_lists_files_and_the_card_and_asks_no_network(hub, results):
    shown, planned = results["dry run"], json.loads(results["dry run json"]["out"])
    assert shown["code"] == 0 and "model.safetensors" in shown["out"] and "base_model_relation: merge" in shown["out"]
    assert planned["total_bytes"] == sum(planned["files"].values())
    assert not any("cache" in name for name in planned["files"])
    assert planned["files"]["README.md"] == len(planned["card"].encode())


def test_a_merge_that_hurts_says_so_first(hub, results):
    assert results["worse all the same"]["code"] == 0, results["worse all the same"]["err"]
    repo = hub.repos["user/worse"]
    card = repo.commits[repo.refs["main"]]["README.md"].decode()
    first = card.split("---\n", 2)[2].strip().split("\n\n")[1]
    assert first.startswith("**The merge hurts") and "+0.5000" in first and "not as a model to be used" in first
    assert results["silent"].startswith("PushError: the card's first paragraph no longer says")
    assert results["spoilt"].startswith("PushError: the card's metadata is not valid")
    edited = hub.repos["user/edited"]
    assert b"## How to use" in edited.commits[edited.refs["main"]]["README.md"]


def test_a_pushed_run_is_looked_at_and_fused_from_again(hub, work, results):
    report = json.loads(results["inspect"]["out"])
    assert report["verdict"] in get_args(Verdict)
    assert results["inspect page"]["code"] == 0 and "plotly" in (work / "page.html").read_text().lower()
    assert results["plan"]["code"] == 0, results["plan"]["err"]
    swept = json.loads((work / "swept/tmerge/report.json").read_text())
    assert swept["plan"].startswith("user/fused@") and swept["fusion"]["alpha"] == 0.1
    assert swept["weights"] != report["weights"]


def test_a_pushed_run_is_reproduced_to_the_bit(work, results):
    result = json.loads(results["reproduce"]["out"])
    assert results["reproduce"]["code"] == 0 and result["same"] is True
    pair = result["weights"]["model.safetensors"]
    data = (work / "reproduced/model.safetensors").read_bytes()
    assert pair["there"] == pair["here"] == hashlib.sha256(data).hexdigest()
    assert result["scores"]["there"] == result["scores"]["here"]


def test_no_token_in_what_was_written(hub, work, results):
    written = [path.read_bytes() for path in Path(work).rglob("*") if path.is_file()]
    pushed = [data for repo in hub.repos.values() for files in repo.commits.values() for data in files.values()]
    assert len(written) > 20 and len(pushed) > 20
    secrets = (TOKEN.encode(), READER.encode())
    assert not any(secret in data for data in written + pushed for secret in secrets)
    assert not any(secret.decode() in line for line in hub.requests for secret in secrets)
    shutil.rmtree(work / "changed")


def test_a_later_run_leaves_nothing_of_the_one_before(hub, results):
    """A single file that stayed would be loaded instead of the shards that the new card speaks of."""
    assert results["sharded push"]["code"] == 0, results["sharded push"]["err"]
    files = hub.repos["user/fused"].commits[hub.repos["user/fused"].refs["main"]]
    assert "model.safetensors" not in files and "model.safetensors.index.json" in files
    assert results["sharded equal"] is True


def test_what_is_not_the_runs_stays_here_and_is_named(hub, results):
    planned = json.loads(results["sharded dry"]["out"])
    assert not {"secrets.txt", "other.gguf"} & set(planned["files"])
    assert any("other.gguf, secrets.txt" in line for line in planned["warnings"])


def test_metadata_that_the_hub_refuses_is_one_line(hub, results):
    assert results["refused card"].startswith("PushError") and "ISO 639" in results["refused card"]
