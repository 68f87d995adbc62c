"""The recipe: strict, frozen, and one line for every mistake."""

import hashlib
import json
from pathlib import Path

import pytest
from huggingface_hub.serialization._base import parse_size_to_int

from tests.recipe.refusing import assert_refused
from tmerge.errors import RecipeError
from tmerge.recipe import (
    Apart,
    Recipe,
    Shared,
    TaskVector,
    Weights,
    load_recipe,
    load_yaml,
    preset_names,
    recipe_page,
)
from tmerge.recipe.schema import sections_of

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


def test_a_recipe_that_names_no_bases_is_known_by_what_it_was_known_by_before():
    recipe = Recipe(target="a/b", source="c/d")
    data = recipe.model_dump(mode="json", exclude={"memory", "bases"})
    assert recipe.digest() == hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()
    assert Recipe(target="a/b", source="c/d", bases={"a/b": "e/f"}).digest() != recipe.digest()


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
        ({**PAIR, "fusion": {"alphas": [0.1, 1.5]}}, ["fusion.alphas", "1.5", "fusion.what: weights"]),
        ({**PAIR, "fusion": {"what": "wieghts"}}, ["fusion.what is 'wieghts'", "weights or task-vector"]),
        ({**PAIR, "fusion": {"what": None}}, ["fusion.what is null", "weights or task-vector"]),
        ({**PAIR, "fusion": {"strem": True}}, ["'fusion.strem'", "did you mean 'stream'", "fusion.what: task-vector"]),
        ({**PAIR, "fusion": {"top_k": 0}}, ["fusion.top_k is 0", "1 or more", "(0, 1]"]),
        ({**PAIR, "fusion": {"projections": ["q", "z"]}}, ["fusion.projections", "'z'"]),
        ({**PAIR, "fusion": {"projections": ["q", "q"]}}, ["fusion.projections", "each once"]),
        ({**PAIR, "fusion": {"what": "task-vector"}}, ["source_base"]),
        ({**PAIR, "source_base": "c"}, ["task-vector"]),
        ({**PAIR, "calibration": {"texts": 3}}, ["calibration.texts", "16"]),
    ],
)
def test_mistakes_are_one_line_that_names_the_key(data, words):
    assert_refused(data, words)


@pytest.mark.parametrize(
    "data",
    [
        {"seed": True},
        {"target": False},
        {"fusion": {"alpha": True}},
        {"fusion": {"alphas": [0.1, True]}},
        {"fusion": {"top_k": True}},
        {"calibration": {"texts": True}},
        {"compare": {"task_limit": True}},
        {"compare": {"domains": {"Malay": True}}},
        {"save": {"max_shard_size": True}},
        {"published": {"table": "", "metric": "", "scores": {"PIQA": [True, 1, 2]}}},
    ],
)
def test_a_boolean_is_no_number_and_no_word(data):
    with pytest.raises(RecipeError, match="true|false") as caught:
        Recipe.from_mapping(PAIR | data)
    assert "YAML" in str(caught.value) and "\n" not in str(caught.value)


def _number_fields():
    for section in sections_of(Recipe).values():
        for choice, kind in section.kinds.items():
            for key, facts in kind.keys.items():
                if type(facts.get("default")) in (int, float):
                    yield section.name, {} if section.chooser is None else {section.chooser: choice}, key


def test_all_sections_and_kinds_have_their_numbers_tried():
    tried = {(section, *choice.values()) for section, choice, _ in _number_fields()}
    assert tried >= {("calibration",), ("transport", "none"), ("transport", "shared"), ("fusion", "task-vector")}


@pytest.mark.parametrize(("section", "choice", "key"), _number_fields())
@pytest.mark.parametrize("value", [True, float("nan"), float("inf")])
def test_every_number_of_every_section_is_a_finite_number(section, choice, key, value):
    with pytest.raises(RecipeError, match=f"{section}.{key}") as refused:
        Recipe.from_mapping({**PAIR, section: {**choice, key: value}})
    assert "\n" not in str(refused.value)


