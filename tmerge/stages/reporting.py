"""The report of a run: what it did and whether it helped, put together from what its stages measured.

No number here is a constant: each comes from a stage's note of this run (or of the part of it that was resumed).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from tmerge.evaluation import Interval, Scores, Verdict, difference, resamples, score, verdict
from tmerge.fusion import COLUMN_PROJECTIONS, neuron_count
from tmerge.preflight.check import Check
from tmerge.preflight.document import CheckedModel
from tmerge.preflight.learned import stream_names
from tmerge.recipe import Recipe, Reconstruction, TaskVector, method_of, source_name
from tmerge.report.parts import (
    Calibration,
    FusedProjection,
    Fusion,
    Measured,
    MergedModel,
    OfBoth,
    Projections,
    ReconstructionFit,
    SeveralSource,
)
from tmerge.report.report import SCHEMA, Alone, Control, Evaluation, Kept, Report, StageCost, Timing
from tmerge.report.transport import Iterations, Transport
from tmerge.report.words import alone_words, in_place_words, kept_words, relatedness_words, written_words
from tmerge.stages.notes import (
    ChooseNote,
    EvaluateNote,
    FuseNote,
    ReadNote,
    ReconstructNote,
    SaveNote,
    TextsNote,
    TransportNote,
)
from tmerge.stages.runner import Finished

__all__ = ["Measurements", "build_report"]

# Of the recipe's transport, where its kind has it.
_QUOTED = {"structure", "matching", "signed", "map", "epsilon", "eta", "layer_cost", "layer_marginals"}


@dataclass(frozen=True)
class Measurements:
    """The finished stages of a run, each by its kind.

    Attributes:
        fused: The stage that worked out what is written into the target.
        chosen: None where alpha was given.
        stages: All of them, in their order.
        planned: Of the run whose transport was taken; None where it was solved.
    """

    texts: TextsNote
    target: ReadNote
    source: ReadNote
    transport: Finished[TransportNote]
    fused: FuseNote
    chosen: ChooseNote | None
    evaluated: EvaluateNote
    saved: SaveNote
    stages: Sequence[Finished[Any]]
    planned: Calibration | None = None

    @classmethod
    def of(cls, stages: Sequence[Finished[Any]], planned: Calibration | None = None) -> Measurements:
        """By the stages' names."""
        named = {stage.name: stage for stage in stages}
        return cls(
            named["texts"].note,
            named["target"].note,
            named["source"].note,
            named["transport"],
            named["fuse" if "fuse" in named else "reconstruct"].note,
            named["choose"].note if "choose" in named else None,
            named["evaluate"].note,
            named["save"].note,
            stages,
            planned,
        )


def build_report(
    recipe: Recipe, checked: Check, measured: Measurements, versions: Mapping[str, str], device: str
) -> Report:
    """The report of a finished run.

    Args:
        recipe: Resolved.
        checked: Facts of the two models.
        measured: What its stages noted.
        versions: Of the libraries that decide the numbers.
        device: Where it ran.

    Returns:
        Of schema 1, as it is written to report.json.
    """
    kept = _kept(recipe, measured)
    evaluation, judged = _evaluation(recipe, measured, kept)
    stages = [
        StageCost(
            name=stage.name,
            seconds=stage.seconds,
            forward_seconds=stage.note.forward_seconds,
            peak_rss_bytes=stage.peak_rss_bytes,
        )
        for stage in measured.stages
    ]
    total, forward = sum(stage.seconds for stage in stages), sum(stage.forward_seconds for stage in stages)
    base: dict[str, Any] = {}
    if measured.saved.adapter is not None:
        base["saved_adapter"] = measured.saved.adapter
    models = checked.document()
    if models.source_base is not None:
        base["source_base_model"] = _model(models.source_base)
    if recipe.adapter is not None:
        base["adapter"] = recipe.adapter
    if recipe.sources:
        base["sources"] = _sources(recipe, models.sources, measured)
    return Report(
        schema=SCHEMA,
        tmerge=versions["tmerge"],
        verdict=judged,
        target=_model(models.target),
        source=_model(models.source),
        source_base=recipe.source_base,
        **base,
        same_model=checked.target.commit == checked.source.commit and not recipe.sources,
        calibration=_calibration(measured),
        transport=_transport(recipe, measured),
        projections=Projections(
            fused=tuple(checked.projections),
            skipped=checked.skipped,
            left_alone=tuple(checked.target_layout.left_alone),
        ),
        fusion=_fusion(recipe, checked, measured),
        evaluation=evaluation,
        stages=tuple(stages),
        timing=Timing(total_seconds=total, forward_seconds=forward, other_seconds=total - forward),
        device=device,
        dtype=measured.saved.dtype,
        computed_in=measured.saved.computed_in,
        weights=measured.saved.weights,
        plan=recipe.plan,
        seed=recipe.seed,
        versions=versions,
        method=method_of(recipe),
        notes=(
            *checked.notes,
            *_remarks(measured),
            *_left_behind(recipe, checked, measured),
            *([] if kept is None else [kept_words(kept)]),
            *filter(None, [alone_words(evaluation.alone, base.get("sources", ()))]),
        ),
    )


