"""What a recipe is refused with."""

from __future__ import annotations

import pytest

from tmerge.errors import RecipeError
from tmerge.recipe import Recipe


def assert_refused(data, words):
    """A mapping is no recipe, in one line that has all these words."""
    with pytest.raises(RecipeError) as refused:
        Recipe.from_mapping(data)
    text = str(refused.value)
    assert "\n" not in text
    for word in words:
        assert word in text
