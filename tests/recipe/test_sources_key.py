"""The key ``sources``: several relatives of one base, in place of a source."""

from __future__ import annotations

import pytest

from tests.recipe.refusing import assert_refused
from tmerge.cli.shared import pair_words
from tmerge.recipe import JoinedSource, Recipe, TaskVector, load_recipe

SMALL, BIG = "a/small", "b/big"
TWO = [{"source": "b/tuned"}, {"adapter": "c/lora", "weight": 0.5}]


def of(*sources, **more):
    return {"target": SMALL, "source_base": BIG, "sources": list(sources) or TWO, **more}


def test_their_base_stands_for_the_source_and_they_are_carried_as_task_vectors():
    recipe = Recipe.from_mapping(of())
    assert (recipe.source, recipe.source_base, recipe.adapter) == (BIG, BIG, None)
    assert isinstance(recipe.fusion, TaskVector) and (recipe.fusion.join, recipe.fusion.density) == ("sum", 0.5)
    assert recipe.sources == (JoinedSource(source="b/tuned"), JoinedSource(adapter="c/lora", weight=0.5))
    assert Recipe.from_mapping(recipe.model_dump(mode="json")) == recipe
    assert [source.reference for source in recipe.sources] == ["b/tuned", "c/lora"]


def test_what_they_are_changes_what_decides():
    digests = {Recipe.from_mapping(data).digest() for data in (of(), of(TWO[0]), of({**TWO[0], "weight": 2.0}))}
    assert len(digests) == 3


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ({"adapter": ["x/1", "x/2"], "source_base": BIG}, [{"adapter": "x/1"}, {"adapter": "x/2"}]),
        ({"adapter": ["x/1", "x/2"], "source": [BIG]}, [{"adapter": "x/1"}, {"adapter": "x/2"}]),
        ({"source": ["x/1", "x/2"], "source_base": BIG}, [{"source": "x/1"}, {"source": "x/2"}]),
        (
            {"source": ["x/1", "x/2"], "adapter": ["x/3"], "source_base": BIG},
            [{"source": "x/1"}, {"source": "x/2"}, {"adapter": "x/3"}],
        ),
    ],
)
def test_options_given_more_than_once_are_several_sources(words, expected):
    said = {"source": None, "source_base": None, "adapter": None, "what": None, "dataset": None, **words}
    assert load_recipe(None, pair_words(SMALL, **said)) == Recipe.from_mapping(of(*expected))


def test_on_the_command_line_several_take_the_place_of_one_and_one_of_several(tmp_path):
    one, several = tmp_path / "one.yaml", tmp_path / "several.yaml"
    one.write_text(f"target: {SMALL}\nsource: b/tuned\nsource_base: {BIG}\nfusion: {{what: task-vector}}\n")
    joined = load_recipe(str(one), pair_words(None, None, None, ["x/1", "x/2"], None, None))
    assert joined == Recipe.from_mapping(of({"adapter": "x/1"}, {"adapter": "x/2"}))
    several.write_text(joined.to_yaml())
    assert load_recipe(str(several), {"adapter": "x/3"}).sources == ()
    assert load_recipe(str(several), {"adapter": "x/3"}).source == BIG
    assert load_recipe(str(several), {"seed": 3}).sources == joined.sources


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ({"target": SMALL, "sources": TWO}, ["'source_base' is missing", "all sources were made from"]),
        (of({}), ["source 1: it has neither", "its source (a model) or its adapter (a LoRA)"]),
        (of(TWO[0], {"source": "x", "adapter": "y"}), ["source 2: it has both"]),
        (of({**TWO[0], "weight": 0}), ["weight of source 1 is 0", "above 0"]),
        (of(TWO[0], {**TWO[1], "weight": True}), ["weight of source 2 is true"]),
        (of(TWO[0], {"adaptor": "y"}), ["unknown key 'adaptor' of source 2", "did you mean 'adapter'"]),
        (of("b/tuned"), ["source 1 is 'b/tuned'", "- source: REF or - adapter: REF"]),
        (of(sources="b/tuned"), ["sources is 'b/tuned'", "a list of mappings, as - source: REF"]),
        (of(TWO[0], TWO[1], TWO[0]), ["source 3 is b/tuned, as source 1 is", "once"]),
        (of(source="b/tuned"), ["source is b/tuned beside sources", "drop source"]),
        (of(adapter="c/lora"), ["adapter is c/lora beside sources", "- adapter:"]),
        (of(fusion={"what": "weights"}), ["fusion.what is weights, and sources are joined as task vectors"]),
        (of(compare={"sources": ["b/other"]}), ["compare.sources", "drop one of the two"]),
        (of(fusion={"density": 0.2}), ["fusion.density is 0.2", "sum keeps every entry"]),
        (of(fusion={"join": "ties", "density": 0}), ["fusion.density is 0"]),
        (of(fusion={"join": "mean"}), ["fusion.join is 'mean'", "'sum', 'ties' or 'dare'"]),
        (
            {
                "target": SMALL,
                "source": "b/tuned",
                "source_base": BIG,
                "fusion": {"what": "task-vector", "join": "ties"},
            },
            ["fusion.join is ties, which joins several sources"],
        ),
        (
            {"target": SMALL, "source": BIG, "fusion": {"what": "weights", "join": "ties"}},
            ["fusion.join is 'ties', which needs fusion.what: task-vector"],
        ),
    ],
)
def test_what_is_no_list_of_sources_is_one_line(data, words):
    assert_refused(data, words)
