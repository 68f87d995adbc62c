"""Hub datasets through the real client, against a Hub on the loopback interface."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from tests.calibration.dataset_hub import DatasetHub
from tests.hub import STOP_THE_HUB, Repo, run_client

# One process for all cases: importing the libraries costs seconds.
SCRIPT = """
import json
from pathlib import Path
from tmerge.calibration import DatasetRecord, dataset_identity, pinned, read_texts
from tmerge.errors import TmergeError
from tmerge.recipe import CalibrationSettings

results = {}
for name, settings in json.loads(CASES).items():
    try:
        found = read_texts(CalibrationSettings(**settings), seed=0, further=name.startswith("further"))
        results[name] = {**found.to_dict(), "all": sorted([*found.texts, *found.held_out]), "first": found.texts[0]}
    except TmergeError as error:
        results[name] = f"{type(error).__name__}: {error}"
def record(*references):
    notes = []
    kept = DatasetRecord(Path(RECORD), notes.append)
    found = kept.identify(references)
    kept.save()
    return found, notes

results["identities"] = record("user/plain", "user/plain@v1")
name = pinned("user/plain@main", results["identities"][0]["user/plain"])
results["pinned"] = read_texts(CalibrationSettings(dataset=name), seed=0).revision
# As if it had been at another commit when the run began.
Path(RECORD).write_text(json.dumps({"user/plain": results["identities"][0]["user/plain@v1"]}))
results["moved"] = record("user/plain")
# STOP
results["out of reach"] = record("user/plain")
try:
    dataset_identity("user/plain")
except TmergeError as error:
    results["unknown"] = f"{type(error).__name__}: {error}"
try:
    read_texts(CalibrationSettings(dataset="user/plain"), seed=0)
except TmergeError as error:
    results["gone"] = f"{type(error).__name__}: {error}"
