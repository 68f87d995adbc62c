"""The paper's comparisons for a user's own pair, at equal budget: `tmerge compare`.

One merge is run; then every row is a model that is scored on the same held-out texts:
* without training: base, fused, the controls, the source, and fused, shrink and noise over alpha (Figure 5);
* trained on the texts that the merge read, all in the same order and for the same steps: sft and distill of the base,
  and of the fused model with its transported residual frozen; each for every seed; and sft of the base for as long as
  the merge and sft take together;
* fused from further sources (Figure 4); and every row on further domains (Figures 1 and 6).

A row that is finished is kept under a key of all that decides it, so a killed comparison continues where it was.
"""

from __future__ import annotations

import itertools
import math
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from tmerge.calibration import FeatureStore, TextSet
from tmerge.comparison.folder import at_work
from tmerge.comparison.inputs import SINCE_IT_BEGAN, ComparedData, merge_recipe, with_source
from tmerge.comparison.result import SCHEMA, Comparison
from tmerge.comparison.rows import RowNote, RowScores, TextScores, TrainedScores, added, grouped, summed_up
from tmerge.comparison.tables import comparison_table
from tmerge.errors import RecipeError
from tmerge.evaluation import applied, score_texts
from tmerge.fusion import Alpha
from tmerge.models import LoadedModel, load_model, model_commit
from tmerge.models.agreed import computing_alike
from tmerge.processes import ALONE, Processes
from tmerge.recipe import Recipe
from tmerge.report import library_versions
from tmerge.run import Run, stage_key
from tmerge.stages.merge import merge
from tmerge.stages.merged_models import MergedModels, refuse_moved
from tmerge.stages.neurons import Neurons
from tmerge.stages.scoring import cut, held_out, unit
from tmerge.stages.step import NOTE, Listener, Progress, Step, fusing_stage
from tmerge.stages.texts import kept_texts, training_texts
from tmerge.store import write_json, write_text
from tmerge.transport import TransportRecord

__all__ = ["compare"]


@dataclass(frozen=True)
class _Row:
    """A row to be made.

    Attributes:
        name: As it is shown.
        kind: That it is shown under.
        make: Makes it.
        inputs: What decides it beside the next three and the data, as a stage's.
        alpha: Of a sweep.
        of: What is fused at that alpha, or the source that took the recipe's place.
        seed: Of a training.
    """

    name: str
    kind: str
    make: Callable[[], RowScores]
    inputs: Mapping[str, Any]
    alpha: float | None = None
    of: str | None = None
    seed: int | None = None

    @property
    def said(self) -> dict[str, Any]:
        """What its note says of it."""
        facts = {"alpha": self.alpha, "of": self.of, "seed": self.seed}
        return {name: value for name, value in facts.items() if value is not None}


def compare(
    recipe: Recipe, out: str | Path, *, listener: Listener | None = None, processes: Processes = ALONE
) -> Comparison:
    """Run a recipe's comparison, or take it up where it stopped.

    Args:
        recipe: Its ``compare`` and ``adaptation`` sections say what is compared.
        out: A folder: ``merge/`` is the run of the merge, ``rows/`` the finished rows.
        listener: Hears every `Step`; may raise `Cancelled`.
        processes: That run it together, each of which calls this (`tmerge.processes`): the merge, the trainings and the
            scores on texts are shared out.

    Returns:
        What was found; ``to_dict()`` is what compare.json holds.

    Raises:
        TmergeError: Bad input, one line; nothing is left behind if nothing had been finished.
    """
    if recipe.sources:
        raise RecipeError(
            f"sources has {len(recipe.sources)}, and compare holds one source against trainings; merge them "
            "(tmerge merge scores each alone too), or name one of them as the source"
        )
    folder = Path(out)
    with processes.failing_together(), at_work(folder) if processes.is_first else nullcontext():
        recipe = processes.from_first(lambda: recipe)
        with computing_alike(recipe.device, processes):
            return _Comparison(recipe, folder, listener or (lambda step: None), processes).go()


