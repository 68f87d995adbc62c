"""A run's folder: recognised by keys, refused when it is something else, never half-written."""

import json

import pytest

from tmerge.errors import OutputExistsError, RunNotFoundError
from tmerge.recipe import Recipe
from tmerge.run import Run, stage_key
from tmerge.store import write_json

RECIPE = Recipe(target="a", source="b")


def test_new_folder_then_taken_up_again(tmp_path):
    run = Run.open(tmp_path / "fused", RECIPE)
    assert run.cache.is_dir()
    Run.open(tmp_path / "fused", RECIPE)


def test_another_recipe_is_refused_and_named(tmp_path):
    Run.open(tmp_path / "fused", RECIPE)
    other = Recipe.from_mapping({"target": "a", "source": "b", "fusion": {"alpha": 0.4}})
    with pytest.raises(OutputExistsError, match=r"fusion\.alpha: auto there, 0\.4 here"):
        Run.open(tmp_path / "fused", other)


def test_a_foreign_folder_or_file_is_refused(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("x")
    (tmp_path / "file").write_text("x")
    for name in ("mine", "file"):
        with pytest.raises(OutputExistsError, match="not a run of tmerge"):
            Run.open(tmp_path / name, RECIPE)
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "x"


def test_a_stage_counts_only_under_its_key(tmp_path):
    run = Run.open(tmp_path / "fused", RECIPE)
    key = stage_key("texts", a=1)
    assert run.finished("texts", key) is None
    run.finish("texts", key, {"n": 3})
    assert run.finished("texts", key) == {"n": 3}
    assert run.finished("texts", stage_key("texts", a=2)) is None
    (run.cache / "texts.json").write_text("{ torn")
    assert run.finished("texts", key) is None


def test_abandon_removes_only_what_never_began(tmp_path):
    run = Run.open(tmp_path / "new", RECIPE)
    run.abandon()
    assert not (tmp_path / "new").exists()
    run = Run.open(tmp_path / "begun", RECIPE)
    run.finish("texts", "key", {})
    run.abandon()
    assert run.finished("texts", "key") == {}


def test_report_of_no_run_and_of_an_unfinished_one(tmp_path):
    with pytest.raises(RunNotFoundError, match="not a run of tmerge"):
        Run(tmp_path).report()
    run = Run.open(tmp_path / "fused", RECIPE)
    with pytest.raises(RunNotFoundError, match="not finished"):
        run.report()


def test_json_is_renamed_into_place(tmp_path):
    path = tmp_path / "a.json"
    write_json(path, {"x": "é"})
    assert json.loads(path.read_text()) == {"x": "é"}
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.json"]
