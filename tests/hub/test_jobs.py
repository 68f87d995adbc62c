"""A recipe as a Hugging Face Job, through the real client, against a Hub on the loopback interface."""

from __future__ import annotations

import hashlib
import json
import os

import pytest
import yaml

from tests.hub import Repo, WritableHub, run_client
from tests.pico import save_pico
from tmerge.calibration.files import FILE_SUFFIXES
from tmerge.errors import RemoteError
from tmerge.hub.jobs import start_job
from tmerge.recipe import Recipe

TOKEN = "hf_TheSecretOfTheJobsTest"

SCRIPT = """
import json, os, signal, time
from huggingface_hub import HfApi
from tests.hub.commands import command, set_hub
results = {}
WORDS = ["merge", "--target", "user/target", "--source", "user/source", "--dataset", "samples:thai"]

def case(name, *words):
    results[name] = command(*words)

PUSH = ["--push", "user/fused"]
PACKAGE = ["--remote-package", "git+https://example.org/tmerge"]
WHEEL = "https://example.org/tmerge-0.1.0-py3-none-any.whl"
REMOTE = ["--remote", "l4x1", *PACKAGE]

case("public", *WORDS, *REMOTE, "--push", "user/target")
case("another model", *WORDS, *REMOTE, "--push", "user/other")
case("somebody else's", *WORDS, *REMOTE, "--push", "stranger/fused")
case("somebody else's, readable", *WORDS, *REMOTE, "--push", "stranger/read")
set_hub(faults=[{"path": "/api/repos/create", "status": 403, "message": "private storage limit reached"}])
case("not made", *WORDS, *REMOTE, "--push", "user/large")

case("no package", *WORDS, "--remote", "l4x1", *PUSH)
case("another project's package", *WORDS, "--remote", "l4x1", "--remote-package", "tmerge==0.1.0", *PUSH)
case("local package", *WORDS, "--remote", "l4x1", "--remote-package", "dist/tmerge-0.1.0-py3-none-any.whl", *PUSH)
case("done", *WORDS, *REMOTE, *PUSH)
case("done json", *WORDS, "--remote", "cpu-upgrade", "--remote-package", WHEEL, *PUSH, "--json")
case("half hours", *WORDS, "--remote", "a10g-largex4", *PACKAGE, *PUSH, "--remote-timeout", "1.5h")
for suffix in ("sh", "py", "yaml", "toml"):
    case(f"repo.{suffix}", *WORDS, *REMOTE, "--push", f"user/fused.{suffix}")
# A file of the command's own words is not sent along either.
os.chdir(os.environ["WITH_FILES"])
case("files", *WORDS, *REMOTE, "--push", "user/fused.sh")
os.chdir(os.environ["REPOSITORY"])
case("three names", *WORDS, *REMOTE, "--push", "user/what/ever")
case("a slash too many", *WORDS, *REMOTE, "--push", "user/fused/")
for timeout in json.loads(os.environ["TIMEOUTS"]):
    case(f"timeout {timeout}", *WORDS, *REMOTE, *PUSH, "--remote-timeout", timeout)

case("on a card alone", *WORDS, *REMOTE, "--push", "user/begun")
case("dry run", *WORDS, *REMOTE, "--push", "user/dry", "--dry-run")
case("dry run json", *WORDS, *REMOTE, "--push", "user/dry", "--dry-run", "--json")
case("a device of the job's", *WORDS, *REMOTE, *PUSH, "--device", "cuda:7")
case("a device of the job's, dry", *WORDS, *REMOTE, "--push", "user/dry", "--device", "cuda:7", "--dry-run")
case("not on this machine", *WORDS, "--device", "cuda:7", "--dry-run")
def interrupted(*args, **kwargs):
    yield "merging"
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(60)

# A shell that runs this behind it may have it ignore Ctrl-C.
signal.signal(signal.SIGINT, signal.default_int_handler)
follow, HfApi.fetch_job_logs = HfApi.fetch_job_logs, interrupted
case("stopped", *WORDS, *REMOTE, "--push", "user/stopped")
def terminated(*args, **kwargs):
    yield "merging"
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(60)

HfApi.fetch_job_logs = terminated
case("terminated", *WORDS, *REMOTE, "--push", "user/terminated")
HfApi.fetch_job_logs = follow
ask, HfApi.run_job = HfApi.run_job, lambda *args, **kwargs: next(item for item in interrupted() if item != "merging")
case("stopped early", *WORDS, *REMOTE, "--push", "user/early")
HfApi.run_job = ask
set_hub(job_log=["merging", "is worse, and not pushed"])
case("no result", *WORDS, *REMOTE, *PUSH)
set_hub(job_stage="ERROR", job_log=["merging", "error: no memory"])
case("failed", *WORDS, *REMOTE, *PUSH)
case("no repo", *WORDS, *REMOTE)
case("no such hardware", *WORDS, "--remote", "l4x11", *PACKAGE, *PUSH)
case("local dataset", *WORDS, "--dataset", "mine.jsonl", *REMOTE, *PUSH)
case("local model", *WORDS, "--target", os.environ["LOCAL"], *REMOTE, *PUSH)
set_hub(faults=[{"path": "/api/jobs", "status": 402, "message": "Pre-paid credit balance is insufficient"}])
case("no credit", *WORDS, *REMOTE, *PUSH)
set_hub(faults=[{"path": "/api/jobs", "status": 403, "message": "Jobs are not allowed for this token"}])
case("not allowed", *WORDS, *REMOTE, *PUSH)
del os.environ["HF_TOKEN"]
case("no token", *WORDS, *REMOTE, *PUSH)

# What the job itself does with its recipe.
os.environ["TMERGE_RECIPE"] = "target: user/target\\nsource: user/source\\n"
case("in the job", "merge", "env:TMERGE_RECIPE", "--dry-run", "--json")
del os.environ["TMERGE_RECIPE"]
case("no recipe", "merge", "env:TMERGE_RECIPE", "--dry-run")
print("RESULTS" + json.dumps(results))
"""


