"""Fetching weights before they are loaded, for stages whose own time is too dear for downloads."""

from __future__ import annotations

from tmerge.models import ModelReference
from tmerge.models.finding import find_place
from tmerge.models.place import Place
from tmerge.models.remote import fetch_weights
from tmerge.recipe import Recipe
from tmerge.stages.step import Listener, Step

__all__ = ["fetch_weights_of"]


def fetch_weights_of(recipe: Recipe, *, listener: Listener) -> None:
    """Fetch all that a recipe's models and adapters have on the Hub.

    Args:
        recipe: Whose.
        listener: Hears of each; may raise.

    Raises:
        TmergeError: One of them cannot be fetched.
    """
    named = [(recipe.target, None), (recipe.source, recipe.adapter), (recipe.source_base, None)]
    named += [(source.source or recipe.source, source.adapter) for source in recipe.sources]
    for reference, adapter in named:
        if reference is not None and ModelReference.parse(reference).kind == "hub":
            listener(Step("texts", f"fetching {reference}", 0, 1, "models"))
            place = find_place(reference, adapter=adapter, base=recipe.base_of(reference))
            if isinstance(place, Place) and place.snapshot is not None:
                fetch_weights(place.snapshot)
            if place.adapter is not None:
                place.adapter.fetch()
