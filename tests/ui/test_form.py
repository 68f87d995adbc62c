"""The form's fields say what the recipe's own schema says, and follow what is chosen. No browser."""

import pytest

pytest.importorskip("gradio", reason="the app's extra is not installed")

from tmerge.errors import RecipeError
from tmerge.recipe import Shared
from tmerge.ui.parts.fields import SETTINGS
from tmerge.ui.parts.form import form_values, from_preset, read_yaml, recipe_of, with_value, write_yaml

PAIR = {"target": "a/b", "source": "c/d"}
OF = {setting.key: setting for setting in SETTINGS}


def shown(data):
    return {setting.key: value for setting, value in form_values(data).items()}


def learned(**more):
    return with_value({**PAIR, "source_base": "e/f", **more}, "fusion.what", "task-vector")


@pytest.mark.parametrize(
    ("key", "kind", "choices"),
    [
        ("fusion.what", "choice", ("weights", "task-vector", "reconstruct")),
        ("fusion.scale", "choice", ("barycentric", "literal", "row-norm")),
        ("fusion.projections", "several", ("q", "k", "v", "o", "gate", "up", "down")),
        ("transport.structure", "choice", ("none", "shared")),
        ("transport.matching", "choice", ("one-to-one", "entropic")),
        ("transport.signed", "switch", ()),
        ("transport.epsilon", "number", ()),
        ("transport.tolerance", "value", ()),
        ("fusion.alpha", "value", ()),
        ("fusion.alphas", "value", ()),
        ("calibration.texts", "whole", ()),
        ("calibration.match_on", "words", ()),
        ("evaluation.controls", "several", ("shrink", "noise", "permuted", "source_base", "texts")),
        ("device", "choice", ("auto", "cpu", "cuda", "mps")),
        ("seed", "whole", ()),
        ("save.max_shard_size", "value", ()),
    ],
)
def test_a_field_is_what_the_schema_says(key, kind, choices):
    assert (OF[key].kind, OF[key].choices) == (kind, choices)


def test_every_field_has_help_and_numbers_name_their_bounds():
    assert all(setting.description for setting in SETTINGS)
    assert OF["calibration.texts"].description.endswith("in [16, 10000000]")
    assert {setting.key for setting in SETTINGS if setting.decides} == {
        "fusion.what",
        "transport.structure",
        "save.form",
    }


def test_what_is_not_of_the_choice_is_shown_empty():
    of_weights, of_learned = shown(PAIR), shown(learned())
    assert of_weights["transport.eta"] == 0.1 and of_weights["transport.matching"] is None
    assert of_learned["transport.eta"] is None and of_learned["transport.matching"] == "one-to-one"
    assert (of_weights["fusion.stream"], of_learned["fusion.stream"]) == (False, True)
    assert of_learned["calibration.rows"] == "tokens" and of_learned["fusion.top_k"] == "1"


def test_a_choice_takes_along_what_it_has_and_leaves_the_rest():
    data = learned(transport={"eta": 0.3, "epsilon": 0.2}, fusion={"top_k": 128, "units": "layer"})
    assert data["transport"] == {"epsilon": 0.2} and data["fusion"] == {"units": "layer", "what": "task-vector"}
    recipe = recipe_of(data)
    assert isinstance(recipe.transport, Shared) and recipe.fusion.carries_stream and recipe.fusion.top_k == 1.0
    back = with_value(with_value(data, "fusion.stream", False), "fusion.what", "weights")
    assert "stream" not in back["fusion"]
    demo = from_preset("demo")
    assert with_value(demo, "transport.structure", "shared")["fusion"] == demo["fusion"]


def test_what_is_set_without_its_choice_is_refused_and_can_be_taken_back():
    wrong = with_value(PAIR, "transport.signed", True)
    with pytest.raises(RecipeError, match="needs transport.structure: shared"):
        recipe_of(wrong)
    assert write_yaml(with_value(wrong, "transport.signed", False)) == write_yaml(PAIR)


def test_several_sources_are_read_from_the_yaml_and_stay_in_it():
    text = """
target: a/b
source_base: e/f
sources:
  - source: c/d
  - {adapter: g/h, weight: 0.5}
fusion: {join: ties}
"""
    data = read_yaml(text)
    recipe = recipe_of(data)
    assert [source.reference for source in recipe.sources] == ["c/d", "g/h"] and recipe.fusion.join == "ties"
    assert recipe_of(read_yaml(write_yaml(data))) == recipe
    # A field that is set beside them leaves them.
    changed = recipe_of(read_yaml(write_yaml(with_value(data, "fusion.density", 0.2))))
    assert changed.sources == recipe.sources and changed.fusion.density == 0.2
