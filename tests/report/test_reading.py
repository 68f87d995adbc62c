"""A report.json that somebody else wrote is a report, or there is one line that says what is wrong with it."""

import json
import math
import sys

import pytest

from tests.plotted import interval, report  # noqa: F401 - one is a fixture
from tests.reported import adaptation, typed
from tmerge.cli import main
from tmerge.documents import json_text
from tmerge.errors import ReportError, RunNotFoundError
from tmerge.recipe import AdaptationSettings
from tmerge.report import Report, read_report
from tmerge.report.report import Adaptation
from tmerge.run import Run


def at(document, *path):
    for part in path:
        document = document[part]
    return document


def drop(*path):
    return lambda document: at(document, *path[:-1]).pop(path[-1])


def put(value, *path):
    def change(document):
        at(document, *path[:-1])[path[-1]] = value

    return change


AMISS = [
    (put("much", "evaluation", "fused", "value"), "evaluation.fused.value should be a number, and is 'much'"),
    (drop("evaluation", "fused"), "evaluation.fused is missing"),
    (put([1.0], "evaluation", "base", "ci95"), "evaluation.base.ci95[1] is missing"),
    (put(None, "evaluation", "base", "value"), "evaluation.base.value is null"),
    (put(math.nan, "evaluation", "base", "value"), "is no strict JSON, evaluation.base.value is nan"),
    (put(math.inf, "stages", 1, "seconds"), "is no strict JSON, stages[1].seconds is inf"),
    (put("8", "target", "layers"), "target.layers should be a whole number, and is '8'"),
    (put(True, "seed"), "seed should be a whole number, and is True"),
    (
        put("wins", "verdict"),
        "verdict should be 'helps', 'better, but not by the source', 'no difference' or 'hurts', ",
    ),
    (put([], "evaluation", "controls"), "evaluation.controls should be an object, and is a list"),
    (put({}, "fusion", "projections"), "fusion.projections "),
    (put([0.1], "fusion", "projections", "q", "norm_ratio"), "in fusion.projections.q, norm_ratio has to have one"),
    (put("auto", "fusion", "alpha"), "in fusion, alpha is auto, so there has to be a choice"),
    (put({"q": []}, "fusion", "alpha"), "fusion.alpha "),
    (put(adaptation(), "adaptation"), "adaptation and evaluation.adapted have to be there both"),
    (put(2, "schema"), "is of schema 2, and this tmerge reads schema 1; update tmerge"),
    (put(0, "schema"), "is of schema 0, and this tmerge reads schema 1"),
    (put("1", "schema"), "schema should be 1, and is '1'"),
    (drop("schema"), "is not a report of tmerge (it has no schema number)"),
    (put("x\n\x1b[31my" * 99, "evaluation", "fused", "value"), "evaluation.fused.value should be a number"),
    (put(10**400, "evaluation", "fused", "value"), "evaluation.fused.value "),
]


@pytest.mark.parametrize(("change", "said"), AMISS, ids=[said[:50] for _, said in AMISS])
def test_what_is_amiss_is_said_in_one_line(report, tmp_path, change, said):  # noqa: F811
    change(report)
    path = tmp_path / "report.json"
    path.write_text(json.dumps(report))
    with pytest.raises(ReportError) as caught:
        read_report(path)
    line = str(caught.value)
    assert said in line and str(path) in line and line.isprintable() and len(line) < 400 + len(str(path))


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"schema"', "[" * 100_000, "\ufeff{}", "{}"])
def test_a_file_that_holds_no_report(tmp_path, text):
    path = tmp_path / "report.json"
    path.write_text(text)
    with pytest.raises(ReportError) as caught:
        read_report(path)
    assert "\n" not in str(caught.value) and str(path) in str(caught.value)


def test_a_file_that_is_no_text(tmp_path):
    path = tmp_path / "report.json"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ReportError, match="is damaged"):
        read_report(path)


def test_what_is_read_is_what_was_written(report):  # noqa: F811
    assert typed(report).to_dict() == report
    assert list(typed(report).to_dict()["evaluation"]) == list(report["evaluation"])


def test_what_a_later_tmerge_adds_is_kept(report):  # noqa: F811
    report["mood"] = {"good": True}
    report["evaluation"]["fused"]["median"] = 3.0
    assert typed(report).to_dict() == report


def test_an_undefined_number_comes_back_as_it_was(report, tmp_path):  # noqa: F811
    report["evaluation"]["controls"]["noise"] |= interval(math.nan, math.inf)
    path = tmp_path / "report.json"
    text = json_text(Report.model_validate(report).to_dict())
    path.write_text(text)
    assert json.loads(text)["undefined"] == {
        "evaluation.controls.noise.value": "nan",
        "evaluation.controls.noise.ci95[0]": "nan",
        "evaluation.controls.noise.ci95[1]": "nan",
    }
    found = read_report(path)
    assert math.isnan(found.evaluation.controls["noise"].value)
    assert json_text(found.to_dict()) == text


def test_a_run_whose_report_is_amiss_is_no_run(report, tmp_path):  # noqa: F811
    (tmp_path / "tmerge").mkdir()
    drop("fusion")(report)
    (tmp_path / "tmerge/report.json").write_text(json.dumps(report))
    with pytest.raises(RunNotFoundError, match="fusion is missing"):
        Run(tmp_path).report()


@pytest.mark.parametrize(
    "words",
    [
        ("inspect", "{run}"),
        ("inspect", "{run}", "--json"),
        ("push", "{run}", "--repo", "user/x", "--dry-run"),
        ("adapt", "{run}", "--out", "{out}"),
        ("reproduce", "{run}", "--out", "{out}"),
        ("merge", "--plan", "{run}", "--out", "{out}"),
    ],
    ids=lambda words: words[0],
)
def test_commands_say_it_and_exit_with_two(report, tmp_path, monkeypatch, capsys, words):  # noqa: F811
    (tmp_path / "run/tmerge").mkdir(parents=True)
    put("wins", "verdict")(report)
    (tmp_path / "run/tmerge/report.json").write_text(json.dumps(report))
    places = {"run": str(tmp_path / "run"), "out": str(tmp_path / "out")}
    monkeypatch.setattr(sys, "argv", ["tmerge", *(word.format(**places) for word in words)])
    with pytest.raises(SystemExit) as ended:
        main()
    printed = capsys.readouterr()
    assert ended.value.code == 2 and printed.out == ""
    assert "verdict should be" in printed.err and "Traceback" not in printed.err
    assert not (tmp_path / "out").exists()


def test_a_training_is_written_as_its_recipe_is():
    names = list(Adaptation.model_fields)
    assert names[: len(AdaptationSettings.model_fields)] == list(AdaptationSettings.model_fields)
