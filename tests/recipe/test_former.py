"""Recipes that earlier versions resolved name every key of every kind; they are read, or say what to write instead."""

from pathlib import Path

import pytest
import yaml

from tmerge.errors import RecipeError
from tmerge.recipe import Apart, Recipe, Shared, TaskVector, Weights, load_recipe
from tmerge.recipe.strict_yaml import shown_value

# As `to_yaml` wrote them when both kinds of a section were one class.
RESOLVED = Path(__file__).parent / "resolved"
PAIR = {"target": "a/target@1111", "source": "b/source@2222"}
BASE = {**PAIR, "source_base": "b/base@3333"}
TASK = {"what": "task-vector", "alpha": 0.5}
ASKED = {
    "weights": {**PAIR, "fusion": {"alpha": 0.2, "top_k": 8}, "transport": {"entries_kept": 2}},
    "weights-shared": {
        **PAIR,
        "fusion": {"alpha": 0.2, "affine": True},
        "transport": {"structure": "shared", "matching": "entropic", "signed": True},
    },
    "task-vector": {**BASE, "fusion": TASK},
    "task-vector-apart": {**BASE, "fusion": TASK, "transport": {"structure": "none", "eta": 0.2}},
}

CAME_LATER = {"join": "sum", "density": 0.5}


def resolved(name):
    return yaml.safe_load((RESOLVED / f"{name}.yaml").read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", ASKED)
def test_a_resolved_recipe_of_before_is_what_it_was_asked_for(name):
    recipe = load_recipe(str(RESOLVED / f"{name}.yaml"))
    assert recipe == Recipe.from_mapping(ASKED[name])
    kinds = TaskVector if "task" in name else Weights, Apart if name in ("weights", "task-vector-apart") else Shared
    assert (type(recipe.fusion), type(recipe.transport)) == kinds
    # And all that it said of what it chose is kept.
    for section, values in resolved(name).items():
        now = recipe.model_dump(mode="json")[section]
        if isinstance(values, dict):
            # What has been added since it could not say, and has its default.
            assert {key: values.get(key, now[key]) for key in now} == now
        else:
            assert values == now


def test_they_are_of_before():
    """Or they would show nothing."""
    assert "stream" in resolved("weights")["fusion"] and "signed" in resolved("weights")["transport"]
    assert "eta" in resolved("task-vector")["transport"]


@pytest.mark.parametrize(
    ("name", "section", "key", "value", "needs"),
    [
        ("weights", "fusion", "stream", True, "fusion.what: task-vector"),
        ("weights", "transport", "matching", "entropic", "transport.structure: shared"),
        ("weights", "transport", "signed", True, "transport.structure: shared"),
        ("weights-shared", "transport", "eta", 0.03, "transport.structure: none"),
        ("task-vector", "transport", "layers_kept", 1, "transport.structure: none"),
        ("task-vector", "transport", "layer_cost", "plain", "transport.structure: none"),
    ],
)
def test_what_was_set_for_a_choice_that_was_not_made_says_what_to_write(name, section, key, value, needs):
    data = resolved(name)
    data[section][key] = value
    with pytest.raises(RecipeError) as refused:
        Recipe.from_mapping(data)
    text = str(refused.value)
    assert f"{section}.{key} is {shown_value(value)}" in text and needs in text and f"drop {section}.{key}" in text
    assert "\n" not in text


def test_a_preset_of_weights_is_turned_into_a_task_vector_from_the_command_line():
    """Its layer plans' settings are the paper's own, which a shared structure has none of."""
    recipe = load_recipe("malay", {"source_base": "c/base", "fusion.what": "task-vector"})
    assert isinstance(recipe.transport, Shared) and recipe.fusion.alpha == 0.1
