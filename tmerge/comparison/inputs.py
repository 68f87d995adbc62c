"""What a comparison's rows are made of beside its texts: models, further domains and tasks, as they were first.

Rows are kept under what identified these when the comparison began, and are made hours later: a model is loaded at the
commit that was merged, and what has become another by then is refused, and never scored under the old identity.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from tmerge.calibration import DatasetRecord, file_identity, pinned, read_texts
from tmerge.comparison.rows import Answers
from tmerge.errors import CheckpointError, DatasetError
from tmerge.evaluation.tasks import run_tasks
from tmerge.models import LoadedModel, Model, Projection, give_back_memory
from tmerge.preflight.models import Models
from tmerge.processes import ALONE, Processes
from tmerge.recipe import Recipe
from tmerge.stages.scoring import load, opened
from tmerge.stages.step import Listener, Progress

__all__ = ["ComparedData", "MergedModels", "merge_recipe", "refuse_moved", "with_source"]

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


class MergedModels:
    """The models of rows: those that were merged, whatever their names stand for by now.

    Args:
        recipe: Names them.
        commits: Role -> what the merge's report says of its model; nobody is asked again.
        listener: Hears that one is loaded.
        processes: That compare together, each of which loads and reads them.
    """

    def __init__(
        self, recipe: Recipe, commits: Mapping[str, str], listener: Listener, processes: Processes = ALONE
    ) -> None:
        self._handles, self._commits = Models.of(recipe, commits), commits
        self._progress = Progress("compare", listener, processes)

    def load(self, role: str) -> LoadedModel:
        """A model in memory, kept until it is let go.

        Raises:
            CheckpointError: A folder, which cannot be loaded as it was, has changed.
        """
        return self._kept(role, load)

    def read(self, role: str) -> LoadedModel:
        """A model to be read, in memory or by blocks, kept until it is let go; raises as `load`."""
        return self._kept(role, opened)

    def _kept(self, role: str, get: Callable[[Model, Progress], LoadedModel]) -> LoadedModel:
        handle = self._handle(role)
        loaded = get(handle, self._progress)
        refuse_moved(handle.reference, self._commits[role], loaded.commit)
        return loaded

    def target_layers(self) -> list[dict[str, Projection]]:
        """The loaded target's projections."""
        self.load("target")
        return self._handle("target").views.views

    def unfused_target(self) -> list[dict[str, Projection]]:
        """Those of them that are read from its files."""
        return self._handle("target").unfused

    def release(self, role: str) -> None:
        """Let a model's weights go."""
        self._handle(role).release()
        give_back_memory()

    def _handle(self, role: str) -> Model:
        return self._handles.target if role == "target" else self._handles.source


def refuse_moved(reference: str, before: str, now: str) -> None:
    """Refuse a model that is another than the one that rows are kept under.

    Raises:
        CheckpointError: It is.
    """
    if before != now:
        raise CheckpointError(
            f"model {reference!r} changed since this comparison began ({before[:19]} then, {now[:19]} now); "
            "start the same command again, and what depends on it is done anew"
        )


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
        return {
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
            asked = {"dataset": pinned(reference, identity), "config": None, "column": None}
            texts = read_texts(self.recipe.calibration.model_copy(update=asked), seed=self.recipe.seed, whole=True)
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
        raise DatasetError(
            f"{what} {reference!r} changed since this comparison began; start the same command again, and what depends "
            "on it is done anew"
        )
