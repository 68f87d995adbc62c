"""JSON that every parser takes."""

import json
import math

import pytest

from tmerge.cli.shared import print_json
from tmerge.documents import json_text
from tmerge.store import write_json

DOCUMENT = {"verdict": "helps", "ratios": [1.5, math.nan], "scores": {"base": math.inf, "fused": (-math.inf, 2.0)}}
STRICT = {
    "verdict": "helps",
    "ratios": [1.5, None],
    "scores": {"base": None, "fused": [None, 2.0]},
    "undefined": {"ratios[1]": "nan", "scores.base": "inf", "scores.fused[0]": "-inf"},
}


def strictly(text):
    def refuse(word):
        raise AssertionError(word)

    return json.loads(text, parse_constant=refuse)


def test_what_is_undefined_is_null_and_said_to_be(tmp_path, capsys):
    assert strictly(json_text(DOCUMENT)) == STRICT
    write_json(tmp_path / "report.json", DOCUMENT)
    assert strictly((tmp_path / "report.json").read_text()) == STRICT
    print_json(DOCUMENT)
    assert strictly(capsys.readouterr().out) == STRICT


def test_a_defined_document_is_as_it_was():
    document = {"a": [1, 0.1, True, None, "NaN"], "b": {}}
    assert json_text(document, indent=1) == json.dumps(document, indent=1)


def test_other_faults_are_no_null():
    with pytest.raises(TypeError):
        json_text({"a": object()})
