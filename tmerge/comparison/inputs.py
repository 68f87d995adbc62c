"""What a comparison's rows are made of beside its texts and models: further domains and tasks, as they were first.

Rows are kept under what identified these when the comparison began, and are made hours later: what has become another
by then is refused, and never scored under the old identity. So are models (`tmerge.stages.merged_models`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from tmerge.calibration import DatasetRecord, file_identity, of_another, pinned, read_texts
from tmerge.comparison.rows import Answers
from tmerge.errors import DatasetError
from tmerge.evaluation.tasks import run_tasks
from tmerge.models import LoadedModel
from tmerge.processes import Processes
from tmerge.recipe import Recipe
from tmerge.stages.merged_models import Since
from tmerge.stages.step import Listener, Progress

__all__ = ["SINCE_IT_BEGAN", "ComparedData", "merge_recipe", "with_source"]

SINCE_IT_BEGAN = Since("this comparison began", "start the same command again, and what depends on it is done anew")
"""Of the models that rows are kept of."""

# The comparison's merge always says whether it points downhill: on this many calibration texts.
_DESCENT_TEXTS = 64


def merge_recipe(recipe: Recipe) -> Recipe:
    """Of a comparison's merge, which does not change when only the comparison does."""
    evaluation = recipe.evaluation
    if not evaluation.descent:
        evaluation = evaluation.model_copy(update={"descent": _DESCENT_TEXTS})
    plain = {"compare": type(recipe.compare)(), "adaptation": type(recipe.adaptation)()}
    return recipe.model_copy(update={"evaluation": evaluation, **plain})


def with_source(recipe: Recipe, source: str) -> Recipe:
    """A recipe with another source, and of `bases` what is said of the models that it names then."""
    named = [name for name in (recipe.target, recipe.source_base) if name is not None]
    bases = {name: base for name in named if (base := recipe.base_of(name)) is not None}
    return Recipe.from_mapping(recipe.model_dump(mode="json") | {"source": source, "bases": bases})


class ComparedData:
    """Domains and tasks of one comparison.

    Attributes:
        identities: Reference or task's file -> what identified its contents, as `identify` said.
    """

    def __init__(self, recipe: Recipe, out: Path, listener: Listener) -> None:
        self.recipe, self.settings = recipe, recipe.compare
        self.record = DatasetRecord(out / "data.json", Progress("compare", listener).note)
        self.identities: dict[str, str] = {}

    def identify(self) -> dict[str, str]:
        """Ask what all of them are now: reference or task's file -> what identifies its contents.

        Raises:
            DatasetError: One is missing, and was never read.
        """
        files = self.settings.task_data.values()
        return {
            **self.record.identify(self.settings.domains.values(), what="domain"),
            **self.record.identify(files, lambda path: file_identity(Path(path)), what="task file"),
        }

    def facts(self) -> dict[str, Any]:
        """What of them decides a row."""
        # Rows of an earlier tmerge are of the split that the calibration set is of.
        split = {} if self.recipe.calibration.split == "train" else {"split": "train"}
        return split | {
            "domains": self.settings.domains,
            "tasks": self.settings.tasks,
            "limit": self.settings.task_limit,
            "task_data": self.settings.task_data,
            "data": self.identities,
        }

    @cached_property
    def domains(self) -> Mapping[str, list[str]]:
        """The domains' texts, by name, uncut, the held-out ones first; read once.

        Raises:
            DatasetError: One cannot be read, or is not what was identified.
        """
        domains = {}
        for name, reference in self.settings.domains.items():
            identity = self.identities[reference]
            settings = of_another(self.recipe.calibration, pinned(reference, identity))
            texts = read_texts(settings, seed=self.recipe.seed, whole=True, further=True)
            if texts.file_sha256 is not None:
                _refuse_another("domain", reference, identity, f"sha256:{texts.file_sha256}")
            domains[name] = [*texts.held_out, *texts.texts]
        return domains

    def score_tasks(self, model: LoadedModel, began: Callable[[], None], processes: Processes) -> dict[str, Answers]:
        """Every question's own result, by task.

        Args:
            model: To be scored.
            began: Called before the first task, if there are any.
            processes: That answer together, each with a model of its own.

        Raises:
            DatasetError: A task's file is not what was identified, or changed while it was read.
        """
        if not self.settings.tasks:
            return {}
        began()
        self._refuse_changed_files()
        data = {task: Path(path) for task, path in self.settings.task_data.items()}
        limit, seed = self.settings.task_limit, self.recipe.seed
        scores = run_tasks(model, self.settings.tasks, data=data, limit=limit, seed=seed, processes=processes)
        # The harness reads the file itself, so what it read is known only if it is the same before and after.
        self._refuse_changed_files()
        return {task: Answers.noted(score) for task, score in scores.items()}

    def _refuse_changed_files(self) -> None:
        for path in dict.fromkeys(self.settings.task_data.values()):
            _refuse_another("task file", path, self.identities[path], file_identity(Path(path)))


def _refuse_another(what: str, reference: str, before: str, now: str) -> None:
    if before != now:
        since = SINCE_IT_BEGAN
        raise DatasetError(f"{what} {reference!r} changed since {since.words}; {since.remedy}")
