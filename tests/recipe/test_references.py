"""What a recipe names is found, wherever it is named: what is told of files, and refused of them, rests on that."""

from __future__ import annotations

import json
import re

import pytest

from tmerge.recipe import Recipe, compared_references, model_references, text_references

_COMPARED = {"domains": {"law": "A/law"}, "task_data": {"xcopa_id": "A/questions"}}


@pytest.mark.parametrize(
    "named",
    [
        {
            "target": "A/target",
            "source_base": "A/base",
            "sources": [{"source": "A/one"}, {"adapter": "A/two"}],
            "bases": {"A/target": "A/below"},
            "calibration": {"dataset": "A/texts", "match_on": "A/other"},
            "compare": _COMPARED,
        },
        {"target": "A/target", "source": "A/source", "adapter": "A/lora", "plan": "A/plan"},
        {
            "target": "A/target",
            "source": "A/source",
            "fusion": {"what": "reconstruct", "keep": "A/kept"},
            "compare": {**_COMPARED, "sources": ["A/larger"]},
        },
    ],
)
def test_all_that_is_named_is_found(named):
    recipe = Recipe.from_mapping(named)
    found = model_references(recipe) | text_references(recipe) | compared_references(recipe)
    assert all(found.values())
    assert {name for name in found.values() if name.startswith("A/")} == set(re.findall(r"A/\w+", json.dumps(named)))


def test_what_is_not_named_is_not_there():
    recipe = Recipe(target="A/target", source="A/source")
    assert model_references(recipe) == {"target": "A/target", "source": "A/source"}
    assert compared_references(recipe) == {}
