"""A recipe as a Hugging Face Job, through the real client, against a Hub on the loopback interface."""

from __future__ import annotations

import json

import pytest
import yaml

from tests.hub import Repo, WritableHub, run_client
from tests.pico import save_pico

TOKEN = "hf_TheSecretOfTheJobsTest"

SCRIPT = """
import json, os
from tests.hub.commands import command, set_hub
results = {}
WORDS = ["merge", "--target", "user/target", "--source", "user/source", "--dataset", "samples:thai"]

def case(name, *words):
    results[name] = command(*words)

case("done", *WORDS, "--remote", "l4x1", "--push", "user/target", "--remote-package", "git+https://example.org/tmerge")
case("done json", *WORDS, "--remote", "cpu-upgrade", "--push", "user/target", "--json")
case("dry run", *WORDS, "--remote", "l4x1", "--push", "user/fused", "--dry-run")
set_hub(job_stage="ERROR", job_log=["merging", "error: no memory"])
case("failed", *WORDS, "--remote", "l4x1", "--push", "user/target")
case("no repo", *WORDS, "--remote", "l4x1")
case("no such hardware", *WORDS, "--remote", "l4x11", "--push", "user/target")
case("local dataset", *WORDS, "--dataset", "mine.jsonl", "--remote", "l4x1", "--push", "user/target")
case("local model", *WORDS, "--source", os.environ["LOCAL"], "--remote", "l4x1", "--push", "user/target")
set_hub(faults=[{"path": "/api/jobs", "status": 402, "message": "Pre-paid credit balance is insufficient"}])
case("no credit", *WORDS, "--remote", "l4x1", "--push", "user/target")
set_hub(faults=[{"path": "/api/jobs", "status": 403, "message": "Jobs are not allowed for this token"}])
case("not allowed", *WORDS, "--remote", "l4x1", "--push", "user/target")
del os.environ["HF_TOKEN"]
case("no token", *WORDS, "--remote", "l4x1", "--push", "user/target")

# What the job itself does with its recipe.
os.environ["TMERGE_RECIPE"] = "target: user/target\\nsource: user/source\\n"
case("in the job", "merge", "env:TMERGE_RECIPE", "--dry-run", "--json")
del os.environ["TMERGE_RECIPE"]
case("no recipe", "merge", "env:TMERGE_RECIPE", "--dry-run")
print("RESULTS" + json.dumps(results))
"""


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    hub = WritableHub(token=TOKEN)
    for name, family in (("target", "llama"), ("source", "qwen2")):
        folder = save_pico(family, root / name)
        (folder / "README.md").write_text("---\nlicense: apache-2.0\n---\n")
        hub.repos[f"user/{name}"] = Repo()
        hub.repos[f"user/{name}"].commit(folder)
    hub.local = root / "source"
    with hub:
        yield hub


@pytest.fixture(scope="module")
def results(hub, tmp_path_factory):
    ended = run_client(hub, tmp_path_factory.mktemp("home"), SCRIPT, token=TOKEN, LOCAL=str(hub.local))
    assert ended.returncode == 0, ended.stderr[-3000:]
    assert TOKEN not in ended.stdout + ended.stderr
    return json.loads(ended.stdout.rpartition("RESULTS")[2])


def test_the_job_gets_the_recipe_and_the_token_as_a_secret(hub, results):
    assert results["done"]["code"] == 0, results["done"]["err"]
    job = hub.jobs[f"{1:024x}"]
    recipe = yaml.safe_load(job.spec["environment"]["TMERGE_RECIPE"])
    assert recipe["target"] == "user/target" and recipe["calibration"]["dataset"] == "samples:thai"
    assert job.spec["secrets"] == {"HF_TOKEN": TOKEN} and job.spec["flavor"] == "l4x1"
    shown = json.dumps({name: value for name, value in job.spec.items() if name != "secrets"})
    assert TOKEN not in shown
    command = " ".join([*job.spec["command"], *job.spec.get("arguments", [])])
    assert "--with git+https://example.org/tmerge" in command
    assert command.endswith(
        "tmerge merge env:TMERGE_RECIPE --out /tmp/fused --push user/target --private --even-if-worse"
    )


def test_its_log_is_followed_and_its_result_named(hub, results):
    err, out = results["done"]["err"], results["done"]["out"]
    assert "merging\npushed\n" in err and "hf jobs cancel" in err
    sha = hub.repos["user/target"].refs["main"]
    assert sha in out and json.loads(results["done json"]["out"])["commit"] == sha


def test_a_dry_run_starts_none(hub, results):
    assert results["dry run"]["code"] == 0 and "tmerge check" in results["dry run"]["out"]
    assert len(hub.jobs) == 3  # done, done json, failed


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("failed", "the job ended as ERROR"),
        ("no repo", "--push user/fused"),
        ("no such hardware", "did you mean l4x1"),
        ("local dataset", "push it as a dataset"),
        ("local model", "is on this machine alone"),
        ("no credit", "needs credit on your account (Pre-paid credit balance is insufficient)"),
        ("not allowed", "may not start jobs"),
        ("no token", "hf auth login"),
        ("no recipe", "the variable TMERGE_RECIPE"),
    ],
)
def test_every_failure_is_one_line(results, name, words):
    result = results[name]
    assert result["code"] == 2, result
    line = result["err"].strip().splitlines()[-1]
    assert line.startswith("error: ") and words in line, result["err"]
    assert "Traceback" not in result["err"]


def test_in_the_job_the_recipe_comes_from_the_environment(results):
    assert json.loads(results["in the job"]["out"])["recipe"]["source"] == "user/source"