def test_where_true_and_false_are_meant_they_stay():
    assert Recipe.from_mapping({**PAIR, "fusion": {"biases": False}}).fusion.biases is False


def test_numbers_as_yaml_1_2_writes_them(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text("target: a\nsource: b\nadaptation: {learning_rate: 1e-6}\ntransport: {tolerance: '1e-5'}\n")
    recipe = load_recipe(str(path), {}, ["calibration.texts=2e3", "fusion.alphas=[1e-1, 2.5e-1]"])
    assert recipe.adaptation.learning_rate == 1e-6 and recipe.transport.tolerance == 1e-5
    assert recipe.calibration.texts == 2000 and recipe.fusion.alphas == (0.1, 0.25)
    assert load_yaml("[e5, 1e5x, 1.2.3e4, a1e5]", "") == ["e5", "1e5x", "1.2.3e4", "a1e5"]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("target: a\nsource: b\ntarget: c\n", ["line 3", "'target' is given twice", "line 1"]),
        ("target: a\nfusion:\n  alpha: 1\n  'alpha': 2\n", ["line 4", "'alpha' is given twice", "line 3"]),
        ("target: a\nfusion: {alpha: 1, top_k: 2, alpha: 1}\n", ["line 2", "'alpha' is given twice"]),
        ("target: a\nsource: 2024-13-45\n", ["cannot be read"]),
        ("[" * 5000, ["cannot be read"]),
    ],
)
def test_what_yaml_would_lose_in_silence_is_refused(tmp_path, text, words):
    path = tmp_path / "r.yaml"
    path.write_text(text)
    with pytest.raises(RecipeError) as caught:
        load_recipe(str(path))
    assert all(word in str(caught.value) for word in words) and "\n" not in str(caught.value)
    with pytest.raises(RecipeError):
        load_recipe("demo", {}, ["fusion={alpha: 1, alpha: 2}"])


@pytest.mark.parametrize("size", ["5GB", "500MB", "1.5 gb", "10kb", 5_000_000])
def test_sizes_are_those_that_the_library_reads(size):
    read = Recipe.from_mapping({**PAIR, "save": {"max_shard_size": size}}).save.max_shard_size
    assert read == size
    assert not isinstance(size, str) or parse_size_to_int(size) > 0


@pytest.mark.parametrize("size", ["banana", "", "5", "GB", "-5GB", "0GB", "0.0001KB", "5GiB", "nanGB", "infGB", 0, -1])
def test_a_size_that_is_none_is_refused_when_the_recipe_is_read(size):
    with pytest.raises(RecipeError, match=r"save\.max_shard_size") as caught:
        Recipe.from_mapping({**PAIR, "save": {"max_shard_size": size}})
    assert "\n" not in str(caught.value)


def test_an_unknown_key_says_where_all_keys_are():
    for key in ("fusion.alhpa", "zzz"):
        with pytest.raises(RecipeError, match="All keys: tmerge recipe"):
            load_recipe("demo", {}, [f"{key}=1"])


def test_the_page_of_all_keys_is_as_the_schema_says():
    written = (Path(__file__).parents[2] / "docs/recipe.md").read_text(encoding="utf-8")
    assert written == recipe_page(), "docs/recipe.md is out of date: tmerge recipe > docs/recipe.md"
    for name, field in Recipe.model_fields.items():
        assert f"## {name}\n" in written or f"| `{name}` |" in written
        for key in getattr(type(field.default), "model_fields", {}):
            assert f"| `{key}` |" in written
    for kind in (Weights, TaskVector, Apart, Shared):
        for key in kind.model_fields:
            assert f"| `{key}` |" in written


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


@pytest.mark.parametrize("name", ["\x85", "a\u2028b", "x\r\ny", "a\nb", " a ", "é日本", "'", '"', "null", "1e3"])
def test_any_name_is_read_back_as_it_was_written(name):
    recipe = Recipe.from_mapping({"target": "a", "source": name})
    assert Recipe.from_mapping(load_yaml(recipe.to_yaml(), "recipe")) == recipe