def _strengths(recipe: Recipe, measured: Measurements) -> dict[str, float]:
    """Of several sources, name -> the strength that it was fused with."""
    if measured.chosen is not None:
        return measured.chosen.alpha
    assert recipe.fusion.alpha != "auto"  # or it was chosen
    return {source_name(number): recipe.fusion.alpha for number in range(1, len(recipe.sources) + 1)}


def _sources(recipe: Recipe, checked: Sequence[CheckedModel], measured: Measurements) -> tuple[SeveralSource, ...]:
    strengths, ratios = _strengths(recipe, measured), measured.fused.by_source
    named = zip(ratios, recipe.sources, checked, strict=True)
    return tuple(
        SeveralSource(
            name=name,
            model=_model(model),
            weight=source.weight,
            strength=strengths[name],
            norm_ratio={projection: tuple(values) for projection, values in ratios[name].items()},
        )
        for name, source, model in named
    )


def _remarks(measured: Measurements) -> list[str]:
    """What a reader of the numbers has to know, one line each."""
    kept = measured.texts.kept
    remarks = [*measured.texts.texts.notes, *([] if kept is None else kept.notes)]
    solved = measured.transport.note
    if solved.converged < solved.problems:
        remarks.append(
            f"{solved.problems - solved.converged} of {solved.problems} feature plans did not reach the "
            f"tolerance (worst marginal violation {solved.worst_marginal_violation:.1e}): raise "
            "transport.max_iterations or transport.epsilon"
        )
    for name, ratios in measured.fused.norm_ratios.items():
        layers = measured.fused.layers[name]
        if zero := [str(layer) for layer, ratio in zip(layers, ratios, strict=True) if ratio is None]:
            remarks.append(
                f"the target's own {name} neurons are all zero in layer{'s' * (len(zero) > 1)} {', '.join(zero)}: what "
                "was transported has no norm to be held against there (norm_ratio null)"
            )
    if solved.relatedness is not None:
        remarks.append(relatedness_words(solved.relatedness))
    if (words := in_place_words(solved.in_place)) is not None:
        remarks.append(words)
    if measured.chosen is not None and not any(measured.chosen.alpha.values()):
        remarks.append(
            f"fusion.alpha auto found no alpha that clearly gains on {measured.chosen.choice.texts} texts kept for "
            "choosing: the merge leaves the target unchanged"
        )
    saved = measured.saved
    remarks += written_words(saved.least_release, saved.licence_files, saved.source_licence_files)
    return remarks


def _left_behind(recipe: Recipe, checked: Check, measured: Measurements) -> list[str]:
    """What a carried adapter changes and was left behind, beside what the check, which reads no vocabulary, named."""
    if recipe.adapter is None or checked.source.adapter is None or not recipe.fusion.carries_stream:
        return []
    layouts = checked.target_layout, checked.source_layout
    changed = stream_names(checked.source.adapter.parameters, *layouts, checked.projections)
    left = [name for name in changed if name not in measured.fused.stream]
    if not left:
        return []
    return [f"what the adapter changes and the target has no place for, or no vocabulary: {', '.join(left)}"]


def _model(checked: CheckedModel) -> MergedModel:
    facts = checked.model_dump(include=set(MergedModel.model_fields), exclude_none=False)
    if checked.adapter is None:
        del facts["adapter"]
    return MergedModel.model_validate(facts)


def _calibration(measured: Measurements) -> Calibration:
    texts, target, source = measured.texts.texts, measured.target, measured.source
    same = {name: value for name, value in texts if name in Calibration.model_fields}
    if (planned := measured.planned) is not None:
        # What the neurons were matched on is that run's.
        same |= {"other": planned.other, "other_dataset": planned.other_dataset, "other_sha256": planned.other_sha256}
    return Calibration(
        **same,
        held_out_texts=texts.held_out,
        tokens=OfBoth(target=target.tokens, source=source.tokens),
        truncated=OfBoth(target=target.truncated, source=source.truncated),
    )


def _transport(recipe: Recipe, measured: Measurements) -> Transport:
    solved, fused = measured.transport.note, measured.fused
    return Transport(
        problems=solved.problems,
        iterations=Iterations.model_validate(solved.iterations),
        worst_marginal_violation=solved.worst_marginal_violation,
        converged=solved.converged,
        seconds=measured.transport.seconds,
        **recipe.transport.model_dump(mode="json", include=_QUOTED),
        weights=solved.weights,
        eta_used=fused.eta,
        layer_plans_converged=fused.layer_plans_converged,
        rows=recipe.calibration.rows,
        relatedness=solved.relatedness,
        in_place=solved.in_place,
    )


