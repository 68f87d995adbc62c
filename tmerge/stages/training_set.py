"""What a training after a merge reads: what the merge read, or another dataset, as much of it as its steps can use."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from tmerge.calibration import TextSet, of_another, read_texts
from tmerge.errors import AdaptationError
from tmerge.models import Model
from tmerge.recipe import Recipe
from tmerge.stages.texts import training_texts

__all__ = ["TrainingSet"]

# Where completions alone are trained, texts read for each that is needed: of some the completion lies out of reach.
_SPARE = 4


@dataclass(frozen=True)
class TrainingSet:
    """Texts to train on, none of which decides the verdict.

    Attributes:
        texts: They.
        prompts: Per text, the characters before its completion (`TextSet.prompts`).
        data: What the report says of them.
        notes: What its reader should know beside it.
    """

    texts: tuple[str, ...]
    prompts: tuple[int, ...]
    data: Mapping[str, Any]
    notes: tuple[str, ...] = ()

    @classmethod
    def of_merge(cls, calibrated: TextSet, kept: TextSet | None) -> TrainingSet:
        """Those that the merge read.

        Args:
            calibrated: Its calibration set.
            kept: Those on which a reconstruction is to leave the target as it is.
        """
        more = {} if kept is None else {"kept": len(kept.texts), "kept_dataset": kept.dataset}
        return cls(*training_texts(calibrated, kept), calibrated.to_dict() | more)

    @classmethod
    def of_dataset(cls, recipe: Recipe, dataset: str, calibrated: TextSet, target: Model) -> TrainingSet:
        """Those of another dataset.

        Args:
            recipe: Its ``adaptation`` section says how many texts the training's steps can use.
            dataset: As ``calibration.dataset``.
            calibrated: The merge's calibration set, whose held-out texts are kept away.
            target: Its tokenizer's chat template writes conversations.

        Raises:
            AdaptationError: All its texts are held out by the merge.
            DatasetError, TooFewTextsError: As `read_texts`.
        """
        asked = recipe.adaptation
        wanted = asked.steps * asked.batch_size * asked.accumulation
        if asked.completions_only:
            wanted *= _SPARE
        # None is held out here, where the merge's own held-out texts decide: they may all be among those that are read,
        # and one more than can be used tells that there are more.
        most = {"texts": wanted + len(calibrated.held_out) + 1, "held_out": 0.0}
        settings = of_another(recipe.calibration, dataset).model_copy(update=most)
        read = read_texts(settings, seed=recipe.seed, chat_tokenizer=target.tokenizer, whole=True, further=True)
        usable = read.without(calibrated.held_out)
        if not usable.texts:
            raise AdaptationError(f"dataset {dataset!r}: all its texts are held out by the run; give other texts")
        notes = read.notes
        if len(usable.texts) > wanted:
            notes += (
                f"{read.dataset} has more texts than the training reads: {wanted} of them, as {asked.steps} steps of "
                f"{asked.batch_size * asked.accumulation} texts do not reach further; raise adaptation.steps for more",
            )
            usable = usable.without((), wanted)
        usable = replace(usable, notes=notes)
        return cls(usable.texts, usable.prompts, usable.to_dict(), notes)
