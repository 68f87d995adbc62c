"""The held-out check: the fused model, and the controls that change the same neurons without the correspondence.

Of several sources each is scored alone as well, whole and at its own strength.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tmerge.calibration import TextSet
from tmerge.evaluation import (
    applied,
    descent_cosines,
    unchanged_layers,
    without_unchanged_layers,
)
from tmerge.fusion import Alpha, TransportedNeurons, alpha_of
from tmerge.models import STREAM, Model, group_of
from tmerge.recipe import Recipe
from tmerge.report import Descent
from tmerge.stages.neurons import Neurons
from tmerge.stages.notes import EvaluateNote, ScoreNote
from tmerge.stages.scoring import cut, held_out, load, score
from tmerge.stages.several import alone_names
from tmerge.stages.step import Progress

__all__ = ["Evaluate"]


@dataclass(frozen=True)
class Evaluate:
    """The stage ``evaluate``.

    Attributes:
        recipe: Of the run.
        target: Is fused, scored and restored.
        texts: Whose held-out texts decide.
        neurons: What was transported.
        alpha: As the recipe says, or as chosen.
        fused: The key of the stage that carried them; of several sources also how they are joined.
        unfused: The target's own scores.
        kept: Texts that a reconstruction is to leave the target as it is on; None without any.
    """

    recipe: Recipe
    target: Model
    texts: TextSet
    neurons: Neurons
    alpha: Alpha
    fused: str
    unfused: ScoreNote
    kept: TextSet | None = None

    name = "evaluate"
    note = EvaluateNote
    together = True

    def inputs(self) -> dict[str, Any]:
        """What decides the scores."""
        return {"fuse": self.fused, "alpha": self.alpha, "evaluation": self.recipe.digest("evaluation")}

    def do(self, key: str, progress: Progress) -> EvaluateNote:
        """Score the fused model and the controls, one after the other in the target's own memory."""
        names, transported = ("fused", *self.recipe.evaluation.controls), self.neurons.transported
        names = (*names, *alone_names(self.neurons))
        if any(alpha_of(self.alpha, neurons.projection) for neurons in transported):
            scores, seconds = self._scores(names, transported, progress)
        else:  # every one of them is the target, which was scored when it was read
            scores, seconds = dict.fromkeys(names, self.unfused), 0.0
            progress.step("nothing is fused: the scores are the target's", 1, 1, "models")
        descent = None
        if self.recipe.evaluation.descent and not len(transported):
            progress.note(
                "no source is carried, so that the descent control has no direction to hold against the loss's"
            )
        elif self.recipe.evaluation.descent:
            began = time.perf_counter()
            descent = progress.processes.from_first(lambda: self._descent(transported, progress))
            seconds += time.perf_counter() - began
        kept = {} if self.kept is None else self._on_kept(self.kept, transported, progress)
        return EvaluateNote(
            scores=scores,
            descent=descent,
            forward_seconds=seconds,
            kept=kept,
        )

    def _scores(
        self, names: tuple[str, ...], transported: Sequence[TransportedNeurons], progress: Progress
    ) -> tuple[dict[str, ScoreNote], float]:
        """Name -> scores; and the seconds of the forward passes."""
        loaded, layers = load(self.target, progress), self.target.views.views
        unfused, texts, scores, seconds = self.target.unfused, held_out(self.recipe, self.texts), {}, 0.0
        with without_unchanged_layers(loaded.model, unchanged_layers(transported)):
            for name in names:
                neurons = self.neurons.of(name, layers, self.recipe.seed)
                if not neurons:  # a source of strength 0 alone
                    scores[name] = self.unfused
                    continue
                with applied(layers, neurons, self.alpha, unfused):
                    model_scores = score(self.recipe, loaded, texts, progress, f"{name}: held-out texts")
                scores[name] = ScoreNote.of(model_scores)
                seconds += model_scores.seconds
        return scores, seconds

    def _on_kept(
        self, kept: TextSet, transported: Sequence[TransportedNeurons], progress: Progress
    ) -> dict[str, ScoreNote]:
        """The target and the fused model on texts of the kept dataset, none of which was fitted on."""
        loaded, texts = load(self.target, progress), cut(self.recipe, kept.held_out)
        by_model = {"base": score(self.recipe, loaded, texts, progress, f"target: texts of {kept.dataset}")}
        with applied(self.target.views.views, transported, self.alpha, self.target.unfused):
            by_model["fused"] = score(self.recipe, loaded, texts, progress, f"fused: texts of {kept.dataset}")
        return {name: ScoreNote.of(scores) for name, scores in by_model.items()}

    def _descent(self, transported: Sequence[TransportedNeurons], progress: Progress) -> Descent:
        """The merge's direction against the loss's, on calibration texts."""
        texts, calibration = self.texts.texts[: self.recipe.evaluation.descent], self.recipe.calibration
        descents = descent_cosines(
            load(self.target, progress),
            self.target.views.layers,
            [neurons for neurons in transported if group_of(neurons.projection) != STREAM],
            texts,
            seed=self.recipe.seed,
            max_tokens=calibration.max_tokens,
            batch_tokens=calibration.batch_tokens,
            progress=progress.counting("descent control", "texts"),
            note=progress.note,
        )
        return Descent.model_validate(
            {"texts": len(texts), "projections": {name: descent.to_dict() for name, descent in descents.items()}}
        )
