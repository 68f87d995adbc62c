"""`tmerge adapt`: training on top of a finished merge, scored on the merge's own held-out texts.

The run's target is trained with its transported residual frozen (or fused beforehand), folded, and written as a plain
checkpoint to a folder of its own, with a report that holds base, fused and adapted against each other.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

from tmerge.calibration import FeatureStore, TextSet
from tmerge.errors import AdaptationError
from tmerge.models.agreed import computing_alike
from tmerge.processes import ALONE, Processes
from tmerge.recipe import Recipe
from tmerge.report import Report, library_versions
from tmerge.run import Run, stage_key
from tmerge.stages.merged_models import SINCE_THE_MERGE, MergedModels
from tmerge.stages.scoring import held_out
from tmerge.stages.scoring import score as score_in_run
from tmerge.stages.several import JoinedSources, neurons_of_report
from tmerge.stages.step import Listener, Progress, fusing_stage
from tmerge.stages.texts import kept_texts
from tmerge.stages.trained import Trained
from tmerge.stages.training_folder import TrainingFolder
from tmerge.stages.training_set import TrainingSet
from tmerge.transport import TransportRecord

__all__ = ["adapt_run"]


def adapt_run(
    folder: str | Path,
    out: str | Path,
    words: Mapping[str, Any],
    *,
    dataset: str | None = None,
    listener: Listener | None = None,
    processes: Processes = ALONE,
) -> Report:
    """Train a finished run's target on top of what was transported.

    Args:
        folder: Of the run.
        out: Where the adapted model goes; a training that was stopped there is taken up again.
        words: Keys of the recipe's ``adaptation`` section that are asked for.
        dataset: To train on, as ``calibration.dataset``: as many of its texts as the steps can use. None takes the
            run's calibration texts.
        listener: Hears every `Step`; may raise `Cancelled`.
        processes: That train together, each of which calls this (`tmerge.processes`).

    Returns:
        The report; ``to_dict()`` is what ``tmerge/report.json`` in `out` holds.

    Raises:
        AdaptationError: Nothing is left to train on, or the training diverged.
        CheckpointError: The target, or the source that is to be distilled, is another than the one that was merged.
        DatasetError: `dataset` cannot be read.
        MissingExtraError: A package that training needs is not installed.
        OutputExistsError: `out` holds something else.
        RunBusyError: Another process trains in `out`.
        RunNotFoundError: Not a finished run, or its cache is gone.
    """
    run, adapted = Run(Path(folder)), Run(Path(out))
    with processes.failing_together():
        words, dataset = processes.from_first(lambda: (words, dataset))
        run.report()  # says best what is no run
        with computing_alike(run.recipe().device, processes):
            return _adapt_run(run, adapted, words, dataset, listener or (lambda step: None), processes)


def _adapt_run(
    run: Run,
    adapted: Run,
    words: Mapping[str, Any],
    dataset: str | None,
    listener: Listener,
    processes: Processes,
) -> Report:
    from tmerge.adaptation import adapt, feature_goals, refuse_token_rows, training_libraries

    first = processes.from_first
    merged = run.report()
    recipe = run.recipe()
    recipe = Recipe.from_mapping(
        recipe.model_dump(mode="json") | {"adaptation": {**recipe.adaptation.model_dump(mode="json"), **words}}
    )
    settings = recipe.adaptation
    distills = settings.objective == "distill"
    if merged.sources and (distills or settings.transport_weight):
        said = "objective is distill" if distills else "transport_weight is above 0"
        raise AdaptationError(
            f"adaptation.{said}, which has one source to draw to, and this merge has {len(merged.sources)}; train with "
            "objective: sft and transport_weight: 0"
        )
    training_libraries(settings)  # before anything takes its time, or is written
    neurons, alpha = neurons_of_report(run.cache, recipe, merged, settings.alpha)
    if run.transport_path.is_file():
        TransportRecord.load(run.transport_path)  # it goes with the result: damaged, it is said before the training
    folder, progress = TrainingFolder(adapted), Progress("adapt", listener, processes)
    commits = {"target": merged.target.commit, "source": merged.source.commit}
    models = MergedModels(recipe, commits, progress, SINCE_THE_MERGE)
    read = ["target", "source"] if distills and not folder.has_teacher else ["target"]
    first(lambda: models.refuse_changed(*read))
    calibrated = TextSet.load(run.texts_path)
    kept = kept_texts(recipe, run)
    data = first(lambda: _training_set(recipe, dataset, calibrated, kept, models))
    if processes.is_first:
        for line in data.notes:
            progress.note(line)
    merge = run.key(fusing_stage(recipe))
    if isinstance(neurons, JoinedSources):
        merge = neurons.key(merge)
    decides = {"texts": list(data.texts), "prompts": list(data.prompts), "merge": merge, "alpha": alpha}
    key = stage_key("adapt", recipe=recipe.digest(), versions=library_versions(), **decides)
    goals = None
    if settings.transport_weight:
        if dataset is not None:
            raise AdaptationError(
                "adaptation.transport_weight draws features on the run's own calibration texts; leave --dataset away"
            )
        refuse_token_rows(recipe)
        stores = [FeatureStore(run.features(role)) for role in ("target", "source")]
        goals = feature_goals(TransportRecord.load(run.transport_path), *stores)
    first(lambda: folder.open(key, data.data))
    with folder.at_work() if processes.is_first else nullcontext():
        target = models.load("target")
        # Training leaves nothing of it as it was.
        models.release("target")
        training = adapt(
            target,
            data.texts,
            settings,
            seed=recipe.seed,
            work=folder.work,
            transported=neurons.transported,
            alpha=alpha,
            source=(lambda: models.reading("source")) if distills else None,
            goals=goals,
            prompts=data.prompts,
            progress=progress.counting(settings.objective, "steps"),
            reading=partial(progress.counting, f"{models.handle('source').reference}: what it predicts"),
            note=progress.note,
            processes=processes,
            batch_tokens=recipe.calibration.batch_tokens,
        )
        scores = score_in_run(recipe, target, held_out(recipe, calibrated), progress, "adapted: held-out texts")
        strengths = neurons.strengths if isinstance(neurons, JoinedSources) else alpha
        trained = Trained(run, recipe, target, training, strengths, data, scores)
        return first(lambda: trained.write(adapted, progress))


def _training_set(
    recipe: Recipe, dataset: str | None, calibrated: TextSet, kept: TextSet | None, models: MergedModels
) -> TrainingSet:
    """What to train on, without the texts that decide the verdict."""
    if dataset is None:
        return TrainingSet.of_merge(calibrated, kept)
    return TrainingSet.of_dataset(recipe, dataset, calibrated, models.handle("target"))
