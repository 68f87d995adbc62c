"""`tmerge evaluate`: any models on the same texts and tasks, each held against the first with paired intervals."""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from tmerge.calibration import dataset_identity, file_identity, pinned, read_texts
from tmerge.evaluation import Scores, difference, resamples, score, score_texts
from tmerge.evaluation.tasks import TaskScore, run_tasks, task_difference, task_score
from tmerge.models import load_model, load_tokenizer
from tmerge.recipe import CalibrationSettings
from tmerge.stages.step import Listener, Step

__all__ = ["evaluate_models"]

_BOOTSTRAP = 2000


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
) -> dict[str, Any]:
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
        ``data``: dataset and tasks' files -> what identifies their contents (a SHA-256, a Hub dataset's commit); and
        ``models``: one entry a reference, with ``bits_per_byte`` and ``tasks``, each a value, its 95 % interval and
        the paired ``difference`` to the first model.
    """
    hear = listener or (lambda step: None)
    read: list[str] = []
    identities = {str(path): file_identity(path) for path in (data or {}).values()}
    if dataset is not None:
        # The reader splits by hash; all texts count here, and enough must lie on either side for it.
        identities[dataset] = dataset_identity(dataset)
        words = {"dataset": pinned(dataset, identities[dataset]), "texts": max(texts, 64), "held_out": 0.35}
        settings = CalibrationSettings.model_validate(words)
        found = read_texts(settings, seed=seed, chat_tokenizer=load_tokenizer(references[0]))
        limit_characters = 4 * settings.max_tokens
        read = [text[:limit_characters] for text in (*found.held_out, *found.texts)][:texts]
    likelihoods: list[Scores] = []
    benchmarks: list[dict[str, TaskScore]] = []
    entries: list[dict[str, Any]] = []
    for reference in references:
        hear(Step("evaluate", f"loading {reference}", 0, 1, "models"))
        model = load_model(reference, dtype=dtype, device=device, widen=True)
        entry: dict[str, Any] = {"model": reference, "commit": model.commit}
        if read:
            likelihoods.append(score_texts(model, read, progress=_told(hear, f"{reference}: texts", "texts")))
            counts = resamples(len(read), _BOOTSTRAP, seed)
            entry["bits_per_byte"] = score(likelihoods[-1], counts).to_dict()
            if len(likelihoods) > 1:
                change = difference(likelihoods[-1], likelihoods[0], counts)
                entry["bits_per_byte"]["difference"] = change.to_dict()
        if tasks:
            hear(Step("evaluate", f"{reference}: tasks", 0, 1, "models"))
            benchmarks.append(run_tasks(model, tasks, data=data, limit=limit, seed=seed))
            entry["tasks"] = task_entries(benchmarks[-1], benchmarks[0] if len(benchmarks) > 1 else None, seed)
        entries.append(entry)
        del model
        gc.collect()
    return {"texts": len(read), "dataset": dataset, "data": identities, "seed": seed, "models": entries}


def task_entries(
    scores: Mapping[str, TaskScore], base: Mapping[str, TaskScore] | None, seed: int, bootstrap: int = _BOOTSTRAP
) -> dict[str, Any]:
    """Task -> metric, questions, value, interval, and the paired difference to a base if one is given."""
    entries = {}
    for name, item in scores.items():
        counts = resamples(len(item.items), bootstrap, seed)
        entry: dict[str, Any] = {
            "metric": item.metric,
            "questions": len(item.items),
            **task_score(item, counts).to_dict(),
        }
        if base is not None:
            entry["difference"] = task_difference(item, base[name], counts).to_dict()
        entries[name] = entry
    return entries


def _told(hear: Listener, what: str, unit: str) -> Callable[[int, int], None]:
    return partial(_step, hear, what, unit)


def _step(hear: Listener, what: str, unit: str, done: int, total: int) -> None:
    hear(Step("evaluate", what, done, total, unit))
