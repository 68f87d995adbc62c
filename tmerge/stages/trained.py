"""What is written of a model that was trained after a merge: checkpoint, report and card.

The report says of the merge what the merge's own says: models, texts, transport, fusion, their scores. Whatever is of
the files in the folder, the weights and the notes about them, is of the trained model's.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tmerge.calibration import TextSet
from tmerge.evaluation import Interval, Scores, difference, resamples, score, verdict
from tmerge.fusion import Alpha
from tmerge.hub import merge_licence, write_card
from tmerge.models import LICENCE_FOLDER, LoadedModel, least_release, licence_files, pick_device
from tmerge.recipe import Recipe
from tmerge.report import Report, library_versions, written_words
from tmerge.run import Run
from tmerge.stages.notes import SaveNote, ScoreNote
from tmerge.stages.save import publish
from tmerge.stages.scoring import held_out
from tmerge.stages.step import Progress
from tmerge.stages.training_set import TrainingSet
from tmerge.store import write_json, write_text

if TYPE_CHECKING:
    from tmerge.adaptation import AdaptationReport

__all__ = ["Trained"]

_OF_THE_MERGE = "of the merge, before the training: "


@dataclass(frozen=True)
class Trained:
    """A model that was trained on top of a finished run.

    Attributes:
        run: That run.
        recipe: Its recipe, with the ``adaptation`` section that was trained by.
        model: In memory.
        training: What the training did.
        alpha: Strength of what was transported.
        data: What was trained on.
        scores: Of the trained model, on the run's held-out texts.
    """

    run: Run
    recipe: Recipe
    model: LoadedModel
    training: AdaptationReport
    alpha: Alpha
    data: TrainingSet
    scores: Scores

    def write(self, adapted: Run, progress: Progress) -> Report:
        """Write it.

        Args:
            adapted: Where to.
            progress: Hears of it.

        Returns:
            The report.

        Raises:
            SavedModelMismatchError: What was written is not what is in memory.
            RunNotFoundError: The run's cache is gone.
        """
        run, recipe, merged = self.run, self.recipe, self.run.report()
        deciding = held_out(recipe, TextSet.load(run.texts_path))
        # As the merge has them: its sources need not be there any more.
        found = sorted(path for path in (run.folder / LICENCE_FOLDER).glob("*/*") if path.is_file())
        others = {path.relative_to(run.folder).as_posix(): path for path in found}
        weights = publish(self.model, adapted, recipe, deciding, progress, others)
        evaluated = self._evaluation()
        # Training moves all weights: what is written of it is a whole checkpoint, whatever the merge was written as.
        recipe = recipe.model_copy(update={"save": recipe.save.model_copy(update={"form": "merged"})})
        stored, computed = self.model.dtype, self.model.model.dtype
        document: dict[str, Any] = merged.to_dict() | {
            "adaptation": self._adaptation(evaluated),
            "weights": weights,
            "dtype": str(stored).removeprefix("torch."),
            "computed_in": str(computed).removeprefix("torch."),
            "notes": self._notes(merged, adapted.folder, others),
        }
        document.pop("saved_adapter", None)
        document["evaluation"]["adapted"] = {name: measured.to_dict() for name, measured in evaluated.items()}
        report = Report.model_validate(document)
        write_text(adapted.work / "recipe.yaml", recipe.to_yaml())
        if run.transport_path.is_file():
            shutil.copyfile(run.transport_path, adapted.transport_path)
        write_json(adapted.work / "report.json", report.to_dict())
        write_card(adapted, report, recipe)
        return report

    def _adaptation(self, evaluated: dict[str, Interval]) -> dict[str, Any]:
        """The report's ``adaptation``."""
        return {
            **self.recipe.adaptation.model_dump(mode="json"),
            "alpha": self.alpha,
            "data": self.data.data,
            "tokens": self.training.tokens,
            "seconds": self.training.seconds,
            "trained_parameters": self.training.trained,
            "aligned_share": self.training.aligned,
            "loss_curve": [list(point) for point in self.training.loss_curve],
            "verdict": verdict(evaluated["difference"]),
            "device": str(pick_device(self.recipe.device)),
            "versions": library_versions(),
        }

    def _notes(self, merged: Report, folder: Path, others: dict[str, Path]) -> list[str]:
        """The training's own, the merge's, and those on the checkpoint in the folder."""
        saved = SaveNote.model_validate(self.run.noted("save"))
        written = written_words(saved.least_release, saved.licence_files, saved.source_licence_files)
        licence = merge_licence(merged)
        # Whatever is made of these models stands under their licences.
        lasting = {*licence.refusals, *licence.unknown}
        of_merge = [
            line if line in lasting else f"{_OF_THE_MERGE}{line}" for line in merged.notes if line not in written
        ]
        own = [name for name in licence_files(self.model.place) if (folder / name).is_file()]
        return [*self.data.notes, *of_merge, *written_words(least_release(self.model), own, list(others))]

    def _evaluation(self) -> dict[str, Interval]:
        """Its score, and its paired differences to the target and to the merge before the training."""
        counts = resamples(len(self.scores.bits), self.recipe.evaluation.bootstrap, self.recipe.seed)
        return {
            "score": score(self.scores, counts),
            "difference": difference(self.scores, self._noted("target"), counts),
            "difference_to_fused": difference(self.scores, self._noted("evaluate", "fused"), counts),
        }

    def _noted(self, stage: str, name: str | None = None) -> Scores:
        """Scores that a stage of the merge noted, text by text."""
        facts = self.run.noted(stage)["scores"]
        return ScoreNote.model_validate(facts[name] if name else facts).scores()
