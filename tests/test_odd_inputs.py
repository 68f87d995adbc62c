"""What was found by trying to break it: each gives a right result, or one line and exit code 2, and leaves nothing."""

from __future__ import annotations

import json
import os
import shutil

import pyarrow as pa
import pyarrow.parquet
import pytest

from tests.pico import save_pico
from tests.stages.test_merge import digest, pair, recipe_for  # noqa: F401
from tests.test_cli import run, small  # noqa: F401
from tmerge.errors import TmergeError
from tmerge.models.checkpoint import file_digest
from tmerge.recipe import Recipe, parse_setting
from tmerge.stages.merge import merge
from tmerge.transport import TransportRecord


@pytest.fixture(scope="module")
def finished(pair, tmp_path_factory):  # noqa: F811
    folder = tmp_path_factory.mktemp("finished") / "fused"
    merge(recipe_for(pair), folder)
    return folder


@pytest.fixture
def run_folder(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "fused")


def _line(said):
    errors = [line for line in said.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and said.rstrip().endswith(errors[0]) and "Traceback" not in said, said
    return errors[0]


@pytest.mark.parametrize(
    "spoil",
    [
        lambda folder: (folder / "model.safetensors").unlink(),
        lambda folder: (folder / "config.json").unlink(),
        lambda folder: (folder / "model.safetensors").write_bytes(b""),
        lambda folder: (folder / "model.safetensors").write_bytes(
            (folder / "model.safetensors").read_bytes()[:-1] + b"x"
        ),
    ],
    ids=["gone", "no config", "empty", "one byte"],
)
def test_a_finished_run_whose_checkpoint_was_spoilt_writes_it_again(pair, finished, run_folder, spoil):  # noqa: F811
    spoil(run_folder)
    steps = []
    merge(recipe_for(pair), run_folder, listener=steps.append)
    assert digest(run_folder) == digest(finished) and (run_folder / "config.json").is_file()
    assert {step.stage for step in steps} == {"save"}


@pytest.mark.parametrize("stage", ["texts", "target", "transport", "fuse", "evaluate", "save"])
@pytest.mark.parametrize("facts", [None, {}, [], {"seconds": 1, "peak_rss_bytes": 1, "device": "cpu", "scores": 3}])
def test_a_damaged_note_is_none(pair, finished, run_folder, stage, facts):  # noqa: F811
    path = run_folder / "tmerge" / "cache" / f"{stage}.json"
    note = json.loads(path.read_text())
    path.write_text(json.dumps({"key": note["key"]} | ({} if facts is None else {"facts": facts})))
    merge(recipe_for(pair), run_folder)
    assert digest(run_folder) == digest(finished)


def test_a_run_that_fails_behind_a_link_leaves_what_was_there(run, pair, tmp_path):  # noqa: F811
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    code, _, said = run("merge", *small(pair, tmp_path / "link"), "--dataset", tmp_path / "none.txt")
    assert code == 2 and "no such file" in _line(said)
    assert (tmp_path / "link").is_symlink() and not list((tmp_path / "real").iterdir())
    code, _, said = run("merge", *small(pair, tmp_path / "p" / "q" / "r"), "--dataset", tmp_path / "none.txt")
    assert code == 2 and not (tmp_path / "p").exists()


def test_recorded_plans_whose_entries_lie_beyond_them_are_damaged(pair, run_folder, run, tmp_path):  # noqa: F811
    path = run_folder / "tmerge" / "transport.safetensors"
    record = TransportRecord.load(path)
    key = record.keys[0]
    record.tensors[f"plan.{key}.columns"][3] = -218
    record.save(path)
    for words in (
        ["inspect", run_folder, "--html", tmp_path / "x.html"],
        ["merge", "--plan", run_folder, "--out", tmp_path / "again"],
    ):
        code, _, said = run(*words)
        assert code == 2 and f"the recorded plans of {key} are damaged" in _line(said)
    assert not (tmp_path / "x.html").exists()


def test_what_is_no_regular_file_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "model.safetensors")
    with pytest.raises(TmergeError, match="is no regular file"):
        file_digest(tmp_path / "model.safetensors")


