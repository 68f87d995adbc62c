"""A merge's stages in order, with progress and cancellation. No maths here, and no printing.

texts -> target -> source -> transport -> fuse (-> choose) -> evaluate -> save

Each stage asks its `Run` whether it is finished under its key, and otherwise does its work and says so. A listener
hears of every step; it may raise `Cancelled`, which stops between two steps and keeps what is finished.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tmerge.calibration import TextSet, capture, other_texts, read_texts
from tmerge.evaluation import (
    Scores,
    applied,
    choose_alpha,
    control_generator,
    descent_cosines,
    noise,
    shrink,
    unchanged_layers,
    without_unchanged_layers,
)
from tmerge.fusion import (
    Alpha,
    TransportedNeurons,
    TransportRecord,
    alpha_of,
    carry,
    fuse,
    load_transported,
    save_transported,
)
from tmerge.hub import write_card
from tmerge.models import STREAM, group_of, head_facts
from tmerge.preflight.check import refuse_unfit
from tmerge.recipe import Recipe
from tmerge.report import Report, build_report, library_versions, relatedness_words
from tmerge.run import Run, write_json, write_text
from tmerge.session import NOTE, STAGES, Listener, Session, Step
from tmerge.solving import fusion_inputs, measure_relatedness, solve_apart, solve_shared

__all__ = ["STAGES", "Listener", "Step", "advance", "merge"]


def merge(recipe: Recipe, out: str | Path, *, listener: Listener | None = None) -> Report:
    """Run a recipe, or take up its unfinished run.

    Args:
        recipe: What to merge, and how.
        out: The run's folder.
        listener: Hears every `Step`; may raise `Cancelled`.

    Returns:
        The report; ``to_dict()`` is what report.json holds.

    Raises:
        TmergeError: Bad input, one line; nothing is left behind if no stage had finished.
    """
    run = Run.open(Path(out), recipe)
    try:
        work = _Merge(recipe, run, listener or (lambda step: None))
        for _ in work.stages():
            pass
        return work.report()
    except BaseException:
        run.abandon()
        raise


def advance(
    recipe: Recipe, out: str | Path, *, until: str, listener: Listener | None = None
) -> dict[str, dict[str, Any]]:
    """Run a recipe up to a stage, which it ends with; `merge` or another call goes on from there, in any process.

    Args:
        recipe: As for `merge`, and the same in every call.
        out: Likewise.
        until: One of `STAGES`.
        listener: As for `merge`.

    Returns:
        Stage -> what it noted.

    Raises:
        TmergeError: As for `merge`.
    """
    run = Run.open(Path(out), recipe)
    try:
        work = _Merge(recipe, run, listener or (lambda step: None))
        for name in work.stages():
            if name == until:
                break
        return work.notes
    except BaseException:
        run.abandon()
        raise


class _Merge(Session):
    """The stages, and what each of them has noted."""

    def __init__(self, recipe: Recipe, run: Run, listener: Listener) -> None:
        super().__init__(recipe, run, listener)
        self.transported: list[TransportedNeurons] | None = None
        self.permuted: list[TransportedNeurons] | None = None

    def stages(self) -> Iterator[str]:
        """All stages; each is named when it is finished."""
        refuse_unfit(self.check, self.recipe, self.run.folder)
        if not self.run.reported:
            # Said before anything is fetched: a licence that forbids the merge, a repo that is gated.
            for note in self.check.notes:
                self.step(NOTE, note, 1, 1, "notes")
        auto = self.recipe.fusion.alpha == "auto"
        if self.plan is not None:
            commits = {role: self.commit(role) for role in ("target", "source")}
            self.plan.refuse_other_recipe(self.recipe, commits, self.check.projections)
        calibration = self.recipe.digest("calibration", "seed")
        if self.recipe.calibration.rows != "texts":
            # Where both tokenizers agree depends on both.
            calibration += self.commit("source")
        apart = auto or (self.plan is not None and self.plan.recipe.fusion.alpha == "auto")
        with self.stage("texts", recipe=calibration, target=self.check.target.commit, choosing=apart, data=self.data):
            self._texts(apart)
        yield "texts"
        if self.plan is not None:
            self.plan.refuse_other_texts(self.texts.sha256)
        for role in ("target", "source"):
            # Where in the texts the tokens are read, which both tokenizers decide.
            places = {"ends": self.texts.ends} if self.texts.ends else {}
            other = {"other": self.texts.other} if self.texts.other else {}
            with self.stage(role, texts=self.texts.sha256, **places, **other, **self.model_facts(role)):
                self._read_model(role)
            yield role
        solved = {"target": self.keys["target"], "source": self.keys["source"], "plan": self.plan_key}
        with self.stage("transport", recipe=self.recipe.digest("transport"), **solved):
            self._transport()
        yield "transport"
        # Alpha enters only when the neurons are written, so that another alpha could start from here.
        fusion = self.recipe.fusion.model_dump(mode="json", exclude={"alpha", "alphas"})
        base = self.commit("source_base") if self.recipe.source_base else None
        permuted = "permuted" in self.recipe.evaluation.controls
        with self.stage(
            "fuse", transport=self.keys["transport"], fusion=fusion, base=base, seed=self.recipe.seed, permuted=permuted
        ):
            self._fuse()
        yield "fuse"
        if auto:
            tried = {"alphas": self.recipe.fusion.alphas, "bootstrap": self.recipe.evaluation.bootstrap}
            with self.stage("choose", fuse=self.keys["fuse"], method="halving", **tried):
                self._choose()
            yield "choose"
        alpha = self._alpha()
        with self.stage("evaluate", fuse=self.keys["fuse"], alpha=alpha, evaluation=self.recipe.digest("evaluation")):
            self._evaluate()
        yield "evaluate"
        with self.stage("save", fuse=self.keys["fuse"], alpha=alpha, save=self.recipe.digest("save")):
            self._save()
        yield "save"

    def _texts(self, apart: bool) -> None:
        path = self.run.cache / "calibration.json"
        if self.notes["texts"]:
            self.texts = TextSet.load(path)
            return
        self.step("texts", "reading the calibration set", 0, 1, "datasets")
        tokenizer = self.tokenizer("target")
        if self.check.source.reference.kind != "gguf":
            # Asked for now, so that its lack is seen before anything is kept; a GGUF file carries its own.
            self.tokenizer("source")
        calibration = self.calibration()
        choosing = calibration.choosing if apart else 0.0
        self.texts = read_texts(calibration, seed=self.recipe.seed, choosing=choosing, chat_tokenizer=tokenizer)
        if calibration.match_on is not None and self.plan is None:
            apart_texts = self.texts.choosing + self.texts.held_out
            other = other_texts(calibration, apart_texts, seed=self.recipe.seed, chat_tokenizer=tokenizer)
            self.texts = replace(self.texts, **other)
        self.refuse_changed(self.texts)
        if calibration.rows != "texts" and self.plan is None:
            self.texts = replace(self.texts, ends=self.common_ends())
        self.texts.save(path)
        self.notes["texts"] = {"texts": self.texts.to_dict()}
        self.step("texts", "reading the calibration set", 1, 1, "datasets")

    def _read_model(self, role: str) -> None:
        """Capture a model's features, and score it on the held-out texts; with a plan, score it alone."""
        if self.notes[role]:
            return
        if self.plan is not None:
            scores, read = self.score(role, role, f"{role}: held-out texts"), self.plan.report.calibration
            self.notes[role] = {
                "scores": _note_scores(scores),
                "tokens": getattr(read.tokens, role),
                "truncated": getattr(read.truncated, role),
                "forward_seconds": scores.seconds,
            }
            return
        model = self.model(role)
        calibration = self.recipe.calibration
        captured = capture(
            model,
            self.layout(role),
            self.texts.matched_on,
            self.check.projections,
            self.feature_folder(role),
            max_tokens=calibration.max_tokens,
            batch_tokens=calibration.batch_tokens,
            key=self.keys[role],
            ends=self.texts.ends or None,
            progress=lambda done, total: self.step(role, f"{role}: reading features", done, total, "texts"),
        )
        scores = self.score(role, role, f"{role}: held-out texts")
        self.notes[role] = {
            "scores": _note_scores(scores),
            "tokens": captured.tokens,
            "truncated": captured.truncated,
            "forward_seconds": captured.forward_seconds + scores.seconds,
            "heads": head_facts(model.model, self.layout(role)),
        }

    def _transport(self) -> None:
        if self.notes["transport"]:
            return
        if self.plan is not None:
            facts = ("problems", "iterations", "worst_marginal_violation", "converged", "relatedness")
            solved = self.plan.report.transport.to_dict()
            self.notes["transport"] = {name: solved.get(name) for name in facts}
            return
        if self.recipe.transport.structure == "shared":
            self.notes["transport"] = solve_shared(self)
        else:
            self.notes["transport"] = solve_apart(self)
        found = self.notes["transport"]["relatedness"] = measure_relatedness(self)
        if found is not None:  # said before anything is fused
            self.step(NOTE, relatedness_words(found["value"], found["permuted"]), 1, 1, "notes")

    def _fuse(self) -> None:
        """Transport the selected neurons, and keep the run's record of its plans."""
        if self.notes["fuse"]:
            return
        settings, fusion = self.recipe.transport, self.recipe.fusion
        vocabulary = self.shared_vocabulary() if fusion.stream else None
        if fusion.stream and vocabulary is None:
            self.step(
                NOTE, "the two vocabularies differ: embeddings stay the target's, norms are carried", 1, 1, "notes"
            )
        inputs, seed = fusion_inputs(self), self.recipe.seed

        def shuffle(layer: int, key: str, neurons: int) -> Tensor:
            return torch.randperm(neurons, generator=control_generator(seed, "permuted", layer, key))

        carried = carry(
            self.layout("target"),
            self.layout("source"),
            inputs.pairs,
            inputs.couplings,
            inputs.statistics,
            fusion,
            settings,
            source_base=self.layout("source_base") if self.recipe.source_base else None,
            shuffle=shuffle if "permuted" in self.recipe.evaluation.controls else None,
            vocabulary=vocabulary,
            progress=lambda done, total: self.step("fuse", "transporting weights", done, total, "layers"),
        )
        self.transported, self.permuted = carried.transported, carried.permuted
        save_transported(carried.transported, self.run.cache / "transported.safetensors", self.keys["fuse"])
        save_transported(carried.permuted, self.run.cache / "permuted.safetensors", self.keys["fuse"])
        facts = {
            "schema": 1,
            "projections": self.check.projections,
            "keys": inputs.keys,
            "epsilon": settings.epsilon,
            "structure": settings.structure if self.plan is None else self.plan.record.facts.get("structure", "none"),
            "target": {"ref": self.recipe.target, "commit": self.commit("target")},
            "source": {"ref": self.recipe.source, "commit": self.commit("source")},
        }
        TransportRecord(facts, inputs.tensors | carried.tensors).save(self.run.transport_path)
        self.notes["fuse"] = {
            "norm_ratios": carried.norm_ratios,
            "layers": {name: list(coupling.target_layers) for name, coupling in inputs.couplings.items()},
            "biases": carried.biases,
            "stream": sorted({item.projection for item in carried.transported if group_of(item.projection) == STREAM}),
            **inputs.facts,
        }

    def _choose(self) -> None:
        """Alpha for each group of projections, on texts that serve nothing else."""
        if self.notes["choose"]:
            return
        texts, transported = self.cut(self.texts.choosing), self._transported()

        def score(what: str, rows: Sequence[int]) -> Scores:
            chosen = [texts[row] for row in rows]
            return self.score("target", "choose", f"choosing: {what}", chosen, finite=False)

        with without_unchanged_layers(self.model("target").model, unchanged_layers(transported)):
            choice = choose_alpha(
                self.layout("target").views,
                transported,
                self.recipe.fusion.alphas,
                score,
                len(texts),
                bootstrap=self.recipe.evaluation.bootstrap,
                seed=self.recipe.seed,
            )
        self.notes["choose"] = {"choice": choice.to_dict() | {"texts": len(texts)}, "forward_seconds": choice.seconds}

    def _alpha(self) -> Alpha:
        """As the recipe says, or as chosen."""
        alpha = self.recipe.fusion.alpha
        return self.notes["choose"]["choice"]["alpha"] if alpha == "auto" else alpha

    def _evaluate(self) -> None:
        if self.notes["evaluate"]:
            return
        layers, alpha = self.layout("target").views, self._alpha()
        fused = self._transported()
        candidates: dict[str, Callable[[], list[TransportedNeurons]]] = {
            "shrink": lambda: shrink(layers, fused),
            "noise": lambda: noise(layers, fused, self.recipe.seed),
            "permuted": self._permuted,
        }
        names, scores, forward = ("fused", *self.recipe.evaluation.controls), {}, 0.0
        if any(alpha_of(alpha, item.projection) for item in fused):
            with without_unchanged_layers(self.model("target").model, unchanged_layers(fused)):
                for name in names:
                    with applied(layers, fused if name == "fused" else candidates[name](), alpha):
                        result = self.score("target", "evaluate", f"{name}: held-out texts")
                    scores[name], forward = _note_scores(result), forward + result.seconds
        else:  # every one of them is the target, which was scored when it was read
            scores = dict.fromkeys(names, self.notes["target"]["scores"])
            self.step("evaluate", "nothing is fused: the scores are the target's", 1, 1, "models")
        self.notes["evaluate"] = {"scores": scores}
        if self.recipe.evaluation.descent:
            began = time.perf_counter()
            self.notes["evaluate"]["descent"] = self._descent(fused)
            forward += time.perf_counter() - began
        self.notes["evaluate"]["forward_seconds"] = forward

    def _descent(self, fused: list[TransportedNeurons]) -> dict[str, Any]:
        """The merge's direction against the loss's, on calibration texts."""
        texts, calibration = self.texts.texts[: self.recipe.evaluation.descent], self.recipe.calibration
        found = descent_cosines(
            self.model("target"),
            self.layout("target").layers,
            [item for item in fused if group_of(item.projection) != STREAM],
            texts,
            seed=self.recipe.seed,
            max_tokens=calibration.max_tokens,
            batch_tokens=calibration.batch_tokens,
            progress=lambda done, total: self.step("evaluate", "descent control", done, total, "texts"),
        )
        return {"texts": len(texts), "projections": {name: item.to_dict() for name, item in found.items()}}

    def _save(self) -> None:
        """Write the fused model beside the cache, compare it with the one in memory, then move it into place."""
        if self.notes["save"]:
            return
        target = self.model("target")
        dtype, computed = (str(of.dtype).removeprefix("torch.") for of in (target, target.model))
        self.loaded.pop("source", None)
        self.loaded.pop("source_base", None)
        fuse(self.layout("target").views, self._transported(), self._alpha())
        weights = self.publish("target", self.run, "save")
        self.notes["save"] = {"dtype": dtype, "computed_in": computed, "weights": weights}
        self.loaded.pop("target", None)

    def report(self) -> Report:
        """Write the report and the card, once all stages are finished."""
        resolved = self.resolved()
        write_text(self.run.work / "recipe.yaml", resolved.to_yaml())
        scores = {"base": self.notes["target"]["scores"], "source": self.notes["source"]["scores"]}
        scores |= self.notes["evaluate"]["scores"]
        report = build_report(resolved, self.check, self.notes, scores, library_versions(), self._devices())
        write_json(self.run.work / "report.json", report.to_dict())
        write_card(self.run, report, resolved)
        return report

    def _devices(self) -> str:
        """Where the models read, and, if that was elsewhere, where all else was computed."""
        read, here = self.notes["target"].get("device", str(self.device)), str(self.device)
        return here if read == here else f"{read} (transport and fusion: {here})"

    def _transported(self) -> list[TransportedNeurons]:
        if self.transported is None:
            self.transported = load_transported(self.run.cache / "transported.safetensors")
        return self.transported

    def _permuted(self) -> list[TransportedNeurons]:
        if self.permuted is None:
            self.permuted = load_transported(self.run.cache / "permuted.safetensors")
        return self.permuted


def _note_scores(scores: Scores) -> dict[str, Any]:
    """Exactly: a JSON float read back is the float that was written."""
    return {"bits": scores.bits.tolist(), "bytes": scores.bytes.tolist(), "tokens": scores.tokens}
