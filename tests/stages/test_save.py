"""The last stage: its files put into place, over what was there before, by a user whom files' modes bind."""

from __future__ import annotations

import json
import shutil
import stat

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.pico import save_pico
from tests.stages.test_merge import digest, pair, recipe_for  # noqa: F401
from tests.unprivileged import modes_count
from tmerge.errors import OutputExistsError, ReadOnlyError
from tmerge.hub.published import published_files
from tmerge.run import Run
from tmerge.stages import save
from tmerge.stages.merge import merge
from tmerge.store import read_json


@pytest.fixture(scope="module")
def templates(tmp_path_factory):
    """A pair whose target has several chat templates."""
    folder = tmp_path_factory.mktemp("models")
    target = save_pico("llama", folder / "target", layers=2, chat=True)
    (target / "additional_chat_templates").mkdir()
    (target / "additional_chat_templates" / "tool_use.jinja").write_text("tools: {{ messages[0]['content'] }}")
    save_pico("qwen2", folder / "source", layers=2, seed=1, hidden_size=48, intermediate_size=80)
    return folder


@pytest.fixture
def bound():
    with modes_count():
        yield


def test_several_chat_templates_are_written_and_can_be_read(templates, tmp_path, bound):
    merge(recipe_for(templates), tmp_path / "fused")
    assert set(AutoTokenizer.from_pretrained(tmp_path / "fused").chat_template) == {"default", "tool_use"}
    written = tmp_path / "fused" / "additional_chat_templates"
    assert stat.S_IMODE(written.stat().st_mode) & 0o700 == 0o700
    assert stat.S_IMODE((written / "tool_use.jinja").stat().st_mode) == 0o644


def test_from_which_release_on_it_is_read_is_said(pair, tmp_path):  # noqa: F811
    save_pico("apertus", tmp_path / "models" / "target", layers=2)
    shutil.copytree(pair / "source", tmp_path / "models" / "source")
    report = merge(recipe_for(tmp_path / "models"), tmp_path / "fused")
    said = "reads with transformers 5.0 or later"
    assert any(note.startswith(said) for note in report.notes)
    assert said in (tmp_path / "fused" / "README.md").read_text()
    assert not any(said in note for note in merge(recipe_for(pair), tmp_path / "other").notes)


def test_the_targets_licence_files_go_with_it(pair, tmp_path):  # noqa: F811
    shutil.copytree(pair, tmp_path / "models")
    target, out = tmp_path / "models" / "target", tmp_path / "fused"
    texts = {"LICENSE.txt": "the terms", "Notice": "who made it", "USE_POLICY.md": "not for this", "LICENSE-MODEL": "x"}
    for name, text in texts.items():
        (target / name).write_text(text)
    for name in ("license.py", "licensing.md", "notes.txt"):
        (target / name).write_text("is none")
    report = merge(recipe_for(tmp_path / "models"), out)
    assert {name: (out / name).read_text() for name in texts} == texts
    assert not any((out / name).exists() for name in ("license.py", "licensing.md", "notes.txt"))
    said = "the target's licence files lie beside the weights: LICENSE-MODEL, LICENSE.txt, Notice, USE_POLICY.md"
    assert said in report.notes and said.partition(": ")[0] in (out / "README.md").read_text()
    assert texts.keys() < published_files(Run(out)).keys()
    # One that is gone is written again; of a target without any nothing is said.
    (out / "Notice").unlink()
    merge(recipe_for(tmp_path / "models"), out)
    assert (out / "Notice").read_text() == texts["Notice"]
    assert not any("licence files" in note for note in merge(recipe_for(pair), tmp_path / "other").notes)


class Killed(BaseException):
    pass


@pytest.mark.parametrize("after", range(0, 8, 2))
def test_killed_while_its_files_are_moved_it_continues_to_the_same(templates, tmp_path, bound, monkeypatch, after):
    merge(recipe_for(templates), tmp_path / "whole")
    moved, move = [], save.os.replace

    def replace(path, into):
        if into.parent in (tmp_path / "fused", tmp_path / "fused" / "additional_chat_templates"):
            if len(moved) == after:
                raise Killed
            moved.append(into)
        move(path, into)

    with monkeypatch.context() as patched, pytest.raises(Killed):
        patched.setattr(save.os, "replace", replace)
        merge(recipe_for(templates), tmp_path / "fused")
    assert len(moved) == after and not (tmp_path / "fused" / "config.json").exists()
    merge(recipe_for(templates), tmp_path / "fused")
    assert digest(tmp_path / "fused") == digest(tmp_path / "whole")
    names = [{path.name for path in (tmp_path / run).iterdir()} for run in ("fused", "whole")]
    assert names[0] == names[1] and not list((tmp_path / "fused").rglob("*.part"))


def test_how_it_is_saved_may_change_and_nothing_else_begins_anew(pair, tmp_path):  # noqa: F811
    out = tmp_path / "fused"
    merge(recipe_for(pair), out)
    before = {path.name: path.stat().st_mtime_ns for path in (out / "tmerge" / "cache").glob("*.json")}
    whole = AutoModelForCausalLM.from_pretrained(out).state_dict()
    again = recipe_for(pair, save={"max_shard_size": "60KB", "language": ["en"]})
    steps = []
    merge(again, out, listener=steps.append)
    assert {step.stage for step in steps} == {"save"}
    after = {path.name: path.stat().st_mtime_ns for path in (out / "tmerge" / "cache").glob("*.json")}
    assert {name for name in before if before[name] != after[name]} == {"save.json", "request.json"}
    # The one file of before is gone: it would be read, and the shards beside it not.
    assert not (out / "model.safetensors").exists() and len(list(out.glob("model-*.safetensors"))) > 2
    shards = AutoModelForCausalLM.from_pretrained(out).state_dict()
    assert all(whole[name].equal(shards[name]) for name in whole)
    assert "- en" in (out / "README.md").read_text()
    with pytest.raises(OutputExistsError, match=r"another recipe \(seed: 0 there, 1 here\)"):
        merge(recipe_for(pair, seed=1), out)
    merge(recipe_for(pair), out)
    assert (out / "model.safetensors").exists() and not list(out.glob("model-*"))
    assert not (out / "model.safetensors.index.json").exists()
    assert read_json(out / "tmerge" / "cache" / "request.json")["save"]["language"] == []


def test_a_finished_run_that_cannot_be_written_any_more_shows_its_report(pair, tmp_path):  # noqa: F811
    out = tmp_path / "fused"
    report = merge(recipe_for(pair), out)
    shutil.copytree(out, tmp_path / "half")
    (tmp_path / "half" / "tmerge" / "report.json").unlink()
    for path in [*out.rglob("*"), *(tmp_path / "half").rglob("*")]:
        path.chmod(0o555 if path.is_dir() else 0o444)
    out.chmod(0o555)
    try:
        with modes_count():
            steps = []
            assert merge(recipe_for(pair), out, listener=steps.append).to_dict() == report.to_dict() and not steps
            with pytest.raises(ReadOnlyError, match=r"half cannot be written \(Permission denied\); choose another"):
                merge(recipe_for(pair), tmp_path / "half")
            with pytest.raises(OutputExistsError, match="another recipe"):
                merge(recipe_for(pair, seed=1), out)
    finally:
        for path in [out, *out.rglob("*"), *(tmp_path / "half").rglob("*")]:
            path.chmod(0o755)
    assert json.loads((out / "tmerge" / "report.json").read_text())["verdict"] == report.verdict
