"""The recipe: strict, frozen, and one line for every mistake."""

import pytest

from tmerge.errors import RecipeError
from tmerge.recipe import Recipe, load_recipe, preset_names

PAIR = {"target": "a/target", "source": "b/source"}


def test_yaml_round_trip_writes_every_default():
    recipe = Recipe.from_mapping({**PAIR, "fusion": {"alpha": 0.25, "top_k": 0.5}})
    again = Recipe.from_mapping(__import__("yaml").safe_load(recipe.to_yaml()))
    assert again == recipe
    assert "epsilon: 0.1" in recipe.to_yaml()
    assert again.fusion.top_k == 0.5 and isinstance(again.fusion.top_k, float)


def test_top_k_keeps_counts_and_fractions_apart():
    assert isinstance(Recipe.from_mapping({**PAIR, "fusion": {"top_k": 1}}).fusion.top_k, int)
    assert isinstance(Recipe.from_mapping({**PAIR, "fusion": {"top_k": 1.0}}).fusion.top_k, float)


def test_digest_follows_its_sections_alone():
    one = Recipe.from_mapping(PAIR)
    other = Recipe.from_mapping({**PAIR, "fusion": {"alpha": 0.2}})
    assert one.digest("transport") == other.digest("transport")
    assert one.digest("fusion") != other.digest("fusion")
    assert one.digest() != other.digest()


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ({"source": "b"}, ["'target' is missing", "--target"]),
        ({**PAIR, "fusion": {"alpah": 1}}, ["'fusion.alpah'", "did you mean 'alpha'"]),
        ({**PAIR, "transprot": {}}, ["'transprot'", "'transport'"]),
        ({**PAIR, "fusion": {"alpha": 1.5}}, ["fusion.alpha", "1.5", "[0, 1]"]),
        ({**PAIR, "fusion": {"alpha": -0.5}}, ["fusion.alpha", "-0.5"]),
        ({**PAIR, "fusion": {"projections": ["q", "z"]}}, ["fusion.projections", "'z'"]),
        ({**PAIR, "fusion": {"projections": ["q", "q"]}}, ["fusion.projections", "each once"]),
        ({**PAIR, "fusion": {"what": "task-vector"}}, ["source_base"]),
        ({**PAIR, "source_base": "c"}, ["task-vector"]),
        ({**PAIR, "calibration": {"texts": 3}}, ["calibration.texts", "16"]),
    ],
)
def test_mistakes_are_one_line_that_names_the_key(data, words):
    with pytest.raises(RecipeError) as caught:
        Recipe.from_mapping(data)
    text = str(caught.value)
    assert "\n" not in text
    for word in words:
        assert word in text


def test_misspelt_key_is_named_before_what_it_left_missing():
    with pytest.raises(RecipeError, match="did you mean 'target'"):
        Recipe.from_mapping({"traget": "a", "source": "b"})


def test_task_vector_may_overshoot():
    data = {**PAIR, "source_base": "c", "fusion": {"what": "task-vector", "alpha": 1.5}}
    assert Recipe.from_mapping(data).fusion.alpha == 1.5


def test_overrides_and_settings_lie_over_the_file(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text("target: a\nsource: b\nfusion: {alpha: 0.3}\n")
    recipe = load_recipe(str(path), {"source": "c", "dtype": None}, ["fusion.top_k=0.25", "seed=7"])
    assert (recipe.source, recipe.fusion.alpha, recipe.fusion.top_k, recipe.seed) == ("c", 0.3, 0.25, 7)


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("missing.yaml", None, "no such file"),
        ("bad.yaml", "target: [", "line"),
        ("list.yaml", "- a\n", "mapping"),
    ],
)
def test_unreadable_files(tmp_path, name, text, words):
    path = tmp_path / name
    if text is not None:
        path.write_text(text)
    with pytest.raises(RecipeError, match=words):
        load_recipe(str(path))


def test_unknown_preset_names_the_nearest():
    assert "demo" in preset_names()
    with pytest.raises(RecipeError, match="did you mean 'demo'"):
        load_recipe("dmeo")


@pytest.mark.parametrize("word", ["alpha", "=1", "fusion.alpha.x=1"])
def test_bad_settings(word):
    with pytest.raises(RecipeError):
        load_recipe("demo", {}, ["fusion.alpha=0.1", word])


def test_recipe_is_frozen():
    with pytest.raises(ValueError, match="frozen"):
        Recipe.from_mapping(PAIR).seed = 3
