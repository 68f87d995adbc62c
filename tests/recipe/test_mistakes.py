"""What is said of a value of the wrong kind: in YAML's words, never in those of the classes it is read into."""

from __future__ import annotations

import datetime
import re
import subprocess
import sys

import pytest

from tests.recipe.refusing import assert_refused
from tmerge.errors import RecipeError
from tmerge.recipe import Recipe
from tmerge.recipe.schema import sections_of, top_level

PAIR = {"target": "a/target", "source": "b/source"}
PUBLISHED = {"table": "3", "metric": "accuracy"}


@pytest.mark.parametrize(
    ("data", "words"),
    [
        # A list, a mapping, a section, an entry.
        ({"sources": "x"}, ["sources is 'x': write a list of mappings, as - source: REF or - adapter: REF"]),
        ({"sources": {"source": "x"}}, ["sources is {'source': 'x'}: write a list of mappings"]),
        ({"trust_remote_code": "x/y"}, ["trust_remote_code is 'x/y': write a list: [x/y]"]),
        ({"fusion": {"projections": "q, k"}}, ["fusion.projections is 'q, k': write a list: [q, k]"]),
        ({"compare": {"domains": "x"}}, ["compare.domains is 'x': write a mapping of keys to values"]),
        ({"compare": {"domains": {1: "x"}}}, ["compare.domains.1: the key 1 is no text; put it in quotes"]),
        ({"save": "adapter"}, ["save is 'adapter': a section is a mapping of keys to values"]),
        ({"fusion": ["x"]}, ["fusion is ['x']: a section is a mapping of keys to values"]),
        ({"fusion": {5: 1}}, ["unknown key 'fusion.5'"]),
        ({5: 1}, ["unknown key '5'"]),
        # Text, numbers, true and false, choices, either of two.
        ({"target": 5}, ["target is 5: that is no text in YAML; put it in quotes"]),
        ({"target": datetime.date(2020, 1, 1)}, ["target is 2020-01-01: that is no text in YAML"]),
        ({"target": {"a": 1}}, ["target is {'a': 1}: write text"]),
        ({"target": None}, ["target is null: write text"]),
        ({"seed": "x"}, ["seed is 'x': write a whole number"]),
        ({"seed": 1.5}, ["seed is 1.5: write a whole number"]),
        ({"calibration": {"held_out": [0.1]}}, ["calibration.held_out is [0.1]: write a number"]),
        ({"transport": {"epsilon": float("inf")}}, ["transport.epsilon is .inf: write a finite number"]),
        ({"fusion": {"biases": "x"}}, ["fusion.biases is 'x': write true or false"]),
        ({"memory": None}, ["memory is null: write 'auto', 'resident' or 'blocks'"]),
        ({"fusion": {"alpha": [1]}}, ["fusion.alpha is [1]: write a number in [0, 1] or auto"]),
        # Too small, too large, too short, missing, and one of a list.
        ({"seed": -1}, ["seed is -1: write 0 or more"]),
        ({"adaptation": {"batch_size": 5000}}, ["adaptation.batch_size is 5000: write 4096 or less"]),
        ({"calibration": {"held_out": 0}}, ["calibration.held_out is 0: write a number above 0"]),
        ({"calibration": {"held_out": 0.95}}, ["calibration.held_out is 0.95: write a number below 0.9"]),
        ({"fusion": {"alphas": []}}, ["fusion.alphas is []: write a list of 1 or more"]),
        ({"compare": {"alphas": [1, "x"]}}, ["compare.alphas has 'x': write a number"]),
        ({"published": {"table": "3"}}, ["'published.metric' is missing; write it under published"]),
        (
            {"published": {**PUBLISHED, "scores": {"x": [1, 2]}}},
            ["scores.x is [1, 2]", "number 3 is missing"],
        ),
        ({"published": {**PUBLISHED, "scores": {"x": [1, 2, 3, 4]}}}, ["write a list of 3 or fewer"]),
        ({"sources": [{"source": "x", "weight": "y"}], "source_base": "z"}, ["weight of source 1 is 'y': write a num"]),
    ],
)
def test_what_is_due_is_said_in_yamls_words(data, words):
    assert_refused({**PAIR, **data}, words)


_WRONG = ["x", "5", 5, -3, 1.5, float("nan"), True, None, [], ["x"], [[1]], {}, {"a": 1}, 10**400, b"x", {1}]
_OF_PYTHON = re.compile(
    r"\b(tuple|dictionary|dict|instance|integer|float|str|boolean|None|True|False|Input|tag|Settings)\b|input should",
)


def _with_each_key_wrong():
    for name in [*top_level(Recipe), *sections_of(Recipe)]:
        yield name, {}
    for section in sections_of(Recipe).values():
        for choice, kind in section.kinds.items():
            for key in kind.keys:
                yield f"{section.name}.{key}", {section.chooser: choice} if section.chooser not in (None, key) else {}


@pytest.mark.parametrize(("key", "beside"), _with_each_key_wrong())
def test_no_key_is_refused_in_pythons_words(key, beside):
    refused = 0
    for value in _WRONG:
        section, _, inner = key.partition(".")
        try:
            Recipe.from_mapping({**PAIR, section: {**beside, inner: value} if inner else value})
        except RecipeError as error:
            refused, text = refused + 1, str(error)
            assert _OF_PYTHON.search(text) is None and "\n" not in text and len(text) < 400, text
    assert refused


def test_what_leaves_another_key_missing_is_said_first():
    assert_refused({"target": "a", "sources": "x"}, ["sources is 'x': write a list of mappings", "(and 1 more)"])
    assert_refused({"target": "a", "suorce": "x"}, ["unknown key 'suorce'; did you mean 'source'?"])


def test_the_command_says_so_in_one_line(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text("target: a/target\nsource_base: b/base\nsources: x\n")
    done = subprocess.run([sys.executable, "-m", "tmerge", "check", path], capture_output=True, text=True, check=False)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.endswith(
        "r.yaml: sources is 'x': write a list of mappings, as - source: REF or - adapter: REF\n"
    )
    assert done.stderr.count("\n") == 1
