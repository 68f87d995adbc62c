"""The key ``adapter``: of one model, which is the source and its base."""

from __future__ import annotations

import pytest

from tests.recipe.refusing import assert_refused
from tmerge.errors import RecipeError
from tmerge.recipe import Recipe, TaskVector, load_recipe

SMALL, BIG, LORA = "a/small", "b/big", "c/lora"


@pytest.mark.parametrize("named", [{"source": BIG}, {"source_base": BIG}, {"source": BIG, "source_base": BIG}])
def test_its_base_is_named_once_or_twice(named):
    expected = Recipe.from_mapping(
        {"target": SMALL, "source": BIG, "source_base": BIG, "adapter": LORA, "fusion": {"what": "task-vector"}}
    )
    recipe = Recipe.from_mapping({"target": SMALL, "adapter": LORA, **named})
    assert recipe == expected and isinstance(recipe.fusion, TaskVector)
    words = {"target": SMALL, "adapter": LORA, "source": None, "source_base": None, **named}
    assert load_recipe(None, words) == expected
    assert Recipe.from_mapping(recipe.model_dump(mode="json")) == recipe


def test_a_reconstruction_with_it_is_held_against_its_base():
    recipe = Recipe.from_mapping({"target": SMALL, "source": BIG, "adapter": LORA, "fusion": {"what": "reconstruct"}})
    assert recipe.source_base == BIG and "source_base" in recipe.evaluation.controls
    without = recipe.model_dump(mode="json") | {"evaluation": {"controls": []}}
    assert Recipe.from_mapping(without).source_base == BIG


@pytest.mark.parametrize("base", ["source", "source_base"])
def test_on_the_command_line_it_takes_the_place_of_a_recipes_source(base, tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(f"target: {SMALL}\nsource: b/tuned\nsource_base: b/untuned\nfusion: {{what: task-vector}}\n")
    recipe = load_recipe(str(path), {base: BIG, "adapter": LORA})
    assert (recipe.source, recipe.source_base, recipe.adapter) == (BIG, BIG, LORA)


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({}, ["'source' is missing"]),
        ({"source": "b/tuned", "source_base": BIG}, ["source is b/tuned and source_base b/big", "drop source"]),
        ({"source": BIG, "fusion": {"what": "weights"}}, ["fusion.what is weights", "its change is carried"]),
        ({"source": BIG, "compare": {"sources": ["b/other"]}}, ["compare.sources", "adapter is of one source"]),
    ],
)
def test_what_does_not_go_with_it(more, words):
    assert_refused({"target": SMALL, "adapter": LORA, **more}, words)


def test_what_an_adapter_that_stands_for_a_model_is_joined_to():
    data = {"target": f"{LORA}@v2", "source": BIG, "bases": {LORA: "d/base", f"{LORA}@v2": "d/base@abc"}}
    recipe = Recipe.from_mapping(data)
    assert recipe.base_of(f"{LORA}@v2") == "d/base@abc" and recipe.base_of(BIG) is None
    assert Recipe.from_mapping({**data, "bases": {LORA: "d/base"}}).base_of(f"{LORA}@v2") == "d/base"
    assert Recipe.from_mapping(recipe.model_dump(mode="json")) == recipe
    assert_refused({**data, "bases": {"c/other": "d/base"}}, ["bases names c/other, which is no model of this recipe"])
    assert_refused({**data, "bases": LORA}, [f"bases is '{LORA}': write a mapping of keys to values"])


def test_what_a_model_is_joined_to_goes_with_it(tmp_path):
    path = tmp_path / "r.yaml"
    recipe = Recipe.from_mapping({"target": LORA, "source": "e/lora@1", "bases": {LORA: "d/1", "e/lora@1": "d/2"}})
    path.write_text(recipe.to_yaml())
    assert load_recipe(str(path), {"source": BIG}).bases == {LORA: "d/1"}
    assert load_recipe(None, {"source": "e/lora@2"}, start=recipe).bases == recipe.bases
    assert load_recipe(None, {"seed": 3}, [f"target={SMALL}"], start=recipe).bases == {"e/lora@1": "d/2"}
    # One that was never a model of it is a slip.
    path.write_text(recipe.to_yaml().replace("e/lora@1: d/2", "e/lroa@1: d/2"))
    with pytest.raises(RecipeError, match="bases names e/lroa@1, which is no model of this recipe"):
        load_recipe(str(path), {"source": BIG})
