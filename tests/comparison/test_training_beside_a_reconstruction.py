"""What a reconstruction is held against in a comparison: SFT on its texts, for the same steps and for the same time."""

from __future__ import annotations

import json
import math

import pytest

from tests.stages.test_reconstruct import models, recipe_for  # noqa: F401 - a fixture
from tmerge.comparison.compare import compare
from tmerge.errors import RecipeError
from tmerge.run import Run
from tmerge.stages.adapt import adapt_run
from tmerge.stages.texts import kept_texts

KEPT = {"keep": "samples:english", "keep_texts": 60}
WORDS = {"steps": 3, "batch_size": 4, "max_tokens": 32, "learning_rate": 1e-3}


@pytest.fixture(scope="module")
def compared(models, tmp_path_factory):  # noqa: F811
    folder = tmp_path_factory.mktemp("compared") / "c"
    recipe = recipe_for(
        models, fusion=KEPT, evaluation={"controls": ["permuted"]}, adaptation=WORDS, compare={"alphas": []}
    )
    return recipe, folder, compare(recipe, folder)


@pytest.mark.slow
def test_sft_alone_gets_the_time_of_the_merge_too(compared):
    _, folder, result = compared
    rows = {row.name: row for row in result.rows}
    assert list(rows) == ["base", "fused", "permuted", "source", "sft", "sft+time", "fused+sft"]
    sft, longer = rows["sft"], rows["sft+time"]
    report = json.loads((folder / "merge/tmerge/report.json").read_text())
    stages = {stage["name"]: stage["seconds"] for stage in report["stages"]}
    # Not the time that the controls were fitted in.
    fitted = report["fusion"]["fit_seconds"]
    assert 0 < fitted < 0.7 * stages["reconstruct"]
    before = sum(stages[name] for name in ("texts", "target", "source", "transport")) + fitted
    assert longer.steps == 3 + math.ceil(before / (sft.seconds / 3)) and sft.steps == rows["fused+sft"].steps == 3
    assert longer.tokens > sft.tokens
    assert [(item.row, item.to) for item in result.added] == [("fused+sft", "sft"), ("fused+sft", "sft+time")]
    for item in result.added:
        assert item.value == pytest.approx(rows["fused+sft"].value - rows[item.to].value, abs=1e-9)
    assert f"fused+sft against sft+time: {result.added[1].value:+.4f}" in (folder / "compare.html").read_text()


@pytest.mark.slow
def test_taken_up_again_it_takes_the_steps_that_it_took(compared):
    recipe, folder, result = compared
    before = {path.name: path.stat().st_mtime_ns for path in (folder / "rows").iterdir()}
    assert compare(recipe, folder).to_dict() == result.to_dict()
    assert {path.name: path.stat().st_mtime_ns for path in (folder / "rows").iterdir()} == before


@pytest.mark.slow
def test_every_row_is_scored_on_texts_that_are_to_be_kept(compared):
    recipe, folder, result = compared
    kept = kept_texts(recipe, Run(folder / "merge"))
    report = Run(folder / "merge").report()
    for row in result.rows:
        assert list(row.domains) == ["kept: samples:english"]
    fused = next(row for row in result.rows if row.name == "fused")
    assert fused.domains["kept: samples:english"].value == pytest.approx(report.evaluation.kept.fused.value)
    assert report.evaluation.kept.texts == min(12, len(kept.held_out))


@pytest.mark.slow
def test_adapting_trains_on_the_texts_to_be_kept_too(compared, tmp_path):
    recipe, folder, _ = compared
    report = adapt_run(folder / "merge", tmp_path / "adapted", WORDS)
    kept = kept_texts(recipe, Run(folder / "merge"))
    data = report.adaptation.data
    assert (data.kept, data.kept_dataset) == (len(kept.texts), "samples:english")
    assert f"(those of {data.kept} texts of samples:english among them)" in (tmp_path / "adapted/README.md").read_text()
    curve = [loss for _, loss in report.adaptation.loss_curve]
    alone = adapt_run(folder / "merge", tmp_path / "alone", WORDS, dataset="samples:indonesian")
    assert alone.adaptation.data.kept == 0 and [loss for _, loss in alone.adaptation.loss_curve] != curve


@pytest.mark.parametrize("rows", [["sft+time"], ["sft+time", "sft"]], ids=str)
def test_the_time_is_that_of_a_row_before(models, rows):  # noqa: F811
    with pytest.raises(RecipeError, match="name sft before it") as caught:
        recipe_for(models, compare={"rows": rows})
    assert "\n" not in str(caught.value)