class _Comparison:
    """One comparison at work."""

    def __init__(self, recipe: Recipe, out: Path, listener: Listener, processes: Processes) -> None:
        self.recipe, self.out, self.listener, self.processes = recipe, out, listener, processes
        self.merge_recipe = merge_recipe(recipe)
        self.rows_folder = out / "rows"
        self.data = ComparedData(recipe, out, listener)
        self.settings = recipe.compare

    def go(self) -> Comparison:
        # Asked first: what is missing is said before the merge has taken its hours.
        first = self.processes.from_first
        self.data.identities = first(self.data.identify)
        self.report = merge(self.merge_recipe, self.out / "merge", listener=self.listener, processes=self.processes)
        first(lambda: self.rows_folder.mkdir(exist_ok=True))
        first(self.data.record.save)
        rows: list[RowNote] = []
        for row in self._rows(rows):
            rows.append(self._finished(row, len(rows)))
        return first(lambda: self._written(self._result(rows)))

    def _written(self, result: Comparison) -> Comparison:
        write_json(self.out / "compare.json", result.to_dict())
        write_text(self.out / "compare.md", comparison_table(result))
        from tmerge.plots.comparison import comparison_page

        write_text(self.out / "compare.html", comparison_page(result))
        return result

    # -- what is read once --------------------------------------------------------------------------------------

    @cached_property
    def run(self) -> Run:
        return Run(self.out / "merge")

    @cached_property
    def texts(self) -> TextSet:
        return TextSet.load(self.run.texts_path)

    @property
    def commits(self) -> dict[str, str]:
        """Of the models that were merged."""
        return {role: getattr(self.report, role).commit for role in ("target", "source")}

    @cached_property
    def models(self) -> MergedModels:
        progress = Progress("compare", self.listener, self.processes)
        return MergedModels(self.merge_recipe, self.commits, progress, SINCE_IT_BEGAN)

    @cached_property
    def domains(self) -> dict[str, list[str]]:
        """Texts of the further domains and held-out ones of those to be kept, by name, cut as the held-out ones are."""
        kept = {} if self.kept is None else {f"kept: {self.kept.dataset}": list(self.kept.held_out)}
        return {name: cut(self.merge_recipe, texts) for name, texts in {**kept, **self.data.domains}.items()}

    @cached_property
    def kept(self) -> TextSet | None:
        return kept_texts(self.merge_recipe, self.run)

    @cached_property
    def neurons(self) -> Neurons:
        return Neurons(self.run.cache)

    @property
    def alpha(self) -> Alpha:
        return self.report.fusion.alpha_used

    # -- rows ---------------------------------------------------------------------------------------------------

    def _rows(self, finished: Sequence[RowNote]) -> Iterator[_Row]:
        """In their order; what `finished` holds by then decides those that take as long as others."""
        merged = {"merge": self._merge_key(), "commits": self.commits}
        yield _Row("base", "reference", partial(self._still, "base", None, 0.0), merged)
        for name in ("fused", *self.recipe.evaluation.controls):
            yield _Row(name, "still", partial(self._still, name, name, self.alpha), merged)
        yield _Row("source", "reference", self._source, merged)
        for alpha in self.settings.alphas:
            for name in ("fused", "shrink", "noise"):
                label = f"{name}, alpha {alpha:g}"
                make = partial(self._still, label, name, alpha)
                yield _Row(label, "sweep", make, merged, alpha=alpha, of=name)
        for source in self.settings.sources:
            label = f"fused with {source}"
            commit = self.processes.from_first(partial(model_commit, source))
            make = partial(self._other, source, commit)
            yield _Row(label, "source", make, merged | {"commit": commit}, of=source)
        training = {"adaptation": self.recipe.adaptation.model_dump(mode="json")}
        for name in self.settings.rows:
            for seed in self.settings.seeds:
                inputs: dict[str, Any] = merged | training
                steps = None
                if name == "sft+time":
                    sft = next(row for row in finished if (row.name, row.seed) == ("sft", seed))
                    steps = self._steps_in_time(sft)
                    inputs |= {"steps": steps}
                # What a training keeps while it lasts is of these very models, texts and settings.
                key = stage_key(f"training {name}", seed=seed, **inputs, **self.data.facts())
                folder = self.out / "training" / f"{name}-{seed}-{key[:12]}"
                yield _Row(name, "trained", partial(self._trained, name, seed, steps, folder), inputs, seed=seed)

    @property
    def _count(self) -> int:
        """Of all rows."""
        asked = self.settings
        still = 3 + len(self.recipe.evaluation.controls) + 3 * len(asked.alphas) + len(asked.sources)
        return still + len(asked.rows) * len(asked.seeds)

    def _finished(self, row: _Row, before: int) -> RowNote:
        """The row from an earlier call, or made now; so many are before it."""
        inputs = {**row.inputs, **row.said} | self.data.facts() | {"versions": library_versions()}
        key = stage_key(f"row {row.name}", **inputs)
        path = self.rows_folder / f"{key[:24]}.json"
        kept = self.processes.from_first(lambda: Run.note(path, key))
        if kept is not None:
            return RowNote.model_validate(kept)
        self._step(row.name, before, self._count, "rows")
        began = time.perf_counter()
        made = row.make()
        seconds = time.perf_counter() - began
        note = RowNote.model_validate(
            {"seconds": seconds, **made.model_dump(), "name": row.name, "kind": row.kind, **row.said}
        )
        # One note for all: what follows from its seconds is to be the same in all of them.
        note = self.processes.from_first(lambda: note)
        if self.processes.is_first:
            write_json(path, {"key": key, "facts": note.model_dump(exclude_unset=True)})
        self._step(row.name, before + 1, self._count, "rows")
        return note

    def _step(self, what: str, done: int, total: int, unit: str) -> None:
        self.listener(Step("compare", what, done, total, unit))

    def _merge_key(self) -> str:
        fused = {"fuse": self.run.key(fusing_stage(self.merge_recipe)), "texts": self.run.key("texts")}
        return stage_key("merge", recipe=self.merge_recipe.digest(), alpha=self.alpha, **fused)

    def _still(self, name: str, change: str | None, alpha: Alpha) -> RowScores:
        """The target with something fused into it, nothing trained."""
        layers = self.models.target_layers()
        neurons = self.neurons.of(change, layers, self.recipe.seed) if change else []
        with applied(layers, neurons, alpha, self.models.unfused_target()) if neurons else nullcontext():
            return self._scores(self.models.load("target"), name)

    def _source(self) -> RowScores:
        # A benchmark asks question by question, so that its model is in memory.
        source = self.models.load("source") if self.settings.tasks else self.models.read("source")
        result = self._scores(source, "source")
        self.models.release("source")
        return result

    def _other(self, source: str, commit: str) -> RowScores:
        """The same recipe with another source: its fused model."""
        folder = self.out / f"merge-{stage_key('source', source=source)[:8]}"
        recipe = with_source(self.merge_recipe, source)
        self._release_both()
        report = merge(recipe, folder, listener=self.listener, processes=self.processes)
        # That merge asks for the models anew, by their names.
        refuse_moved(source, commit, report.source.commit, SINCE_IT_BEGAN)
        refuse_moved(self.recipe.target, self.commits["target"], report.target.commit, SINCE_IT_BEGAN)
        model = load_model(str(folder), dtype=self.recipe.dtype, device=self.recipe.device, widen=True)
        return self._scores(model, f"fused with {source}")

    def _steps_in_time(self, sft: RowNote) -> int:
        """Steps of SFT that take as long as the merge, before it was scored, and SFT's own took."""
        fitted, a_step = self.report.fusion.fit_seconds, sft.seconds / max(1, sft.steps - sft.resumed)
        # What the controls were fitted in is not the merge's own.
        ends = ("choose", "evaluate") if fitted is None else ("reconstruct",)
        merged = itertools.takewhile(lambda stage: stage.name not in ends, self.report.stages)
        return sft.steps + math.ceil((sum(stage.seconds for stage in merged) + (fitted or 0.0)) / a_step)

    def _trained(self, name: str, seed: int, steps: int | None, work: Path) -> TrainedScores:
        """The target, or the fused model with its residual frozen, after training."""
        from tmerge.adaptation import adapt

        is_fused, rest = name.startswith("fused+"), name.removeprefix("fused+")
        objective = "distill" if rest == "distill" else "sft"
        settings = self.recipe.adaptation.model_copy(update={"objective": objective})
        if steps is not None:
            settings = settings.model_copy(update={"steps": steps})
        if rest != "sft+transport":
            settings = settings.model_copy(update={"transport_weight": 0.0})
        elif not settings.transport_weight:
            raise RecipeError("compare.rows names sft+transport, which needs adaptation.transport_weight above 0")
        texts, prompts = training_texts(self.texts, self.kept)
        # A model of its own: training leaves nothing of the target as it was.
        self._release_both()
        model = self.models.load("target")
        self.models.release("target")
        began = time.perf_counter()
        report = adapt(
            model,
            texts,
            settings,
            seed=seed,
            work=work,
            transported=self.neurons.transported if is_fused else None,
            alpha=0.0 if not is_fused else self.alpha if settings.alpha is None else settings.alpha,
            source=(lambda: nullcontext(self.models.read("source"))) if objective == "distill" else None,
            progress=partial(self._step, f"{name}, seed {seed}", unit="steps"),
            reading=lambda counted: partial(self._step, f"{name}: what the source predicts", unit=counted),
            prompts=prompts,
            goals=self._goals() if rest == "sft+transport" else None,
            note=lambda words: self.listener(Step(NOTE, words, 1, 1, "notes")),
            processes=self.processes,
            batch_tokens=self.recipe.calibration.batch_tokens,
        )
        seconds = time.perf_counter() - began
        self.models.release("source")
        result = self._scores(model, name)
        self.processes.from_first(lambda: self._remove_trainings(f"{name}-{seed}-"))
        return TrainedScores(
            **result.model_dump(),
            tokens=report.tokens,
            steps=report.steps,
            resumed=report.resumed,
            seconds=seconds,
            loss=report.loss_curve,
        )

    def _remove_trainings(self, begins: str) -> None:
        """This row's own, and those that were stopped before something changed."""
        for folder in (self.out / "training").glob(f"{begins}*"):
            shutil.rmtree(folder, ignore_errors=True)

    def _release_both(self) -> None:
        self.models.release("target")
        self.models.release("source")

    def _goals(self) -> Any:
        """Where the target's features are drawn to: the merge's own plans and features."""
        from tmerge.adaptation import feature_goals, refuse_token_rows

        refuse_token_rows(self.recipe)
        stores = [FeatureStore(self.run.features(role)) for role in ("target", "source")]
        return feature_goals(TransportRecord.load(self.run.transport_path), *stores)

    # -- scores -------------------------------------------------------------------------------------------------

    def _scores(self, model: LoadedModel, name: str) -> RowScores:
        """On the held-out texts, the further domains and the tasks."""
        sets = {"": held_out(self.merge_recipe, self.texts), **self.domains}
        by_domain = {}
        for domain, texts in sets.items():
            where = f"{name}: {domain or 'held-out texts'}"
            by_domain[domain] = score_texts(
                model,
                texts,
                batch_tokens=self.recipe.calibration.batch_tokens,
                processes=self.processes,
                progress=partial(self._step, where, unit=unit(model)),
            )
        began = partial(self._step, f"{name}: tasks", 0, 1, unit="models")
        tasks = self.data.score_tasks(model, began, self.processes)
        own = TextScores.noted(by_domain.pop(""))
        domains = {domain: TextScores.noted(scores) for domain, scores in by_domain.items()}
        return RowScores(bits=own.bits, bytes=own.bytes, domains=domains, tasks=tasks)

    def _result(self, notes: list[RowNote]) -> Comparison:
        """Values and paired intervals; the seeds of a trained row are averaged, text by text."""
        report, recipe, groups = self.report, self.recipe, grouped(notes)
        base = groups["base"][0]
        drawn = {"seed": recipe.seed, "bootstrap": recipe.evaluation.bootstrap}
        return Comparison.model_validate(
            {
                "schema": SCHEMA,
                "metric": "bits_per_byte",
                "texts": len(base.bits),
                "target": report.target,
                "source": report.source,
                "calibration": report.calibration,
                "alpha": self.alpha,
                "choice": report.fusion.choice,
                "descent": report.evaluation.descent,
                "adaptation": recipe.adaptation.model_dump(mode="json"),
                "data": self.data.identities,
                "rows": [summed_up(group, base, **drawn) for group in groups.values()],
                "added": added(groups, **drawn),
                "published": None if recipe.published is None else recipe.published.model_dump(mode="json"),
                "versions": library_versions(),
            }
        )
