"""The commands that score and train: what they print, and one line for every mistake with nothing left behind."""

import json
import re

import pytest

from tests.test_cli import pair, run, small  # noqa: F401 (fixtures)

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
