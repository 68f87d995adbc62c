"""The paper's comparisons for a user's own pair, at equal budget: `tmerge compare`.

One merge is run; then every row is a model that is scored on the same held-out texts:

* without training: base, fused, the controls, the source, and fused, shrink and noise over alpha (Figure 5);
* trained on the calibration texts, all in the same order and for the same steps: sft and distill of the base,
  and of the fused model with its transported residual frozen; each for every seed;
* fused from further sources (Figure 4); and every row on further domains (Figures 1 and 6).

A row that is finished is kept under a key of all that decides it, so a killed comparison continues where it was.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch

from tmerge.benchmark import task_entries
from tmerge.calibration import FeatureStore, TextSet
from tmerge.comparison_inputs import ComparedData, MergedModels, refuse_moved
from tmerge.errors import RecipeError
from tmerge.evaluation import Scores, applied, difference, resamples, score, score_texts
from tmerge.evaluation.tasks import TaskScore
from tmerge.fusion import Alpha
from tmerge.models import LoadedModel, load_model, model_commit
from tmerge.recipe import Recipe
from tmerge.report import library_versions
from tmerge.run import Run, stage_key
from tmerge.stages.merge import merge
from tmerge.stages.neurons import Neurons
from tmerge.stages.scoring import cut, held_out
from tmerge.stages.step import Listener, Step
from tmerge.store import write_json, write_text
from tmerge.tables import comparison_table
from tmerge.transport import TransportRecord

__all__ = ["SCHEMA", "compare"]

SCHEMA = 1
# The comparison's merge always says whether it points downhill: on this many calibration texts.
_DESCENT_TEXTS = 64


@dataclass(frozen=True)
class _Row:
    """A row to be made: its name, the kind it is shown under, and what makes it."""

    name: str
    kind: str
    make: Callable[[], dict[str, Any]]
    facts: dict[str, Any]


def compare(recipe: Recipe, out: str | Path, *, listener: Listener | None = None) -> dict[str, Any]:
    """Run a recipe's comparison, or take it up where it stopped.

    Args:
        recipe: Its ``compare`` and ``adaptation`` sections say what is compared.
        out: A folder: ``merge/`` is the run of the merge, ``rows/`` the finished rows.
        listener: Hears every `Step`; may raise `Cancelled`.

    Returns:
        What compare.json holds.

    Raises:
        TmergeError: Bad input, one line.
    """
    return _Comparison(recipe, Path(out), listener or (lambda step: None)).go()


class _Comparison:
    """One comparison at work."""

    def __init__(self, recipe: Recipe, out: Path, listener: Listener) -> None:
        # Its merge is a run of its own, which does not change when only the comparison does.
        evaluation = recipe.evaluation
        if not evaluation.descent:
            evaluation = evaluation.model_copy(update={"descent": _DESCENT_TEXTS})
        self.recipe, self.out, self.listener = recipe, out, listener
        plain = type(recipe.compare)()
        self.merge_recipe = recipe.model_copy(
            update={"evaluation": evaluation, "compare": plain, "adaptation": type(recipe.adaptation)()}
        )
        self.rows_folder = out / "rows"
        self.data = ComparedData(recipe, out, listener)
        self.settings = recipe.compare

    def go(self) -> dict[str, Any]:
        # Asked first: what is missing is said before the merge has taken its hours.
        self.data.identify()
        report = merge(self.merge_recipe, self.out / "merge", listener=self.listener)
        self.report = report
        self.rows_folder.mkdir(exist_ok=True)
        self.data.record.save()
        rows = [self._finished(row) for row in self._rows()]
        result = self._result(rows)
        write_json(self.out / "compare.json", result)
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
        return MergedModels(self.merge_recipe, self.commits, self.listener)

    @cached_property
    def domains(self) -> dict[str, list[str]]:
        """Texts of the further domains, by name, cut as the held-out ones are."""
        return {name: cut(self.merge_recipe, texts) for name, texts in self.data.domains.items()}

    @cached_property
    def neurons(self) -> Neurons:
        return Neurons(self.run.cache)

    @property
    def alpha(self) -> Alpha:
        return self.report.fusion.alpha_used

    # -- rows ---------------------------------------------------------------------------------------------------

    def _rows(self) -> list[_Row]:
        merged = {"merge": self._merge_key(), "commits": self.commits}
        rows = [_Row("base", "reference", partial(self._still, "base", None, 0.0), merged)]
        for name in ("fused", *self.recipe.evaluation.controls):
            rows.append(_Row(name, "still", partial(self._still, name, name, self.alpha), merged))
        rows.append(_Row("source", "reference", self._source, merged))
        for alpha in self.settings.alphas:
            for name in ("fused", "shrink", "noise"):
                label, facts = f"{name}, alpha {alpha:g}", {"alpha": alpha, "of": name}
                rows.append(_Row(label, "sweep", partial(self._still, label, name, alpha), merged | facts))
        for source in self.settings.sources:
            label = f"fused with {source}"
            commit = model_commit(source)
            other = merged | {"of": source, "commit": commit}
            rows.append(_Row(label, "source", partial(self._other, source, commit), other))
        training = {"adaptation": self.recipe.adaptation.model_dump(mode="json")}
        for name in self.settings.rows:
            for seed in self.settings.seeds:
                facts = merged | training | {"seed": seed}
                rows.append(_Row(name, "trained", partial(self._trained, name, seed), facts))
        return rows

    def _finished(self, row: _Row) -> dict[str, Any]:
        """The row from an earlier call, or made now."""
        facts = row.facts | self.data.facts() | {"versions": library_versions()}
        key = stage_key(f"row {row.name}", **facts)
        store = Run(self.out)
        path = self.rows_folder / f"{key[:24]}.json"
        note = store.note(path, key)
        if note is None:
            self.listener(Step("compare", row.name, 0, 1, "rows"))
            began = time.perf_counter()
            note = {"name": row.name, "kind": row.kind, "tokens": 0, "steps": 0, **row.make()}
            note.setdefault("seconds", time.perf_counter() - began)
            note |= {name: row.facts[name] for name in ("alpha", "of", "seed") if name in row.facts}
            write_json(path, {"key": key, "facts": note})
            self.listener(Step("compare", row.name, 1, 1, "rows"))
        return note

    def _step(self, what: str, done: int, total: int, unit: str) -> None:
        self.listener(Step("compare", what, done, total, unit))

    def _merge_key(self) -> str:
        fused = {"fuse": self.run.key("fuse"), "texts": self.run.key("texts")}
        return stage_key("merge", recipe=self.merge_recipe.digest(), alpha=self.alpha, **fused)

    def _still(self, name: str, change: str | None, alpha: Alpha) -> dict[str, Any]:
        """The target with something fused into it, nothing trained."""
        layers = self.models.target_layers()
        items = self.neurons.of(change, layers, self.recipe.seed) if change else []
        with applied(layers, items, alpha) if items else nullcontext():
            return self._scores(self.models.load("target"), name)

    def _source(self) -> dict[str, Any]:
        result = self._scores(self.models.load("source"), "source")
        self.models.release("source")
        return result

    def _other(self, source: str, commit: str) -> dict[str, Any]:
        """The same recipe with another source: its fused model."""
        folder = self.out / f"merge-{stage_key('source', source=source)[:8]}"
        recipe = Recipe.from_mapping(self.merge_recipe.model_dump(mode="json") | {"source": source})
        self._release_both()
        report = merge(recipe, folder, listener=self.listener)
        # That merge asks for the models anew, by their names.
        refuse_moved(source, commit, report.source.commit)
        refuse_moved(self.recipe.target, self.commits["target"], report.target.commit)
        model = load_model(str(folder), dtype=self.recipe.dtype, device=self.recipe.device, widen=True)
        return self._scores(model, f"fused with {source}")

    def _trained(self, name: str, seed: int) -> dict[str, Any]:
        """The target, or the fused model with its residual frozen, after training."""
        from tmerge.adaptation import adapt

        is_fused, rest = name.startswith("fused+"), name.removeprefix("fused+")
        objective = "distill" if rest == "distill" else "sft"
        settings = self.recipe.adaptation.model_copy(update={"objective": objective})
        if rest != "sft+transport":
            settings = settings.model_copy(update={"transport_weight": 0.0})
        elif not settings.transport_weight:
            raise RecipeError("compare.rows names sft+transport, which needs adaptation.transport_weight above 0")
        work = self.out / "training" / f"{name}-{seed}"
        # A model of its own: training leaves nothing of the target as it was.
        self._release_both()
        model = self.models.load("target")
        self.models.release("target")
        began = time.perf_counter()
        report = adapt(
            model,
            self.texts.texts,
            settings,
            seed=seed,
            work=work,
            transported=self.neurons.transported if is_fused else None,
            alpha=0.0 if not is_fused else self.alpha if settings.alpha is None else settings.alpha,
            source=(lambda: self.models.load("source")) if objective == "distill" else None,
            progress=partial(self._step, f"{name}, seed {seed}", unit="steps"),
            prompts=self.texts.prompts,
            goals=self._goals() if rest == "sft+transport" else None,
        )
        seconds = time.perf_counter() - began
        self.models.release("source")
        result = self._scores(model, name)
        shutil.rmtree(work, ignore_errors=True)
        trained = {"tokens": report.tokens, "steps": report.steps, "seconds": seconds, "loss": report.loss_curve}
        return result | trained

    def _release_both(self) -> None:
        for role in ("target", "source"):
            self.models.release(role)

    def _goals(self) -> Any:
        """Where the target's features are drawn to: the merge's own plans and features."""
        from tmerge.adaptation import feature_goals, refuse_token_rows

        refuse_token_rows(self.recipe)
        stores = [FeatureStore(self.run.features(role)) for role in ("target", "source")]
        return feature_goals(TransportRecord.load(self.run.transport_path), *stores)

    # -- scores -------------------------------------------------------------------------------------------------

    def _scores(self, model: LoadedModel, name: str) -> dict[str, Any]:
        """Bits and bytes of every held-out text, and of every text of the further domains."""
        sets = {"": held_out(self.merge_recipe, self.texts), **self.domains}
        found = {}
        for domain, texts in sets.items():
            where = f"{name}: {domain or 'held-out texts'}"
            found[domain] = score_texts(
                model,
                texts,
                batch_tokens=self.recipe.calibration.batch_tokens,
                progress=partial(self._step, where, unit="texts"),
            )
        return {
            "tasks": self.data.score_tasks(model, partial(self._step, f"{name}: tasks", 0, 1, unit="models")),
            "bits": found[""].bits.tolist(),
            "bytes": found[""].bytes.tolist(),
            "domains": {
                domain: {"bits": scores.bits.tolist(), "bytes": scores.bytes.tolist()}
                for domain, scores in found.items()
                if domain
            },
        }

    def _result(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Values and paired intervals; the seeds of a trained row are averaged, text by text."""
        report = self.report.to_dict()
        grouped: dict[str, list[Mapping[str, Any]]] = {}
        for row in rows:
            grouped.setdefault(row["name"], []).append(row)
        base = grouped["base"][0]
        return {
            "schema": SCHEMA,
            "metric": "bits_per_byte",
            "texts": len(base["bits"]),
            "target": report["target"],
            "source": report["source"],
            "calibration": report["calibration"],
            "alpha": self.alpha,
            "choice": report["fusion"].get("choice"),
            "descent": report["evaluation"]["descent"],
            "adaptation": self.recipe.adaptation.model_dump(mode="json"),
            "data": self.data.identities,
            "rows": [self._row(group, base) for group in grouped.values()],
            "added": self._added(grouped),
            "published": self.recipe.published.model_dump(mode="json") if self.recipe.published else None,
            "versions": library_versions(),
        }

    def _row(self, group: Sequence[Mapping[str, Any]], base: Mapping[str, Any]) -> dict[str, Any]:
        first = group[0]
        row = {name: first[name] for name in ("name", "kind", "tokens", "steps", "alpha", "of") if name in first}
        row["seconds"] = sum(item["seconds"] for item in group) / len(group)
        row |= self._intervals([(item["bits"], item["bytes"]) for item in group], (base["bits"], base["bytes"]), first)
        row["domains"] = {
            domain: self._intervals(
                [(item["domains"][domain]["bits"], item["domains"][domain]["bytes"]) for item in group],
                (base["domains"][domain]["bits"], base["domains"][domain]["bytes"]),
                first,
            )
            for domain in first["domains"]
        }
        if first["tasks"]:
            own = _as_tasks([base]) if first["name"] != "base" else None
            row["tasks"] = task_entries(_as_tasks(group), own, self.recipe.seed, self.recipe.evaluation.bootstrap)
        if first["kind"] == "trained":
            row["seeds"] = [
                {"seed": item["seed"], "value": _bits_per_byte(item), "loss": item["loss"]} for item in group
            ]
        return row

    def _added(self, grouped: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[dict[str, Any]]:
        """What the merge adds to a training: with it against without it, the seeds averaged text by text."""
        found = []
        for name, group in grouped.items():
            without = grouped.get(name.removeprefix("fused+"), ())
            if not name.startswith("fused+") or not without:
                continue
            merged, plain = (
                _mean_scores([(item["bits"], item["bytes"]) for item in rows]) for rows in (group, without)
            )
            counts = resamples(len(plain.bits), self.recipe.evaluation.bootstrap, self.recipe.seed)
            seeds = [
                {"seed": one["seed"], "value": _bits_per_byte(one) - _bits_per_byte(other)}
                for one, other in zip(group, without, strict=True)
            ]
            to = name.removeprefix("fused+")
            found.append({"row": name, "to": to, **difference(merged, plain, counts).to_dict(), "seeds": seeds})
        return found

    def _intervals(
        self, items: Sequence[tuple[list[float], list[float]]], base: tuple[list[float], list[float]], first: Mapping
    ) -> dict[str, Any]:
        scores, own = _mean_scores(items), _mean_scores([base])
        counts = resamples(len(own.bits), self.recipe.evaluation.bootstrap, self.recipe.seed)
        result: dict[str, Any] = score(scores, counts).to_dict()
        if first["name"] != "base":
            result["difference"] = difference(scores, own, counts).to_dict()
        return result


def _mean_scores(items: Sequence[tuple[list[float], list[float]]]) -> Scores:
    """Bits and bytes of a row's seeds, averaged text by text."""
    bits, sizes = torch.tensor(items, dtype=torch.float64).mean(0)
    return Scores(bits, sizes, 0, 0.0)


def _as_tasks(group: Sequence[Mapping[str, Any]]) -> dict[str, TaskScore]:
    """Questions averaged over the seeds of a row."""
    return {
        task: TaskScore(
            item["metric"],
            torch.tensor([row["tasks"][task]["items"] for row in group], dtype=torch.float64).mean(0),
            0.0,
        )
        for task, item in group[0]["tasks"].items()
    }


def _bits_per_byte(row: Mapping[str, Any]) -> float:
    return sum(row["bits"]) / sum(row["bytes"])