TIMEOUTS = ("4h30m", "abc", "", "0h", "-1h", "nanh", "1.5", "h", "99999999999999h")


class PushingJobs(dict):
    """Jobs that do what their log says: one that ends with "pushed" leaves a commit in its repo."""

    def __init__(self, hub):
        super().__init__()
        self.hub = hub
        self.repos = []

    def __setitem__(self, number, job):
        super().__setitem__(number, job)
        words = [*job.spec["command"], *job.spec.get("arguments", [])]
        self.repos.append(words[words.index("--push") + 1])
        if job.stage == "COMPLETED" and job.log[-1] == "pushed":
            repo = self.hub.repos[self.repos[-1]]
            sha = hashlib.sha1(number.encode()).hexdigest()
            repo.commits[sha] = {".gitattributes": b"", "README.md": b"", "tmerge/report.json": b"{}"}
            repo.refs["main"] = sha


def repo_of(files, access="private"):
    sha = hashlib.sha1(repr(files).encode()).hexdigest()
    return Repo({sha: dict.fromkeys(files, b"")}, {"main": sha}, access)


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
    hub.repos["user/other"] = repo_of([".gitattributes", "config.json"])
    hub.repos["user/begun"] = repo_of([".gitattributes", "README.md"])
    hub.repos["stranger/read"] = repo_of([".gitattributes"])
    hub.jobs = PushingJobs(hub)
    with hub:
        yield hub


@pytest.fixture(scope="module")
def results(hub, tmp_path_factory):
    files = tmp_path_factory.mktemp("files")
    for name in ("tmerge", "merge"):
        (files / name).write_text("not to be sent")
    where = {
        "LOCAL": str(hub.local),
        "WITH_FILES": str(files),
        "REPOSITORY": os.getcwd(),
        "TIMEOUTS": json.dumps(TIMEOUTS),
    }
    ended = run_client(hub, tmp_path_factory.mktemp("home"), SCRIPT, token=TOKEN, **where)
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
    assert "--with git+https://example.org/tmerge tmerge merge" in command
    second = hub.jobs[f"{2:024x}"].spec["command"]
    assert "--with https://example.org/tmerge-0.1.0-py3-none-any.whl tmerge merge" in " ".join(second)
    assert command.endswith(
        "tmerge merge env:TMERGE_RECIPE --out /tmp/fused --push user/fused --private --even-if-worse"
    )


def test_several_cards_have_a_process_each(hub, results):
    job = hub.jobs[f"{3:024x}"]
    assert job.spec["flavor"] == "a10g-largex4"
    launched = "accelerate launch --multi_gpu --num_processes 4 -m tmerge merge env:TMERGE_RECIPE --out"
    assert f"--with git+https://example.org/tmerge {launched}" in " ".join(job.spec["command"])


def test_its_log_is_followed_and_its_result_named(hub, results):
    err, out = results["done"]["err"], results["done"]["out"]
    assert "merging\npushed\n" in err and "hf jobs cancel" in err
    first, second = (hashlib.sha1(f"{number:024x}".encode()).hexdigest() for number in (1, 2))
    assert f"user/fused (private), commit {first}" in out
    assert json.loads(results["done json"]["out"])["commit"] == second
    # The job found its repo made, and private.
    assert hub.repos["user/fused"].access == "private"


def test_only_what_the_push_would_take_costs_a_job(hub, results):
    assert results["on a card alone"]["code"] == 0, results["on a card alone"]["err"]
    # None of the refused ones, whose repos are as they were.
    names = ["fused", "fused", "fused", "fused.sh", "fused.py", "fused.yaml", "fused.toml", "fused.sh", "begun"]
    assert hub.jobs.repos == [f"user/{name}" for name in [*names, "fused", "stopped", "terminated", "fused", "fused"]]
    assert not {"user/large", "user/dry", "stranger/fused"} & set(hub.repos)
    assert len(hub.repos["user/target"].commits) == len(hub.repos["user/other"].commits) == 1


