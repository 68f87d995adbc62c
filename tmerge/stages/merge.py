"""The road of a merge: its stages in order, each given what those before it left.

texts -> target -> source -> transport -> fuse (-> choose) -> evaluate -> save

No maths here, and no printing. A listener hears of every step; it may raise `Cancelled`, which stops between two steps
and keeps what is finished.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from tmerge.calibration import DatasetRecord, TextSet
from tmerge.errors import ReadOnlyError
from tmerge.fusion import Alpha
from tmerge.hub import write_card
from tmerge.models import pick_device
from tmerge.models.agreed import computing_alike
from tmerge.preflight.check import Check, check, refuse_unfit
from tmerge.preflight.models import Models
from tmerge.preflight.relatives import refuse_other_vocabularies
from tmerge.processes import ALONE, Processes
from tmerge.recipe import Recipe, Reconstruction
from tmerge.recorded import RecordedRun
from tmerge.report import Report, library_versions
from tmerge.run import Run
from tmerge.stages.carried import WhatIsCarried
from tmerge.stages.choose import Choose
from tmerge.stages.evaluate import Evaluate
from tmerge.stages.fuse import Fuse
from tmerge.stages.notes import FuseNote, Note
from tmerge.stages.read import Read
from tmerge.stages.reconstruct import Reconstruct
from tmerge.stages.reporting import Measurements, build_report
from tmerge.stages.runner import Finished, Runner
from tmerge.stages.save import Save
from tmerge.stages.several import JoinedSources
from tmerge.stages.source_weights import SourceWeights
from tmerge.stages.step import STAGES, Listener, Progress, Step, stage_names
from tmerge.stages.texts import Texts, kept_texts
from tmerge.stages.transport import Features, SolveTransport
from tmerge.store import write_json, write_text

__all__ = ["STAGES", "Listener", "Step", "advance", "merge"]


def merge(recipe: Recipe, out: str | Path, *, listener: Listener | None = None, processes: Processes = ALONE) -> Report:
    """Run a recipe, or take up its unfinished run.

    Args:
        recipe: What to merge, and how.
        out: The run's folder.
        listener: Hears every `Step`; may raise `Cancelled`.
        processes: That run it together, each of which calls this (`tmerge.processes`).

    Returns:
        The report; ``to_dict()`` is what report.json holds. Of a finished run that cannot be written any more, the one
        that is there.

    Raises:
        TmergeError: Bad input, one line; nothing is left behind if no stage had finished.
    """
    with processes.failing_together():
        # Each has read its own words and files: one of them counts.
        recipe = processes.from_first(lambda: recipe)
        run = processes.from_first(lambda: Run.open(Path(out), recipe))
        with computing_alike(recipe.device, processes):
            return _merge(recipe, run, listener or (lambda step: None), processes)


def _merge(recipe: Recipe, run: Run, listener: Listener, processes: Processes) -> Report:
    try:
        with run.at_work() if processes.is_first else nullcontext():
            road = _Road(recipe, run, listener, processes)
            finished = list(road.stages())
            return processes.from_first(lambda: road.report(finished))
    except ReadOnlyError:
        # What was finished before it was put where nothing is written any more.
        if not run.reported or processes.count > 1:
            raise
        return run.report()


def advance(recipe: Recipe, out: str | Path, *, until: str, listener: Listener | None = None) -> Note:
    """Run a recipe up to a stage, which it ends with; `merge` or another call goes on from there, in any process.

    Args:
        recipe: As for `merge`, and the same in every call.
        out: Likewise.
        until: One of `stage_names`.
        listener: As for `merge`.

    Returns:
        What that stage noted.

    Raises:
        TmergeError: As for `merge`.
        ValueError: The recipe's road has no such stage.
    """
    run = Run.open(Path(out), recipe)
    with run.at_work():
        for done in _Road(recipe, run, listener or (lambda step: None)).stages():
            if done.name == until:
                note: Note = done.note
                return note
    raise ValueError(f"no stage {until!r}; choose from {', '.join(stage_names(recipe))}")


@dataclass(frozen=True)
class _Road:
    """One recipe's, through one folder."""

    recipe: Recipe
    run: Run
    listener: Listener
    processes: Processes = ALONE

    @cached_property
    def models(self) -> Models:
        return Models.agreed(self.recipe, self.processes)

    @cached_property
    def recorded(self) -> RecordedRun | None:
        return None if self.recipe.plan is None else RecordedRun.agreed(self.recipe.plan, self.processes)

    @cached_property
    def check(self) -> Check:
        # By each process: what a check holds of a model with code of its own cannot be told.
        return check(self.recipe, self.models)

    def stages(self) -> Iterator[Finished[Any]]:
        """All stages; each is given out when it is finished."""
        recipe, run, cache, models = self.recipe, self.run, self.run.cache, self.models
        says, checked, first = Progress("texts", self.listener), self.check, self.processes.from_first
        first(lambda: refuse_unfit(checked, recipe, run.folder))
        if not run.reported:
            # Said before anything is fetched: a licence that forbids the merge, a repo that is gated.
            for line in checked.notes:
                says.note(line)
        projections, recorded = checked.projections, self.recorded
        if recorded is not None:
            commits, plan = {"target": models.target.commit, "source": models.matched.commit}, recorded
            first(lambda: plan.refuse_other_recipe(recipe, commits, projections))
        first(lambda: refuse_other_vocabularies(recipe, models))
        # Fetched before the work, and not when it is done and the Hub may be away.
        others = first(lambda: models.licence_files)
        device = pick_device(recipe.device)
        runner = Runner(run, self.listener, str(device), self.processes)

        apart = bool(recipe.fusion.chosen or (recorded is not None and recorded.recipe.fusion.chosen))
        data = first(lambda: self._data(says, recorded is not None))
        paths = run.texts_path, run.kept_texts_path
        yield runner(Texts(recipe, models.target, models.matched, data, apart, recorded is not None, *paths))
        texts = TextSet.load(run.texts_path)
        kept = kept_texts(recipe, run)
        if recorded is not None:
            first(lambda: plan.refuse_other_texts(texts))

        folders = {role: run.features(role) for role in ("target", "source")}
        roomy, read = models.fit_together(self.processes), (texts, projections)
        target = runner(Read("target", recipe, models.target, *read, folders["target"], recorded, None, not roomy))
        yield target
        carried = WhatIsCarried.of(recipe, models, projections, cache)
        # With an adapter it is read without it, and scored with it.
        scored = None if recipe.adapter is None else models.source
        folder, outlives = folders["source"], carried.outlives
        source = runner(Read("source", recipe, models.matched, *read, folder, recorded, outlives, scored=scored))
        yield source

        heads = {"target": target.note.heads, "source": source.note.heads}
        features, keys = Features(projections, folders, heads, cache), {"target": target.key, "source": source.key}
        by_weights = recipe.matches_by_weights
        own = SourceWeights(models.target, projections, by_weights, cache / "target-weights.safetensors")
        compared = models.target, (own, carried.matched)
        solved = runner(SolveTransport(recipe, features, *compared, keys, device, recorded))
        yield solved

        neurons = carried.neurons
        fused: Finished[FuseNote]
        if isinstance(recipe.fusion, Reconstruction):
            four = models.target, models.source, models.source_base, models.matched
            fused = runner(Reconstruct(recipe, *four, texts, kept, features, solved.key, recorded, run, neurons))
        else:
            two = models.target, carried.sources, models.matched
            fused = runner(Fuse(recipe, *two, features, solved.key, recorded, run, neurons, device))
        yield fused

        alpha, key = recipe.fusion.alpha, fused.key
        if isinstance(neurons, JoinedSources):
            key = neurons.key(key)
        chosen: Alpha
        if alpha == "auto":
            choice = runner(Choose(recipe, models.target, texts, neurons, key))
            yield choice
            chosen = choice.note.alpha
        else:
            chosen = alpha
        if isinstance(neurons, JoinedSources):
            neurons, chosen = neurons.at_alpha(chosen), 1.0
            key = neurons.key(fused.key)
        unfused = target.note.scores
        yield runner(Evaluate(recipe, models.target, texts, neurons, chosen, key, unfused, kept))
        yield runner(Save(recipe, run, models.target, texts, neurons, chosen, key, others))

    def _data(self, says: Progress, recorded: bool) -> dict[str, str]:
        """The recipe's datasets -> what identifies their contents; a recorded transport needs none to match on."""
        settings = self.recipe.calibration
        other = [] if settings.match_on is None or recorded else [settings.match_on]
        if self.recipe.fusion.kept_on is not None:
            other.append(self.recipe.fusion.kept_on)
        record = DatasetRecord(self.run.cache / "data.json", says.note)
        identities = record.identify(list(dict.fromkeys([settings.dataset, *other])))
        record.save()
        return identities

    def report(self, finished: list[Finished[Any]]) -> Report:
        """Write the report and the card, once all stages are finished."""
        resolved = self._resolved(TextSet.load(self.run.texts_path), kept_texts(self.recipe, self.run))
        write_text(self.run.work / "recipe.yaml", resolved.to_yaml())
        here = str(pick_device(self.recipe.device))
        read = next(stage.device for stage in finished if stage.name == "target")
        # Where the models read, and, if that was elsewhere, where all else was computed.
        device = here if read == here else f"{read} (transport and fusion: {here})"
        measured = Measurements.of(finished, None if self.recorded is None else self.recorded.report.calibration)
        report = build_report(resolved, self.check, measured, library_versions(), device)
        write_json(self.run.work / "report.json", report.to_dict())
        write_card(self.run, report, resolved)
        return report

    def _resolved(self, texts: TextSet, kept: TextSet | None) -> Recipe:
        """The recipe with Hub references pinned to the commits that were read."""
        data = self.recipe.model_dump(mode="json") | self.models.pinned()
        data["bases"] |= self.models.pinned_bases()
        # With their weights.
        data["sources"] = [
            source | pins for source, pins in zip(data["sources"], self.models.pinned_sources(), strict=True)
        ]
        if self.recorded is not None:
            data["plan"] = self.recorded.found.name
        if texts.revision is not None:
            name = self.recipe.calibration.dataset.partition("@")[0]
            data["calibration"]["dataset"] = f"{name}@{texts.revision}"
        if kept is not None and kept.revision is not None:
            data["fusion"]["keep"] = f"{str(self.recipe.fusion.kept_on).partition('@')[0]}@{kept.revision}"
        if texts.other_dataset is not None:
            data["calibration"]["match_on"] = texts.other_dataset
        return Recipe.from_mapping(data)