print(json.dumps(results))
"""

CASES: dict[str, dict[str, Any]] = {
    "plain": {"dataset": "user/plain", "texts": 60},
    "again": {"dataset": "user/plain@main", "texts": 60},
    "test split": {"dataset": "user/plain", "split": "test", "column": "text"},
    "old": {"dataset": "user/plain@v1"},
    "parquet": {"dataset": "user/parquet", "config": "id"},
    "bad split": {"dataset": "user/plain", "split": "validation"},
    "bad column": {"dataset": "user/plain", "column": "txet"},
    "bad config": {"dataset": "user/parquet", "config": "fr"},
    "no config": {"dataset": "user/parquet"},
    "further, bad split": {"dataset": "user/plain", "split": "validation"},
    "further, no config": {"dataset": "user/parquet"},
    "bad revision": {"dataset": "user/plain@nowhere"},
    "nobody": {"dataset": "user/nothing"},
    "not an id": {"dataset": "what is this?"},
    "gated": {"dataset": "user/gated"},
    "broken": {"dataset": "user/broken"},
    "script": {"dataset": "user/script"},
    "no data": {"dataset": "user/empty"},
    "damaged": {"dataset": "user/damaged"},
}


def jsonl(path: Path, word: str, count: int) -> None:
    path.write_text("\n".join(json.dumps({"text": f"{word} {n} here", "id": n}) for n in range(count)))


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    root = tmp_path_factory.mktemp("hub")
    folders = {name: root / name for name in ("plain", "parquet", "script", "empty", "damaged")}
    for folder in folders.values():
        folder.mkdir()
    repos = {f"user/{name}": Repo() for name in (*folders, "gated", "broken")}
    jsonl(folders["plain"] / "train.jsonl", "old", 80)
    repos["user/plain"].commit(folders["plain"], "v1")
    jsonl(folders["plain"] / "train.jsonl", "train", 400)
    jsonl(folders["plain"] / "test.jsonl", "test", 90)
    head = repos["user/plain"].commit(folders["plain"])
    repos["user/gated"].commit(folders["plain"])
    repos["user/gated"].access = "gated"
    repos["user/broken"].commit(folders["plain"])
    repos["user/broken"].access = "broken"
    texts = [f"kalimat {n}" for n in range(100)]
    table = pyarrow.table({"text": texts, "image": [{"bytes": b"no image", "path": None}] * 100})
    for config in ("id", "ms"):
        pyarrow.parquet.write_table(table, folders["parquet"] / f"{config}.parquet")
    (folders["parquet"] / "README.md").write_text(
        "---\nconfigs:\n- config_name: id\n  data_files: id.parquet\n- config_name: ms\n  data_files: ms.parquet\n"
        "dataset_info:\n"
        + "".join(
            f"- config_name: {config}\n  features:\n"
            "  - name: text\n    dtype: string\n  - name: image\n    dtype: image\n"
            for config in ("id", "ms")
        )
        + "---\n"
    )
    repos["user/parquet"].commit(folders["parquet"])
    # If it were run, this test would fail by the file it writes.
    (folders["script"] / "script.py").write_text(f"open({str(root / 'ran')!r}, 'w').write('x')\n")
    repos["user/script"].commit(folders["script"])
    (folders["empty"] / "README.md").write_text("nothing\n")
    repos["user/empty"].commit(folders["empty"])
    (folders["damaged"] / "train.jsonl").write_text('{"text": "a"}\n{"text": \n')
    repos["user/damaged"].commit(folders["damaged"])
    with DatasetHub(repos) as hub:
        ran = run_client(
            hub,
            root / "home",
            f"CASES, RECORD = {json.dumps(json.dumps(CASES))}, {str(root / 'data.json')!r}\n"
            f"{SCRIPT.replace('# STOP', STOP_THE_HUB)}",
        )
        endpoint = hub.endpoint
    assert ran.returncode == 0, ran.stderr
    assert not (root / "ran").exists()
    return {"head": head, "endpoint": endpoint, "stderr": ran.stderr, **json.loads(ran.stdout.splitlines()[-1])}


def test_a_dataset_is_streamed_at_a_commit(answers: dict[str, Any]) -> None:
    found = answers["plain"]
    assert found["dataset"] == "user/plain" and found["revision"] == answers["head"]
    assert (found["split"], found["config"], found["column"], found["read"]) == ("train", None, "text", 60)
    assert len(found["all"]) == 60 and all(text.startswith("train ") for text in found["all"])
    # Drawn from all over the split, and the same again.
    numbers = [int(text.split()[1]) for text in found["all"]]
    assert max(numbers) > 300 and min(numbers) < 100
    assert answers["again"] == found


def test_a_dataset_is_known_by_its_commit(answers: dict[str, Any]) -> None:
    found, notes = answers["identities"]
    assert found == {"user/plain": answers["head"], "user/plain@v1": answers["old"]["revision"]} and notes == []
    assert answers["pinned"] == answers["head"]
    found, (note,) = answers["moved"]
    assert found == {"user/plain": answers["head"]}
    assert "'user/plain' changed since" in note and answers["head"][:12] in note and "done anew" in note
    # Without a network a run goes on with what it has read, and says so; one that has read nothing cannot.
    found, (note,) = answers["out of reach"]
    assert found == {"user/plain": answers["head"]} and "cannot be reached" in note and "is kept" in note
    assert answers["unknown"].startswith("DatasetError: dataset 'user/plain': the Hub")


def test_split_revision_and_configuration_are_those_asked_for(answers: dict[str, Any]) -> None:
    assert answers["test split"]["all"] == sorted(f"test {n} here" for n in range(90))
    assert answers["old"]["all"] == sorted(f"old {n} here" for n in range(80))
    assert answers["old"]["revision"] not in (answers["head"], "v1")
    # The images beside the texts are no images, and are not opened.
    assert answers["parquet"]["all"] == sorted(f"kalimat {n}" for n in range(100))
    assert answers["parquet"]["config"] == "id"


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("bad split", "dataset 'user/plain' has no split 'validation'; set calibration.split to one of train, test"),
        ("bad column", "dataset 'user/plain': no column 'txet'; did you mean 'text'? (columns: text, id)"),
        ("bad config", "dataset 'user/parquet' has no configuration 'fr'; set calibration.config to one of id, ms"),
        ("no config", "dataset 'user/parquet' has several configurations; set calibration.config to one of id, ms"),
        # Where no key chooses among them, none is named.
        (
            "further, bad split",
            "dataset 'user/plain' has no split 'validation', which alone is read here, but train, test; save what is",
        ),
        (
            "further, no config",
            "dataset 'user/parquet' has several configurations (id, ms), and none can be chosen here; save what is",
        ),
        ("bad revision", "dataset 'user/plain' has no revision 'nowhere'; see {endpoint}/datasets/user/plain/commits"),
        ("nobody", "dataset 'user/nothing': no such file here, and no such dataset on the Hub; check the spelling"),
        ("not an id", "dataset 'what is this?' is neither a file here nor a Hub id (user/name)"),
        ("gated", "dataset 'user/gated' is gated: request access at {endpoint}/datasets/user/gated, then run"),
        ("broken", "dataset 'user/broken': the Hub answered 503; try again later"),
        ("script", "dataset 'user/script' can only be read by a script of its own, which is never run"),
        ("no data", "dataset 'user/empty' cannot be read"),
        ("damaged", "dataset 'user/damaged' cannot be read"),
        ("gone", "dataset 'user/plain': the Hub ({endpoint}) cannot be reached; check the network and HF_HUB_OFFLINE"),
    ],
)
def test_every_failure_is_one_line_with_a_remedy(case: str, message: str, answers: dict[str, Any]) -> None:
    assert isinstance(answers[case], str), answers[case]
    assert answers[case].startswith("DatasetError: " + message.format(endpoint=answers["endpoint"]))
    assert "\n" not in answers[case]
