"""tmerge compare on pico models: every row, taken up after an interruption, and what it writes."""

import json

import pytest

from tests.evaluation.test_tasks import XCOPA
from tests.pico import save_pico
from tests.stages.test_merge import recipe_for
from tmerge.comparison.compare import compare
from tmerge.comparison.result import read_comparison
from tmerge.comparison.tables import comparison_table
from tmerge.errors import Cancelled, RecipeError
from tmerge.recipe import Recipe


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    save_pico("llama", folder / "target", layers=3)
    save_pico("qwen2", folder / "source", layers=2, seed=1, hidden_size=48, intermediate_size=80)
    save_pico("gpt2", folder / "other", layers=2, seed=2)
    return folder


def asked(pair, **comparison):
    comparison = {"rows": [], "alphas": [0.1, 1.0], **comparison}
    return recipe_for(pair, compare=comparison, evaluation={"descent": 6})


def rows_of(result):
    return {row.name: row for row in result.rows}


def test_rows_without_training(pair, tmp_path):
    recipe = asked(pair, domains={"Malay": "samples:malay"}, sources=[str(pair / "other")])
    told = []
    result = compare(recipe, tmp_path / "c", listener=lambda step: told.append(step) if step.unit == "rows" else None)
    rows = rows_of(result)
    assert [(step.done, step.total) for step in told[1::2]] == [(done + 1, len(rows)) for done in range(len(rows))]
    assert list(rows)[:6] == ["base", "fused", "shrink", "noise", "permuted", "source"]
    assert {"fused, alpha 0.1", "shrink, alpha 1", "noise, alpha 0.1", f"fused with {pair / 'other'}"} <= set(rows)
    # The merge's own report is an independent path to the same numbers.
    report = json.loads((tmp_path / "c" / "merge" / "tmerge" / "report.json").read_text())
    evaluation = report["evaluation"]
    for name in ("base", "fused", "source"):
        assert rows[name].score.to_dict() == evaluation[name]
    assert rows["fused"].difference.to_dict() == evaluation["difference"]
    for name, control in evaluation["controls"].items():
        assert rows[name].difference.to_dict() == control["difference"]
    assert "difference" not in rows["base"].to_dict() and set(rows["fused"].domains) == {"Malay"}
    assert rows["fused"].domains["Malay"].value != rows["fused"].value
    assert result.descent.texts == 6
    written = tmp_path / "c"
    assert json.loads((written / "compare.json").read_text()) == json.loads(json.dumps(result.to_dict()))
    assert read_comparison(written / "compare.json") == result
    assert comparison_table(result) == (written / "compare.md").read_text()
    page = (written / "compare.html").read_text()
    assert "Fusion strength" in page and "<script src" not in page and "<link" not in page


@pytest.mark.slow
def test_a_stopped_comparison_continues_and_gives_the_same(pair, tmp_path):
    recipe = asked(pair)

    def stop(step):
        if step.what == "permuted: held-out texts" and step.stage == "compare":
            raise Cancelled("stopped")

    with pytest.raises(Cancelled):
        compare(recipe, tmp_path / "a", listener=stop)
    kept = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "a" / "rows").iterdir()}
    assert len(kept) == 4
    first = compare(recipe, tmp_path / "a")
    assert all((tmp_path / "a" / "rows" / name).stat().st_mtime_ns == when for name, when in kept.items())
    second = compare(recipe, tmp_path / "b")
    assert without_seconds(first) == without_seconds(second)
    # A comparison that asks for more keeps what it has.
    more = compare(asked(pair, alphas=[0.1, 0.5, 1.0]), tmp_path / "a")
    assert rows_of(more)["shrink"] == rows_of(first)["shrink"]


def without_seconds(result):
    return [{name: value for name, value in row.items() if name != "seconds"} for row in result.to_dict()["rows"]]


@pytest.mark.parametrize("bad", [{"rows": ["sft", "sft"]}, {"alphas": [-1]}, {"seeds": []}, {"rows": ["dpo"]}])
def test_bad_settings_are_one_line(pair, bad):
    with pytest.raises(RecipeError) as caught:
        asked(pair, **bad)
    assert "compare" in str(caught.value) and "\n" not in str(caught.value)


def test_merge_reads_nothing_of_the_comparison(pair):
    assert asked(pair).digest("fusion") == recipe_for(pair).digest("fusion")
    assert Recipe.from_mapping(asked(pair).model_dump(mode="json")) == asked(pair)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # the harness's own
def test_tasks_of_every_row(pair, tmp_path):
    pytest.importorskip("lm_eval")
    names = ("premise", "choice1", "choice2", "question", "label")
    rows = [dict(zip(names, row, strict=True)) for row in XCOPA]
    path = tmp_path / "xcopa.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    published = {"table": "Table 9", "metric": "accuracy", "scores": {"XCOPA": [1, 2, 3]}}
    recipe = asked(pair, alphas=[], tasks=["xcopa_id"], task_data={"xcopa_id": str(path)})
    recipe = Recipe.from_mapping(recipe.model_dump(mode="json") | {"published": published})
    result = compare(recipe, tmp_path / "c")
    for row in result.rows:
        task = row.tasks["xcopa_id"]
        assert task.questions == 4 and task.metric == "acc" and 0 <= task.value <= 1
        assert ("difference" in task.to_dict()) == (row.name != "base")
        assert ("difference" in task.margin.to_dict()) == (row.name != "base")
    table = (tmp_path / "c" / "compare.md").read_text()
    assert "xcopa_id: acc on 4 questions" in table and "xcopa_id: margin of the right answer" in table
    assert "| XCOPA | 1 | 2 | 3 |" in table
    assert "Benchmarks" in (tmp_path / "c" / "compare.html").read_text()
