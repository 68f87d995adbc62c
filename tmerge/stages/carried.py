"""What is carried: a source's weights, or what one source or several have learned since their base."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tmerge.models import Model
from tmerge.preflight.models import Models
from tmerge.recipe import Recipe, source_name
from tmerge.stages.learned_weights import LearnedWeights
from tmerge.stages.neurons import Neurons
from tmerge.stages.several import JoinedSources
from tmerge.stages.source_weights import SourceWeights

__all__ = ["CarriedSource", "WhatIsCarried"]


@dataclass(frozen=True)
class CarriedSource:
    """A source that is carried, alone or as one of several.

    Attributes:
        name: Of one of several; empty of one alone.
        weights: That are carried; or the task vector of an adapter.
        base: Those of the source before its fine-tuning, where what it learned since is carried and is no adapter.
        neurons: Where what was carried goes.
    """

    name: str
    weights: SourceWeights | LearnedWeights
    base: SourceWeights | None
    neurons: Neurons

    @property
    def model(self) -> Model:
        """The source; of an adapter, it and its base."""
        return self.weights.joined if isinstance(self.weights, LearnedWeights) else self.weights.model


@dataclass(frozen=True)
class WhatIsCarried:
    """Of a run.

    Attributes:
        sources: One, or several.
        neurons: Where what is fused comes to be, of several joined.
        matched: The weights of the model that is read for the transport.
        outlives: What of that model is needed when it has been let go.
    """

    sources: tuple[CarriedSource, ...]
    neurons: Neurons
    matched: SourceWeights
    outlives: SourceWeights | LearnedWeights

    @classmethod
    def of(cls, recipe: Recipe, models: Models, projections: list[str], cache: Path) -> WhatIsCarried:
        """By what the recipe names.

        Args:
            recipe: Of the run.
            models: Its.
            projections: That are fused.
            cache: Of the run.
        """

        def weights(model: Model, role: str) -> SourceWeights:
            path = cache / f"{role}-weights.safetensors"
            # What is matched by is compared by its embedding too.
            stream = recipe.fusion.carries_stream or (recipe.matches_by_weights and model is models.matched)
            return SourceWeights(model, projections, stream, path)

        if recipe.sources:
            return cls._several(recipe, models, weights(models.matched, "source-base"), weights, cache)
        neurons, matched = Neurons(cache), weights(models.matched, "source")
        base = models.source_base
        # An adapter's change is a difference already.
        learned = LearnedWeights(matched, models.source) if recipe.adapter is not None else None
        before = None if learned is not None or base is None else weights(base, "source-base")
        outlives = matched if recipe.matches_by_weights else learned or matched
        return cls((CarriedSource("", learned or matched, before, neurons),), neurons, matched, outlives)

    @classmethod
    def _several(
        cls,
        recipe: Recipe,
        models: Models,
        base: SourceWeights,
        weights: Callable[[Model, str], SourceWeights],
        cache: Path,
    ) -> WhatIsCarried:
        """All of one base."""
        neurons, sources = JoinedSources.of_recipe(recipe, models, cache), list[CarriedSource]()
        outlives: SourceWeights | LearnedWeights | None = base if recipe.matches_by_weights else None
        for number, model in enumerate(models.sources, start=1):
            name = source_name(number)
            if model.adapter is None:
                sources.append(CarriedSource(name, weights(model, f"source-{number}"), base, neurons.each(name)))
                outlives = base
                continue
            learned = LearnedWeights(base, model)
            sources.append(CarriedSource(name, learned, None, neurons.each(name)))
            if outlives is None or learned.reads_base:
                outlives = base if learned.reads_base else learned
        assert outlives is not None  # the recipe names a source at least
        return cls(tuple(sources), neurons, base, outlives)
