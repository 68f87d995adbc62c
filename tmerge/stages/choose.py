"""Choosing alpha for each group of projections, or each of several sources, on texts that are kept for choosing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tmerge.calibration import TextSet
from tmerge.evaluation import Choice as Raced
from tmerge.evaluation import (
    Race,
    Scores,
    choose_alpha,
    choose_strengths,
    unchanged_layers,
    without_unchanged_layers,
)
from tmerge.models import Model
from tmerge.recipe import Recipe, Reconstruction
from tmerge.report import Choice
from tmerge.stages.neurons import Neurons
from tmerge.stages.notes import ChooseNote
from tmerge.stages.scoring import cut, load, score
from tmerge.stages.several import JoinedSources
from tmerge.stages.step import Progress

__all__ = ["Choose"]


@dataclass(frozen=True)
class Choose:
    """The stage ``choose``.

    Attributes:
        recipe: Of the run.
        target: Is fused, scored and restored, alpha by alpha.
        texts: Whose choosing texts are scored.
        neurons: What was transported.
        fused: The key of the stage before; of several sources also how they are joined.
    """

    recipe: Recipe
    target: Model
    texts: TextSet
    neurons: Neurons
    fused: str

    name = "choose"
    note = ChooseNote
    together = True

    def inputs(self) -> dict[str, Any]:
        """What decides the choice."""
        return {
            "fuse": self.fused,
            "method": "halving",
            "alphas": self.recipe.fusion.alphas,
            "bootstrap": self.recipe.evaluation.bootstrap,
        }

    def do(self, key: str, progress: Progress) -> ChooseNote:
        """Let the alphas race."""
        texts, transported = cut(self.recipe, self.texts.choosing), self.neurons.transported
        loaded = load(self.target, progress)

        def scored(what: str, rows: Sequence[int]) -> Scores:
            chosen = [texts[row] for row in rows]
            return score(self.recipe, loaded, chosen, progress, f"choosing: {what}", finite=False)

        with without_unchanged_layers(loaded.model, unchanged_layers(transported)):
            choice = self._raced(
                Race(self.recipe.fusion.alphas, scored, len(texts), self.recipe.evaluation.bootstrap, self.recipe.seed)
            )
        noted_choice = Choice.model_validate(choice.to_dict() | {"texts": len(texts)})
        return ChooseNote(choice=noted_choice, forward_seconds=choice.seconds)

    def _raced(self, race: Race) -> Raced:
        layers, unfused, neurons = self.target.views.views, self.target.unfused, self.neurons
        if isinstance(neurons, JoinedSources):
            return choose_strengths(
                race, layers, neurons.names, lambda strengths: neurons.at(strengths).transported, unfused=unfused
            )
        # A block was fitted to what those before it give once they are changed: a step of all, or of none.
        together = isinstance(self.recipe.fusion, Reconstruction)
        return choose_alpha(race, layers, neurons.transported, together=together, unfused=unfused)
