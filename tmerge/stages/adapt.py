"""`tmerge adapt`: training on top of a finished merge, scored on the merge's own held-out texts.

The run's target is trained with its transported residual frozen (or fused beforehand), folded, and written as a plain
checkpoint to a folder of its own, with a report that holds base, fused and adapted against each other.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tmerge.calibration import FeatureStore, TextSet, normalise, read_texts
from tmerge.errors import AdaptationError, OutputExistsError
from tmerge.evaluation import Interval, Scores, difference, resamples, score, verdict
from tmerge.fusion import Alpha
from tmerge.hub import write_card
from tmerge.models import LICENCE_FOLDER, LoadedModel, Model
from tmerge.models.agreed import computing_alike
from tmerge.preflight.models import Models
from tmerge.processes import ALONE, Processes
from tmerge.recipe import Recipe
from tmerge.report import Report, library_versions
from tmerge.run import Run, stage_key
from tmerge.stages.notes import ScoreNote
from tmerge.stages.save import publish
from tmerge.stages.scoring import held_out, load, reading
from tmerge.stages.scoring import score as score_in_run
from tmerge.stages.several import JoinedSources, neurons_of_report
from tmerge.stages.step import Listener, Progress, fusing_stage
from tmerge.stages.texts import kept_texts, training_texts
from tmerge.store import read_json, write_json, write_text
from tmerge.transport import TransportRecord

if TYPE_CHECKING:
    from tmerge.adaptation import AdaptationReport

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
        dataset: To train on, as ``calibration.dataset``; None takes the run's calibration texts.
        listener: Hears every `Step`; may raise `Cancelled`.
        processes: That train together, each of which calls this (`tmerge.processes`).

    Returns:
        The report; ``to_dict()`` is what ``tmerge/report.json`` in `out` holds.

    Raises:
        AdaptationError: Nothing is left to train on, or the training diverged.
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
    from tmerge.adaptation import adapt, feature_goals, refuse_token_rows

    first = processes.from_first
    merged = run.report()
    recipe = run.recipe()
    recipe = Recipe.from_mapping(
        recipe.model_dump(mode="json") | {"adaptation": {**recipe.adaptation.model_dump(mode="json"), **words}}
    )
    asked = recipe.adaptation
    if merged.sources and (asked.objective == "distill" or asked.transport_weight):
        said = "objective is distill" if asked.objective == "distill" else "transport_weight is above 0"
        raise AdaptationError(
            f"adaptation.{said}, which has one source to draw to, and this merge has {len(merged.sources)}; train with "
            "objective: sft and transport_weight: 0"
        )
    neurons, alpha = neurons_of_report(run.cache, recipe, merged, asked.alpha)
    transported = neurons.transported
    if run.transport_path.is_file():
        TransportRecord.load(run.transport_path)  # it goes with the result: damaged, it is said before the training
    commits = {"target": merged.target.commit, "source": merged.source.commit}
    models, progress = Models.of(recipe, commits), Progress("adapt", listener, processes)
    calibrated = TextSet.load(run.texts_path)
    kept = kept_texts(recipe, run)
    texts, prompts, data = first(lambda: _texts(recipe, models.target, calibrated, kept, dataset))
    settings = recipe.adaptation
    merge = run.key(fusing_stage(recipe))
    if isinstance(neurons, JoinedSources):
        merge = neurons.key(merge)
    decides = {"texts": list(texts), "prompts": list(prompts), "merge": merge, "alpha": alpha}
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
    first(lambda: _open(adapted, key, data))
    with adapted.at_work() if processes.is_first else nullcontext():
        target = load(models.target, progress)
        # Training leaves nothing of it as it was.
        models.target.release()
        trained = adapt(
            target,
            texts,
            settings,
            seed=recipe.seed,
            work=adapted.cache / "training",
            transported=transported,
            alpha=alpha,
            source=(lambda: reading(models.source, progress)) if settings.objective == "distill" else None,
            goals=goals,
            prompts=prompts,
            progress=progress.counting(settings.objective, "steps"),
            reading=partial(progress.counting, f"{models.source.reference}: what it predicts"),
            processes=processes,
        )
        scores = score_in_run(recipe, target, held_out(recipe, calibrated), progress, "adapted: held-out texts")
        strengths = neurons.strengths if isinstance(neurons, JoinedSources) else alpha
        return first(
            lambda: _written(run, adapted, merged, recipe, _Trained(target, trained, strengths, data), scores, progress)
        )


@dataclass(frozen=True)
class _Trained:
    """What a training made, and of what.

    Attributes:
        model: In memory.
        report: Of the training.
        alpha: Strength of what was transported.
        data: The texts, as the report names them.
    """

    model: LoadedModel
    report: AdaptationReport
    alpha: Alpha
    data: Mapping[str, Any]


def _written(
    run: Run, adapted: Run, merged: Report, recipe: Recipe, trained: _Trained, scores: Scores, progress: Progress
) -> Report:
    """The checkpoint, the report and the card, written; the report."""
    deciding = held_out(recipe, TextSet.load(run.texts_path))
    # As the merge has them: its sources need not be there any more.
    found = sorted(path for path in (run.folder / LICENCE_FOLDER).glob("*/*") if path.is_file())
    others = {path.relative_to(run.folder).as_posix(): path for path in found}
    weights = publish(trained.model, adapted, recipe, deciding, progress, others)
    adaptation = {
        **recipe.adaptation.model_dump(mode="json"),
        "alpha": trained.alpha,
        "data": trained.data,
        "tokens": trained.report.tokens,
        "seconds": trained.report.seconds,
        "trained_parameters": trained.report.trained,
        "aligned_share": trained.report.aligned,
        "loss_curve": [list(point) for point in trained.report.loss_curve],
    }
    evaluated = _evaluation(run, recipe, scores)
    adaptation["verdict"] = verdict(evaluated["difference"])
    # What the merge's report says of the merge stays as it is.
    document = merged.to_dict()
    # Training moves all weights: what is written of it is a whole checkpoint, whatever the merge was written as.
    document.pop("saved_adapter", None)
    recipe = recipe.model_copy(update={"save": recipe.save.model_copy(update={"form": "merged"})})
    document["evaluation"]["adapted"] = {name: measured.to_dict() for name, measured in evaluated.items()}
    report = Report.model_validate(document | {"adaptation": adaptation, "weights": weights})
    write_text(adapted.work / "recipe.yaml", recipe.to_yaml())
    if run.transport_path.is_file():
        shutil.copyfile(run.transport_path, adapted.transport_path)
    write_json(adapted.work / "report.json", report.to_dict())
    write_card(adapted, report, recipe)
    return report


def _texts(
    recipe: Recipe, target: Model, calibrated: TextSet, kept: TextSet | None, dataset: str | None
) -> tuple[tuple[str, ...], tuple[int, ...], dict[str, Any]]:
    """What to train on, without the texts that decide the verdict."""
    if dataset is None:
        more = {} if kept is None else {"kept": len(kept.texts), "kept_dataset": kept.dataset}
        return *training_texts(calibrated, kept), calibrated.to_dict() | more
    settings = recipe.calibration.model_copy(update={"dataset": dataset, "config": None, "column": None})
    text_set = read_texts(settings, seed=recipe.seed, chat_tokenizer=target.tokenizer)
    kept_away = {normalise(text) for text in calibrated.held_out}
    # What a calibration holds out is of no use here: the run's own held-out texts decide.
    pairs = [*zip(text_set.texts, text_set.prompts, strict=True), *((text, 0) for text in text_set.held_out)]
    if recipe.adaptation.completions_only:
        pairs = pairs[: len(text_set.texts)]
    pairs = [(text, prompt) for text, prompt in pairs if normalise(text) not in kept_away]
    if not pairs:
        raise AdaptationError(f"dataset {dataset!r}: all its texts are held out by the run; give other texts")
    texts, prompts = zip(*pairs, strict=True)
    return texts, prompts, text_set.to_dict() | {"texts": len(texts), "held_out": 0}


def _open(adapted: Run, key: str, data: Mapping[str, Any]) -> None:
    """A new folder, or one where this very training was stopped."""
    folder, read = adapted.folder, {name: data[name] for name in ("dataset", "file_sha256", "sha256")}
    path = adapted.cache / "adapt.json"
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        if Run.note(path, key) is None:
            before = (read_json(path) or {}).get("facts", {})
            changed = before.get("dataset") == read["dataset"] and before.get("sha256") != read["sha256"]
            why = "exists and is not this training, begun before"
            if changed:
                why = f"was begun before {read['dataset']} changed, and trains on its former texts"
            raise OutputExistsError(f"{folder} {why}; choose another --out, or delete the folder")
        return
    try:
        adapted.cache.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputExistsError(f"{folder} cannot be made: {error.strerror}; choose another --out") from None
    adapted.finish("adapt", key, read)


def _evaluation(run: Run, recipe: Recipe, adapted: Scores) -> dict[str, Interval]:
    """The adapted model's score, and its paired differences to the base and to the fused model."""
    counts = resamples(len(adapted.bits), recipe.evaluation.bootstrap, recipe.seed)
    return {
        "score": score(adapted, counts),
        "difference": difference(adapted, _noted(run, "target"), counts),
        "difference_to_fused": difference(adapted, _noted(run, "evaluate", "fused"), counts),
    }


def _noted(run: Run, stage: str, name: str | None = None) -> Scores:
    """Scores that a stage of the merge noted, text by text."""
    facts = run.noted(stage)["scores"]
    return ScoreNote.model_validate(facts[name] if name else facts).scores()
