"""Sections of two kinds: each with keys and defaults of its own, and with what it brings in other sections.

What is brought is for whatever a recipe leaves unsaid, and for nothing else.
"""

from __future__ import annotations

import pytest
import yaml

from tests.recipe.refusing import assert_refused
from tmerge.recipe import Apart, Recipe, Shared, TaskVector, Weights, load_recipe

PAIR = {"target": "a/target", "source": "b/source"}
TASK = {**PAIR, "source_base": "b/base", "fusion": {"what": "task-vector"}}
# What a task vector's sections hold where a recipe says nothing else.
TASK_VECTOR_DEFAULTS = {
    "calibration": {"rows": "tokens", "match_on": "samples:english"},
    "transport": {"structure": "shared"},
    "fusion": {
        "alphas": [0.3, 0.5, 1.0, 1.5],
        "top_k": 1.0,
        "projections": ["q", "k", "v", "o", "gate", "up", "down"],
    },
}


def task(**sections):
    return Recipe.from_mapping({**TASK, **sections, "fusion": {"what": "task-vector", **sections.get("fusion", {})}})


def test_what_a_task_vector_does_not_say():
    recipe = task()
    for name, values in TASK_VECTOR_DEFAULTS.items():
        data = recipe.model_dump(mode="json")[name]
        assert {key: data[key] for key in values} == values
    assert recipe.fusion.stream and recipe.transport.structure == "shared" and recipe.calibration.rows == "tokens"
    # Of everything else, the sections' own.
    assert recipe.transport == Shared()
    own = Weights().model_dump()
    changed = {*TASK_VECTOR_DEFAULTS["fusion"], "what", "stream", "rank", "join", "density"}
    assert {key: value for key, value in recipe.fusion.model_dump().items() if key not in changed} == {
        key: value for key, value in own.items() if key not in changed
    }


def test_what_weights_do_not_say_is_the_papers():
    recipe = Recipe.from_mapping(PAIR)
    assert recipe.fusion == Weights() and recipe.transport == Apart()
    assert recipe.calibration.rows == "texts" and not recipe.fusion.carries_stream


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [
        ("calibration", "rows", "texts"),
        ("transport", "structure", "none"),
        ("transport", "matching", "entropic"),
        ("fusion", "alpha", 0.3),
        ("fusion", "alpha", "auto"),
        ("fusion", "alphas", [2.0]),
        ("fusion", "top_k", 128),
        ("fusion", "projections", ["v"]),
        ("fusion", "stream", False),
    ],
)
def test_what_a_recipe_says_is_kept(section, key, value):
    data = task(**{section: {key: value}}).model_dump(mode="json")
    assert data[section][key] == value
    # And beside it the defaults, but that the stream goes with a shared structure alone.
    for name, values in TASK_VECTOR_DEFAULTS.items():
        for other, default in values.items():
            if (name, other) != (section, key):
                assert data[name][other] == default
    assert data["fusion"]["stream"] == ((section, key) not in {("transport", "structure"), ("fusion", "stream")})


@pytest.mark.parametrize(
    "sections",
    [
        {},
        {"fusion": {"alpha": 0.5, "stream": False}},
        {"transport": {"structure": "none", "epsilon": 0.05}, "calibration": {"rows": "texts"}},
        {"transport": {"map": "ridge", "signed": True}, "fusion": {"top_k": 0.25, "projections": ["q", "k"]}},
    ],
)
def test_a_resolved_recipe_says_everything(sections):
    recipe = task(**sections)
    again = Recipe.from_mapping(yaml.safe_load(recipe.to_yaml()))
    assert again == recipe and again.digest() == recipe.digest() and again.to_yaml() == recipe.to_yaml()
    assert Recipe.from_mapping(recipe.model_dump()) == recipe
    assert Recipe(**dict(recipe)) == recipe  # sections as they are, not as mappings