def _measured(interval: Interval) -> Measured:
    return Measured.model_validate(interval.to_dict())


def _kept(recipe: Recipe, measured: Measurements) -> Kept | None:
    """Scores on the texts that a reconstruction is to leave the target as it is on."""
    texts = measured.texts.kept
    if texts is None or not measured.evaluated.kept:
        return None
    base, fused = (measured.evaluated.kept[name].scores() for name in ("base", "fused"))
    counts = resamples(len(base.bits), recipe.evaluation.bootstrap, recipe.seed)
    return Kept(
        dataset=texts.dataset,
        revision=texts.revision,
        file_sha256=texts.file_sha256,
        sha256=texts.sha256,
        texts=len(base.bits),
        base=_measured(score(base, counts)),
        fused=_measured(score(fused, counts)),
        difference=_measured(difference(fused, base, counts)),
    )


def _evaluation(recipe: Recipe, measured: Measurements, kept: Kept | None) -> tuple[Evaluation, Verdict]:
    """The scores, and the verdict."""
    base, source = measured.target.scores.scores(), measured.source.scores.scores()
    scores: dict[str, Scores] = {name: note.scores() for name, note in measured.evaluated.scores.items()}
    fused = scores["fused"]
    counts = resamples(len(base.bits), recipe.evaluation.bootstrap, recipe.seed)
    change = difference(fused, base, counts)
    over = {name: difference(fused, scores[name], counts) for name in recipe.evaluation.controls}
    controls: dict[str, Control] = {}
    for name, beyond in over.items():
        alone = _measured(score(scores[name], counts))
        controls[name] = Control(
            value=alone.value,
            ci95=alone.ci95,
            difference=_measured(difference(scores[name], base, counts)),
            fused_minus_control=_measured(beyond),
        )
    asked: dict[str, Any] = {} if kept is None else {"kept": kept}
    if several := [name for name in measured.fused.by_source if name in scores]:
        asked["alone"] = {name: _alone(scores[name], base, fused, counts) for name in several}
    if recipe.evaluation.descent:
        asked["descent"] = measured.evaluated.descent
    evaluation = Evaluation(
        metric="bits_per_byte",
        texts=len(base.bits),
        bytes=int(base.bytes.sum()),
        base=_measured(score(base, counts)),
        fused=_measured(score(fused, counts)),
        source=_measured(score(source, counts)),
        difference=_measured(change),
        controls=controls,
        **asked,
    )
    return evaluation, verdict(change, over.values())


def _alone(scores: Scores, base: Scores, fused: Scores, counts: Tensor) -> Alone:
    """One of several sources alone."""
    own = _measured(score(scores, counts))
    return Alone(
        value=own.value,
        ci95=own.ci95,
        difference=_measured(difference(scores, base, counts)),
        fused_minus_alone=_measured(difference(fused, scores, counts)),
    )


def _fusion(recipe: Recipe, checked: Check, measured: Measurements) -> Fusion:
    settings, note = recipe.fusion, measured.fused
    selected = 1.0 if isinstance(settings, Reconstruction) else settings.top_k
    projections = {}
    for name in [name for name in checked.projections if note.layers.get(name)]:
        layers = note.layers[name]
        view = checked.target_layout.layers[layers[0]][name]
        neurons = view.in_features if name in COLUMN_PROJECTIONS else view.out_features
        projections[name] = FusedProjection(
            layers=tuple(layers),
            norm_ratio=tuple(note.norm_ratios[name]),
            neurons=neuron_count(selected, neurons),
            of=neurons,
            bias=note.biases[name],
        )
    how: dict[str, Any] = {} if measured.chosen is None else {"choice": measured.chosen.choice}
    if isinstance(settings, Reconstruction):
        assert isinstance(note, ReconstructNote)  # its stage's
        how["fit"] = ReconstructionFit(
            ridge=settings.ridge,
            ridges={name: tuple(ridges) for name, ridges in note.ridges.items()},
            rank=settings.rank,
            rows=note.rows,
            final_goal=note.final_goal,
            keep=note.keep,
            keep_texts=note.keep_texts,
            errors={name: tuple(errors) for name, errors in note.errors.items()},
        )
        how["fit_seconds"] = note.fit_seconds
    else:
        how |= {"scale": settings.scale, "units": settings.units, "top_k": settings.top_k}
    if recipe.sources and isinstance(settings, TaskVector):
        how["join"] = settings.join
        how |= {} if settings.join == "sum" else {"density": settings.density}
    return Fusion(what=settings.what, alpha=settings.alpha, **how, projections=projections, stream=tuple(note.stream))
