"""The commands that score and train: what they print, and one line for every mistake with nothing left behind."""

import json
import re

import pytest

from tests.test_cli import pair, run, small  # noqa: F401 (fixtures)
from tmerge.errors import RecipeError
from tmerge.store import LOCK_FILES, locked

pytest.importorskip("trl")
TRAIN = ["--set", "adaptation.batch_size=2", "--set", "adaptation.max_tokens=32"]


def test_adapt_and_evaluate(run, pair, tmp_path):  # noqa: F811
    fused, out = tmp_path / "fused", tmp_path / "fused-adapted"
    assert run("merge", *small(pair, fused), "--set", "fusion.alpha=0.1")[0] == 0
    code, printed, progress = run("adapt", fused, "--steps", 3, "--lr", 1e-3, *TRAIN, "--json")
    assert code == 0, progress
    report = json.loads(printed)
    assert "[adapt]" in progress and len(report["adaptation"]["loss_curve"]) == 3
    # The same numbers from the saved models, by another road: all texts of another language.
    code, printed, _ = run(
        "evaluate", pair / "target", fused, out, "--dataset", "samples:malay", "--texts", 12, "--json"
    )
    assert code == 0
    models = json.loads(printed)["models"]
    assert [model["model"] for model in models] == [str(pair / "target"), str(fused), str(out)]
    base, merged, trained = (model["bits_per_byte"] for model in models)
    assert "difference" not in base and trained["difference"]["value"] == pytest.approx(
        trained["value"] - base["value"]
    )
    assert merged["value"] != base["value"]
    code, printed, _ = run("evaluate", pair / "target", out, "--dataset", "samples:malay", "--texts", 12)
    assert code == 0 and f"{trained['value']:.4f}" in printed


def test_compare(run, pair, tmp_path):  # noqa: F811
    words = [
        *(word for word in small(pair, tmp_path / "c")),
        *("--set", "compare.rows=[sft]", "--set", "compare.alphas=[0.5]", "--set", "adaptation.steps=2"),
        *("--set", "evaluation.descent=4", *TRAIN),
    ]
    code, printed, progress = run("compare", *words)
    assert code == 0, progress
    assert re.search(r"sft\s.*\d\.\d{4}", printed) and "descent" in printed
    assert {path.name for path in (tmp_path / "c").iterdir()} >= {"compare.json", "compare.md", "compare.html", "merge"}


@pytest.mark.parametrize(
    ("words", "what", "base"),
    [(("--what", "reconstruct"), "reconstruct", None), (("--source-base", "SOURCE"), "task-vector", "SOURCE")],
    ids=["what", "source-base"],
)
def test_what_is_fused_is_said_as_to_merge(run, pair, tmp_path, words, what, base, monkeypatch):  # noqa: F811
    asked = []

    def stop(recipe, out, *, listener, processes):
        asked.append(recipe)
        raise RecipeError("enough")

    monkeypatch.setattr("tmerge.comparison.compare.compare", stop)
    source = str(pair / "source")
    models = ("--target", pair / "target", "--source", source, "--out", tmp_path / "c")
    assert run("compare", *models, *(word.replace("SOURCE", source) for word in words))[0] == 2
    (recipe,) = asked
    assert recipe.fusion.what == what and recipe.source_base == (base and source)


def test_a_comparison_that_another_process_works_at_is_refused_and_stays(run, pair, tmp_path):  # noqa: F811
    folder = tmp_path / "c"
    folder.mkdir()
    with locked(folder, folder):
        code, printed, err = run("compare", *small(pair, folder))
        assert (code, printed) == (2, "")
        busy = rf"error: another tmerge \(process .*\) is at work in {folder}; wait until"
        assert re.match(busy, err.splitlines()[-1])
        assert {path.name for path in folder.iterdir()} == LOCK_FILES
    # What fails with nothing done leaves nothing, the lock neither.
    code, _, err = run("compare", *small(pair, folder), "--set", "compare.domains={Malay: nowhere.txt}")
    assert code == 2 and "nowhere.txt" in err and not folder.exists()


@pytest.mark.slow
def test_inspect_shows_a_comparison_or_says_what_is_wrong_with_it(run, pair, tmp_path):  # noqa: F811
    words = ("--set", "compare.rows=[]", "--set", "compare.alphas=[]", "--set", "evaluation.descent=4")
    folder, page = tmp_path / "c", tmp_path / "page.html"
    assert run("compare", *small(pair, folder), *words)[0] == 0
    written = json.loads((folder / "compare.json").read_text())
    code, printed, _ = run("inspect", folder, "--json", "--html", page)
    assert code == 0 and json.loads(printed) == written
    assert page.read_text() == (folder / "compare.html").read_text()
    code, printed, _ = run("inspect", folder)
    assert code == 0 and f"{written['rows'][0]['value']:.4f}" in printed and "permuted" in printed
    del written["rows"][1]["value"]
    (folder / "compare.json").write_text(json.dumps(written))
    code, printed, err = run("inspect", folder)
    assert (code, printed) == (2, "") and err.count("\n") == 1
    assert "compare.json is not a comparison that this tmerge can read: rows[1].value is missing" in err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["evaluate", "TARGET"], "--dataset"),
        (["evaluate", "TARGET", "--tasks", "xcopa_id", "--data", "xcopa_id"], "task=FILE"),
        (["evaluate", "TARGET", "--tasks", "xcopa_id", "--data", "xcopa_id=none.jsonl"], "none.jsonl"),
        (["evaluate", "no/such/model", "--dataset", "samples:english"], "no/such/model"),
        (["adapt", "nowhere"], "nowhere"),
        (["adapt", "TARGET"], "not a run"),
        (["adapt", "nowhere", "--set", "fusion.alpha=1"], "adaptation"),
        (["compare", "--target", "TARGET", "--source", "TARGET", "--set", "compare.rows=[dpo]"], "compare.rows"),
        (["compare", "nowhere.yaml"], "no such file"),
    ],
)
def test_mistakes_are_one_line(run, pair, tmp_path, monkeypatch, words, said):  # noqa: F811
    monkeypatch.chdir(tmp_path)
    words = [str(pair / "target") if word == "TARGET" else word for word in words]
    code, printed, err = run(*words)
    errors = [line for line in err.splitlines() if line.startswith("error: ")]
    assert (code, printed, len(errors)) == (2, "", 1), err
    assert said in errors[0] and "Traceback" not in err
    assert list(tmp_path.iterdir()) == []
