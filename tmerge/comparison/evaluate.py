"""`tmerge evaluate`: any models on the same texts and tasks, each held against the first with paired intervals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import Field

from tmerge.calibration import dataset_identity, file_identity, pinned, read_texts
from tmerge.comparison.scores import Compared, TaskResult, compared, task_results
from tmerge.evaluation import Scores, resamples, score_texts
from tmerge.evaluation.tasks import TaskScore, run_tasks
from tmerge.models import Model, give_back_memory, load_tokenizer
from tmerge.recipe import CalibrationSettings
from tmerge.report import Items, Part
from tmerge.stages.scoring import load, opened, unit
from tmerge.stages.step import Listener, Progress

__all__ = ["Evaluation", "ModelScores", "evaluate_models"]

_BOOTSTRAP = 2000


class ModelScores(Part):
    """One model's.

    Attributes:
        model: As it was asked for.
        commit: Of its repo; of local files ``sha256:`` and their digest.
        bits_per_byte: On the texts; None where none were asked for.
        tasks: Benchmark task -> result.
    """

    model: str
    commit: str
    bits_per_byte: Compared | None = None
    tasks: Mapping[str, TaskResult] = Field(default_factory=dict)


class Evaluation(Part):
    """Models on the same texts and tasks.

    Attributes:
        texts: Scored; 0 where none were asked for.
        data: Dataset and tasks' files -> what identifies their contents: a SHA-256, a Hub dataset's commit.
        seed: Of the texts' order and the bootstrap.
        models: In the order in which they were named; the others are held against the first.
    """

    texts: int
    dataset: str | None
    data: Mapping[str, str]
    seed: int
    models: Items[ModelScores]


def evaluate_models(
    references: Sequence[str],
    *,
    dataset: str | None = None,
    texts: int = 200,
    tasks: Sequence[str] = (),
    data: Mapping[str, Path] | None = None,
    limit: int | None = None,
    device: str = "auto",
    dtype: str = "auto",
    seed: int = 0,
    listener: Listener | None = None,
) -> Evaluation:
    """Score models one after the other.

    Args:
        references: Of the models; the first is what the others are held against.
        dataset: Texts for bits per byte, as ``calibration.dataset``; all of them count, none is held out.
        texts: At most so many.
        tasks: Benchmark tasks or groups.
        data: task -> local file.
        limit: Questions of each task.
        device: As in a recipe.
        dtype: As in a recipe.
        seed: Of the texts' order and the bootstrap.
        listener: Hears every `Step`; may raise `Cancelled`.

    Returns:
        One entry a reference; ``to_dict()`` is what ``--json`` prints.
    """
    read: list[str] = []
    identities = {str(path): file_identity(path) for path in (data or {}).values()}
    if dataset is not None:
        identities[dataset] = dataset_identity(dataset)
        # Texts of both sides count, so the share is only the order in which they come.
        words = {"dataset": pinned(dataset, identities[dataset]), "texts": max(texts, 64), "held_out": 0.35}
        settings = CalibrationSettings.model_validate(words)
        tokenizer = load_tokenizer(references[0])
        text_set = read_texts(settings, seed=seed, chat_tokenizer=tokenizer, whole=True, further=True)
        limit_characters = 4 * settings.max_tokens
        read = [text[:limit_characters] for text in (*text_set.held_out, *text_set.texts)][:texts]
    likelihoods: list[Scores] = []
    benchmarks: list[dict[str, TaskScore]] = []
    models: list[ModelScores] = []
    progress = Progress("evaluate", listener or (lambda step: None))
    for reference in references:
        handle = Model(reference, dtype=dtype, device=device)
        # A benchmark asks question by question, so that its model is in memory; texts are read by blocks as well.
        model = load(handle, progress) if tasks else opened(handle, progress)
        scored: dict[str, Any] = {"model": reference, "commit": model.commit}
        if read:
            counted = progress.counting(f"{reference}: texts", unit(model))
            likelihoods.append(score_texts(model, read, progress=counted, note=progress.note, room=progress.room))
            first = likelihoods[0] if models else None
            scored["bits_per_byte"] = compared(likelihoods[-1], first, resamples(len(read), _BOOTSTRAP, seed))
        if tasks:
            progress.step(f"{reference}: tasks", 0, 1, "models")
            benchmarks.append(run_tasks(model, tasks, data=data, limit=limit, seed=seed))
            before = benchmarks[0] if models else None
            scored["tasks"] = task_results(benchmarks[-1], before, seed=seed, bootstrap=_BOOTSTRAP)
        models.append(ModelScores(**scored))
        del model
        handle.release()
        give_back_memory()
    return Evaluation(texts=len(read), dataset=dataset, data=identities, seed=seed, models=tuple(models))