def test_a_job_takes_as_long_and_goes_where_it_was_told(hub, results):
    specs = [job.spec for job in hub.jobs.values()]
    assert [spec["timeoutSeconds"] for spec in specs[:3]] == [4 * 3600, 4 * 3600, 5400]
    for spec, suffix in zip(specs[3:8], ("sh", "py", "yaml", "toml", "sh"), strict=True):
        assert spec["command"][spec["command"].index("--push") + 1] == f"user/fused.{suffix}"
        assert spec["labels"] == {"name": f"tmerge-fused-{suffix}"} and "volumes" not in spec
    for name in ("half hours", "repo.sh", "repo.py", "repo.yaml", "repo.toml", "files"):
        assert results[name]["code"] == 0, results[name]["err"]


def test_a_dry_run_starts_none(hub, results):
    assert results["dry run"]["code"] == 0 and "tmerge check" in results["dry run"]["out"]
    assert "user/dry" not in [*hub.jobs.repos, *hub.repos]
    said = "time and memory are those of this machine, not of l4x1"
    assert said in results["dry run"]["out"]
    assert said in json.loads(results["dry run json"]["out"])["estimate"]["assumes"]


def test_who_stops_following_is_told_that_the_job_goes_on(hub, results):
    number = next(number for number, job in hub.jobs.items() if "user/stopped" in job.spec["command"])
    lines = results["stopped"]["err"].strip().splitlines()
    assert results["stopped"]["code"] == 130 and "merging" in lines
    assert results["terminated"]["code"] == 143 and "stopped; the job goes on: " in results["terminated"]["err"]
    assert lines[-1] == (
        f"stopped; the job goes on: {hub.endpoint}/jobs/user/{number}; its log: `hf jobs logs {number}`; "
        f"to stop it: `hf jobs cancel {number}`"
    )
    lines = results["stopped early"]["err"].strip().splitlines()
    assert results["stopped early"]["code"] == 130 and lines[-1].endswith("is shown by `hf jobs ps`")
    assert "same command continues" not in results["stopped"]["err"] + results["stopped early"]["err"]


def test_a_device_that_this_machine_lacks_is_the_jobs(hub, results):
    assert results["not on this machine"]["code"] == 2 and "cuda" in results["not on this machine"]["err"]
    for name in ("a device of the job's", "a device of the job's, dry"):
        assert results[name]["code"] == 0, results[name]["err"]
    devices = [yaml.safe_load(job.spec["environment"]["TMERGE_RECIPE"])["device"] for job in hub.jobs.values()]
    assert devices.count("cuda:7") == 1


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("public", "user/target is there and public"),
        ("another model", "user/other holds something else than a run of tmerge"),
        ("somebody else's", "stranger/fused: this account or token may not write there"),
        ("somebody else's, readable", "stranger/read is not of user"),
        ("not made", "user/large: the account's storage or quota is used up (private storage limit reached)"),
        ("no package", "--remote-package what the job installs tmerge from: git+https://..."),
        ("another project's package", "or the https:// address of its wheel"),
        ("local package", "or the https:// address of its wheel"),
        ("three names", "'user/what/ever' is no name of a repo"),
        ("a slash too many", "'user/fused/' is no name of a repo"),
        *((f"timeout {timeout}", f"timeout {timeout!r} is no span of time") for timeout in TIMEOUTS),
        ("no result", "the job ended without a result: it pushed nothing to user/fused; its log: http"),
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


def refusal(**keys):
    """Why no job is started; one whose recipe could run elsewhere comes as far as its hardware."""
    recipe = Recipe.model_validate({"target": "user/target", "source": "user/source", **keys})
    with pytest.raises(RemoteError) as caught:
        start_job(recipe, "l4x11", "user/fused", package="git+https://example.org/tmerge", token=TOKEN)
    return str(caught.value)


def test_a_hub_id_without_a_namespace_is_not_on_this_machine(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "did you mean l4x1" in refusal(target="gpt2", source="distilgpt2@main")
    (tmp_path / "gpt2").mkdir()
    assert "target 'gpt2' is on this machine alone" in refusal(target="gpt2")


@pytest.mark.parametrize("name", [*(f"mine{suffix}" for suffix in FILE_SUFFIXES), "mine.TSV", "folder", "/texts"])
def test_a_file_of_texts_is_on_this_machine(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    assert f"{name!r} is a file of this machine" in refusal(calibration={"dataset": name})


@pytest.mark.parametrize("name", ["samples:thai", "user/texts", "wikitext"])
def test_a_dataset_of_the_hub_is_not(name):
    assert "did you mean l4x1" in refusal(calibration={"dataset": name})