@pytest.mark.parametrize("side", ["target", "source"])
@pytest.mark.parametrize("said", [{"output_attentions": True}, {"return_dict": False}, {"output_hidden_states": True}])
def test_settings_of_how_a_model_answers_change_nothing(pair, finished, tmp_path, side, said):  # noqa: F811
    models = shutil.copytree(pair, tmp_path / "models")
    path = models / side / "config.json"
    before = json.loads(path.read_text())
    path.write_text(json.dumps(before | said))
    merge(recipe_for(models), tmp_path / "fused")
    assert digest(tmp_path / "fused")["model.safetensors"] == digest(finished)["model.safetensors"]
    # What the target says is kept.
    written = json.loads((tmp_path / "fused" / "config.json").read_text())
    assert side == "source" or {key: written[key] for key in said} == said


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        ("config.json", {"max_position_embeddings": 1}, "max_position_embeddings 1, and it is a count from 8"),
        ("model.safetensors.index.json", None, "is not an index of shards beside it"),
    ],
)
def test_models_that_were_not_refused_before(run, pair, tmp_path, name, change, words):  # noqa: F811
    folder = save_pico("llama", tmp_path / "model", max_shard_size="60KB")
    path = folder / name
    path.write_text(json.dumps(json.loads(path.read_text()) | (change or {"metadata": []})))
    for side in ("target", "source"):
        chosen = {"target": pair / "target", "source": pair / "source"} | {side: folder}
        words_of = ["--target", chosen["target"], "--source", chosen["source"], "--out", tmp_path / "fused"]
        code, _, said = run("merge", *words_of)
        assert code == 2 and words in _line(said) and not (tmp_path / "fused").exists()


def _rows(path, rows):
    path.write_text("\n".join(rows))
    return path


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda p: _rows(p / "a.jsonl", ['{"text": "a", "n": ' + "1" * 5000 + "}"]), "a number of too many digits"),
        (lambda p: _rows(p / "a.jsonl", ['{"\\ud800": "a text"}'] * 40), "the name of a column is no text"),
        (lambda p: _rows(p / "a.txt", ["x" * (1 << 26) + "yz"]), "line 1 is longer than 67,108,864 letters"),
    ],
)
def test_data_that_no_one_writes(run, pair, tmp_path, make, words):  # noqa: F811
    code, _, said = run("merge", *small(pair, tmp_path / "fused"), "--dataset", make(tmp_path))
    assert code == 2 and words in _line(said) and not (tmp_path / "fused").exists()


def test_dates_beyond_what_there_are(run, pair, tmp_path):  # noqa: F811
    table = pa.table({"text": ["a"] * 40, "d": pa.array([2**31 - 1] * 40, pa.date32())})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    code, _, said = run("merge", *small(pair, tmp_path / "fused"), "--dataset", tmp_path / "a.parquet")
    assert code == 2 and "a value cannot be read" in _line(said)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--set", "evaluation.bootstrap=100000000"], "evaluation.bootstrap"),
        (["--set", "calibration.texts=99999999999999999999"], "calibration.texts"),
        (["--set", "adaptation.batch_size=99999999999"], "adaptation.batch_size"),
        (["--set", "adaptation.lora_rank=99999999999"], "adaptation.lora_rank"),
        (["--set", "calibration.texts=&a [*a]"], "a value in it cannot be read"),
        (["--out", "by\udcff"], "is no name in UTF-8"),
        (["--dataset", "by\udcff.txt"], "is not UTF-8; write it so"),
        (["--target", "by\udcff"], "is not UTF-8; write it so"),
        (["--html", ""], "is a folder; name a file after --html"),
    ],
)
def test_words_that_no_one_types(run, pair, tmp_path, monkeypatch, words, said):  # noqa: F811
    monkeypatch.chdir(tmp_path)
    code, _, err = run("merge", *small(pair, "fused"), *words)
    assert code == 2 and said in _line(err) and not list(tmp_path.iterdir())


def test_a_line_break_in_a_name_is_none_in_the_line(run, pair, tmp_path):  # noqa: F811
    (tmp_path / "a\nb").mkdir()
    (tmp_path / "a\nb" / "x").touch()
    code, _, said = run("merge", *small(pair, tmp_path / "a\nb"))
    assert code == 2 and "is not a run of tmerge" in _line(said)


def test_a_page_without_a_name(run, run_folder):  # noqa: F811
    code, _, said = run("inspect", run_folder, "--html", "")
    assert code == 2 and "--html names no file" in _line(said)


def test_a_setting_that_holds_itself():
    with pytest.raises(TmergeError):
        Recipe.from_mapping(dict([parse_setting("calibration=&a {b: *a}")]))
