"""What the stages of a run share: its two models, loaded once and let go, its texts, and who hears of progress."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from tmerge.calibration import DatasetRecord, TextSet, common_ends, pinned, token_limit
from tmerge.errors import DatasetError
from tmerge.evaluation import Scores, score_texts
from tmerge.models import (
    Architecture,
    LoadedModel,
    describe,
    file_digest,
    load_model,
    load_tokenizer,
    pick_device,
    save_checkpoint,
    trusts,
    verify_checkpoint,
)
from tmerge.preflight.check import Check, check
from tmerge.recipe import CalibrationSettings, Recipe
from tmerge.recorded import RecordedRun
from tmerge.report import library_versions, peak_memory
from tmerge.run import Run, stage_key

__all__ = ["NOTE", "STAGES", "Listener", "Session", "Step"]

STAGES = ("texts", "target", "source", "transport", "fuse", "evaluate", "save")
NOTE = "note"
"""The stage of a `Step` that only says something, before the work begins."""
# Characters of a held-out text that are scored, per token that calibration reads; one cut for all models.
_SCORED_CHARACTERS = 4
_NEARLY_ALL = 0.9


@dataclass(frozen=True)
class Step:
    """One step of progress.

    Attributes:
        stage: One of `STAGES`, or ``choose`` (between fuse and evaluate) where alpha is ``auto``; or `NOTE`.
        what: In words: what is being done.
        done: Units done.
        total: Units in all.
        unit: ``texts``, ``layers``, ...
        row: For the transport stage, (feature key, target layer, its (M,) transport costs).
    """

    stage: str
    what: str
    done: int
    total: int
    unit: str
    row: tuple[str, int, Tensor] | None = None


Listener = Callable[[Step], None]


class Session:
    """One run at work.

    Attributes:
        recipe: As asked for.
        run: Its folder.
        loaded: Role (``target``, ``source``, ``source_base``) -> model, while it is needed.
        texts: The calibration set, once it has been read.
        notes: Stage -> what it noted.
        keys: Stage -> what decides its result, hashed.
    """

    texts: TextSet

    def __init__(self, recipe: Recipe, run: Run, listener: Listener) -> None:
        self.recipe, self.run, self.listener = recipe, run, listener
        self.loaded: dict[str, LoadedModel] = {}
        self.notes: dict[str, dict[str, Any]] = {}
        self.keys: dict[str, str] = {}

    @cached_property
    def check(self) -> Check:
        """What the two configs say."""
        return check(self.recipe)

    @cached_property
    def plan(self) -> RecordedRun | None:
        """Another run, whose recorded transport is fused from, where the recipe names one."""
        return None if self.recipe.plan is None else RecordedRun(self.recipe.plan)

    @property
    def plan_key(self) -> str | None:
        """What identifies that transport."""
        return None if self.plan is None else self.plan.key

    @cached_property
    def data(self) -> dict[str, str]:
        """The calibration's datasets -> what identifies their contents; a recorded plan needs none to match on."""
        settings = self.recipe.calibration
        other = [] if settings.match_on is None or self.plan is not None else [settings.match_on]
        record = DatasetRecord(self.run.cache / "data.json", lambda words: self.step(NOTE, words, 1, 1, "notes"))
        found = record.identify([settings.dataset, *other])
        record.save()
        return found

    def calibration(self) -> CalibrationSettings:
        """The recipe's, with its Hub datasets at the commits that were identified."""
        settings = self.recipe.calibration
        names = {"dataset": settings.dataset, "match_on": settings.match_on}
        read = {key: pinned(name, self.data[name]) for key, name in names.items() if name in self.data}
        return settings.model_copy(update=read)

    def refuse_changed(self, texts: TextSet) -> None:
        """Refuse texts of a file that was written to between being identified and being read.

        Raises:
            DatasetError: One was.
        """
        settings = self.recipe.calibration
        for name, digest in ((settings.dataset, texts.file_sha256), (settings.match_on, texts.other_sha256)):
            if digest is not None and self.data[str(name)] != f"sha256:{digest}":
                raise DatasetError(f"dataset {name!r} changed while it was read; start again when it is written")

    @cached_property
    def device(self) -> torch.device:
        """Where the models run."""
        return pick_device(self.recipe.device)

    def step(
        self, stage: str, what: str, done: int, total: int, unit: str, row: tuple[str, int, Tensor] | None = None
    ) -> None:
        """Tell the listener of a step."""
        self.listener(Step(stage, what, done, total, unit, row))

    @contextmanager
    def stage(self, name: str, **facts: Any) -> Iterator[None]:
        """Time a stage and note that it finished; the work inside does nothing where there is a note of it already."""
        self.keys[name] = key = stage_key(name, versions=library_versions(), **facts)
        self.notes[name] = self.run.finished(name, key) or {}
        if self.notes[name]:
            yield
            return
        began = time.perf_counter()
        yield
        note = self.notes[name]
        note["seconds"] = time.perf_counter() - began
        note.setdefault("forward_seconds", 0.0)
        note["peak_rss_bytes"] = peak_memory()
        note["device"] = str(self.device)
        self.run.finish(name, key, note)

    def commit(self, role: str) -> str:
        """What identifies a role's model: a Hub commit, or the digest of local files."""
        facts = {"target": self.check.target, "source": self.check.source, "source_base": self.check.base}[role]
        assert facts is not None and facts.commit is not None  # `check` sees to it
        return facts.commit

    def model_facts(self, role: str) -> dict[str, Any]:
        """What decides a model's features and scores, beside the texts."""
        calibration = self.recipe.calibration
        return {
            "commit": self.commit(role),
            "dtype": self.recipe.dtype,
            "device": self.recipe.device,
            "projections": self.check.projections,
            "max_tokens": calibration.max_tokens,
            "batch_tokens": calibration.batch_tokens,
            "held_out": self.recipe.evaluation.texts,
            "plan": self.plan_key,
        }

    def model(self, role: str) -> LoadedModel:
        """A model, loaded once and kept until it has served."""
        if role not in self.loaded:
            reference = getattr(self.recipe, role)
            stage = role if role in STAGES else "fuse"
            self.step(stage, f"loading {reference}", 0, 1, "models")
            self.loaded[role] = load_model(
                reference,
                dtype=self.recipe.dtype,
                device=self.recipe.device,
                trust_remote_code=trusts(self.recipe.trust_remote_code, reference),
                revision_override=_revision(self.commit(role)),
                widen=True,
            )
        return self.loaded[role]

    def tokenizer(self, role: str) -> PreTrainedTokenizerBase:
        """A model's tokenizer, without its weights."""
        reference = getattr(self.recipe, role)
        return load_tokenizer(
            reference,
            trust_remote_code=trusts(self.recipe.trust_remote_code, reference),
            revision_override=_revision(self.commit(role)),
        )

    def common_ends(self) -> tuple[tuple[int, ...], ...]:
        """Where in each calibration text both models are read, where features are of single tokens."""
        calibration = self.recipe.calibration
        return common_ends(
            self.tokenizer("target"),
            self.tokenizer("source"),
            self.texts.matched_on,
            limits=(
                token_limit(self.check.target.config.get_text_config(), calibration.max_tokens),
                token_limit(self.check.source.config.get_text_config(), calibration.max_tokens),
            ),
            wanted=calibration.token_rows if calibration.rows == "tokens" else None,
            seed=self.recipe.seed,
        )

    def shared_vocabulary(self) -> Tensor | None:
        """Tokens that are in both models' tokenizers and have a row in both models' embeddings.

        Returns:
            (2, V) int64, each token's id in the target and in the source, ascending in the target's: a vocabulary that
            was trimmed, extended or put in another order is still one. None where they are not nearly all of the
            smaller vocabulary: then the two have words in common as any two have.
        """
        mine, theirs = (self.tokenizer(role).get_vocab() for role in ("target", "source"))
        sizes = [int(facts.config.get_text_config().vocab_size) for facts in (self.check.target, self.check.source)]
        common = sorted((place, theirs[token]) for token, place in mine.items() if token in theirs)
        kept = [pair for pair in common if pair[0] < sizes[0] and pair[1] < sizes[1]]
        if not kept or len(kept) < _NEARLY_ALL * min(len(mine), len(theirs)):
            return None
        return torch.tensor(kept).T.contiguous()

    def layout(self, role: str) -> Architecture:
        """The projections of a loaded model."""
        loaded = self.model(role)
        return describe(loaded.model, rounded_to=loaded.dtype)

    def feature_folder(self, role: str) -> Path:
        """Where a model's features are."""
        return self.run.cache / "features" / role

    def publish(self, role: str, run: Run, stage: str) -> dict[str, str]:
        """Write a model beside a run's cache, compare it with the one in memory, then move it into the run's folder.

        Returns:
            File name -> SHA-256 (hex) of every weights file.
        """
        loaded = self.loaded[role]
        self.step(stage, "writing the checkpoint", 0, 2, "steps")
        fresh = run.cache / "checkpoint"
        shutil.rmtree(fresh, ignore_errors=True)
        fresh.mkdir()
        save_checkpoint(loaded, fresh, max_shard_size=self.recipe.save.max_shard_size)
        self.step(stage, "comparing the saved checkpoint with the model in memory", 1, 2, "steps")
        verify_checkpoint(fresh, loaded, self.held_out()[:4])
        weights = {path.name: file_digest(path) for path in sorted(fresh.glob("*.safetensors"))}
        # The config goes last: a folder without it is not mistaken for a whole checkpoint.
        for path in sorted(fresh.iterdir(), key=lambda path: (path.name == "config.json", path.name)):
            path.chmod(0o644)  # safetensors makes files for their owner alone
            os.replace(path, run.folder / path.name)
        fresh.rmdir()
        self.step(stage, "comparing the saved checkpoint with the model in memory", 2, 2, "steps")
        return weights

    def resolved(self) -> Recipe:
        """The recipe with Hub references pinned to the commits that were read."""
        pinned = {}
        for role in ("target", "source", "source_base"):
            reference = getattr(self.recipe, role)
            if reference is not None:
                pinned[role] = _pin(reference, self.commit(role))
        if self.plan is not None:
            pinned["plan"] = self.plan.found.name
        data = self.recipe.model_dump(mode="json") | pinned
        if self.texts.revision is not None:
            name = self.recipe.calibration.dataset.partition("@")[0]
            data["calibration"]["dataset"] = f"{name}@{self.texts.revision}"
        if self.texts.other_dataset is not None:
            data["calibration"]["match_on"] = self.texts.other_dataset
        return Recipe.from_mapping(data)

    def held_out(self) -> list[str]:
        """The texts that decide the verdict, cut to one length for all models."""
        return self.cut(self.texts.held_out)

    def cut(self, texts: Sequence[str]) -> list[str]:
        """At most as many texts as are scored, cut to one length for all models."""
        limit = _SCORED_CHARACTERS * self.recipe.calibration.max_tokens
        return [text[:limit] for text in texts[: self.recipe.evaluation.texts]]

    def score(
        self, role: str, stage: str, what: str, texts: Sequence[str] | None = None, *, finite: bool = True
    ) -> Scores:
        """Score a model, as it is in memory now, on the held-out texts, or on others."""
        return score_texts(
            self.model(role),
            self.held_out() if texts is None else texts,
            batch_tokens=self.recipe.calibration.batch_tokens,
            finite=finite,
            progress=lambda done, total: self.step(stage, what, done, total, "texts"),
        )


def _revision(commit: str) -> str | None:
    """The Hub commit to load, so that a repo that moves after the check is not mixed up; None for local models."""
    return None if commit.startswith("sha256:") else commit


def _pin(reference: str, commit: str) -> str:
    """A Hub reference at its commit; what is local stays as it was written."""
    return reference if commit.startswith("sha256:") else f"{reference.partition('@')[0]}@{commit}"