def test_words_of_the_command_line_are_said_too():
    recipe = load_recipe(None, TASK, ["fusion.alpha=0.25", "transport.structure=none"])
    assert recipe.fusion.alpha == 0.25 and recipe.fusion.top_k == 1.0
    assert not recipe.fusion.stream


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ({**PAIR, "fusion": {"stream": True}}, ["fusion.stream", "task-vector", "structure: shared"]),
        ({**PAIR, "fusion": {"stream": True}, "transport": {"structure": "shared"}}, ["fusion.stream"]),
        ({**TASK, "fusion": {"what": "task-vector", "stream": True}, "transport": {"structure": "none"}}, ["shared"]),
        ({**PAIR, "plan": "runs/one", "transport": {"map": "procrustes"}}, ["transport.map is procrustes", "plan"]),
        ({**TASK, "plan": "runs/one", "transport": {"map": "ridge"}}, ["transport.map is ridge", "drop plan"]),
        ({**PAIR, "transport": {"structure": "shraed"}}, ["transport.structure", "'shraed'", "none or shared"]),
        (
            {**PAIR, "transport": {"structure": "shared", "eta": 0.2}},
            ["transport.eta is 0.2", "transport.structure: none", "drop transport.eta"],
        ),
        ({**PAIR, "transport": {"matching": "entropic"}}, ["transport.matching is 'entropic'", "structure: shared"]),
        ({**TASK, "transport": {"layer_kept": 2}}, ["did you mean 'layers_kept'", "transport.structure: none"]),
        ({**TASK, "transport": {"map": "ridge"}, "fusion": {"what": "task-vector", "stream": True}}, ["map: plan"]),
        ({**PAIR, "transport": {"ridge": 0}}, ["transport.ridge", "0"]),
        ({**PAIR, "calibration": {"rows": "token"}}, ["calibration.rows", "'token'"]),
        ({**PAIR, "calibration": {"token_rows": 3}}, ["calibration.token_rows", "64"]),
        ({**TASK, "transport": {"strukture": "shared"}}, ["transport.strukture", "'structure'"]),
        ({**TASK, "fusion": ["what"]}, ["fusion"]),
        (
            {**TASK, "fusion": {"what": "task-vector", "scale": "row-norm"}},
            ["fusion.scale is 'row-norm'", "barycentric", "fusion.what: task-vector"],
        ),
        ({**PAIR, "fusion": {"affine": True, "biases": False}}, ["fusion.affine", "fusion.biases"]),
        ({**PAIR, "fusion": {"alphas": []}}, ["fusion.alphas"]),
        ({**PAIR, "transport": {"signed": True}}, ["transport.signed", "structure: shared"]),
        ({**PAIR, "transport": {"map": "ridge"}, "fusion": {"units": "layer"}}, ["map is ridge", "units: none"]),
        ({**PAIR, "transport": {"map": "procrustes"}, "fusion": {"scale": "literal"}}, ["scale: barycentric"]),
        ({**TASK, "calibration": "tokens"}, ["calibration"]),
    ],
)
def test_mistakes_are_one_line(data, words):
    assert_refused(data, words)


def test_a_recipe_has_the_keys_of_what_it_chose_and_no_others():
    written = yaml.safe_load(Recipe.from_mapping(PAIR).to_yaml())
    assert "stream" not in written["fusion"] and {"signed", "matching"}.isdisjoint(written["transport"])
    written = yaml.safe_load(task().to_yaml())
    assert "stream" in written["fusion"] and {"eta", "layers_kept", "layer_cost"}.isdisjoint(written["transport"])


def test_a_section_that_is_an_object_says_everything_itself():
    words = {"target": "a", "source": "b", "source_base": "c", "transport": Shared(signed=True)}
    recipe = Recipe(**words, fusion=TaskVector(stream=False))
    assert recipe.transport.signed and not recipe.fusion.carries_stream and recipe.calibration.rows == "tokens"
    assert Recipe(**words, fusion=TaskVector()).fusion.carries_stream


def test_the_defaults_are_not_changed_by_a_recipe():
    before = yaml.safe_dump(TaskVector.beside)
    task(fusion={"alpha": 0.1, "projections": ["q"]}, transport={"structure": "none"}, calibration={"rows": "last"})
    assert yaml.safe_dump(TaskVector.beside) == before
    assert task().fusion.top_k == TASK_VECTOR_DEFAULTS["fusion"]["top_k"] == 1.0
