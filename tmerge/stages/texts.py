"""The calibration set: read once, split by hash before anything sees it, and kept in the run's cache."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tmerge.calibration import TextSet, common_ends, of_another, other_texts, pinned, read_texts, token_limit
from tmerge.errors import DatasetError
from tmerge.models import Model, refuse_without_rows
from tmerge.recipe import READING_AT_ENDS, CalibrationSettings, Recipe, Reconstruction
from tmerge.report import TrainingTexts
from tmerge.run import Run
from tmerge.stages.notes import TextsNote
from tmerge.stages.step import Progress

__all__ = ["Texts", "kept_texts", "training_texts"]


def kept_texts(recipe: Recipe, run: Run) -> TextSet | None:
    """Those on which a reconstruction is to leave the target as it is; None without any.

    Raises:
        DatasetError: They are no longer there, or damaged.
    """
    return None if recipe.fusion.kept_on is None else TextSet.load(run.kept_texts_path)


def training_texts(texts: TextSet, kept: TextSet | None) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """What is trained on after a merge, and each text's prompt: what the merge read, the texts to be kept among it."""
    if kept is None:
        return texts.texts, texts.prompts
    return texts.texts + kept.texts, texts.prompts + kept.prompts


@dataclass(frozen=True)
class Texts:
    """The stage ``texts``.

    Attributes:
        recipe: Of the run.
        target: Its tokenizer's chat template shapes conversations.
        source: Read where both tokenizers have to agree on token positions.
        data: The recipe's datasets of texts -> what identifies their contents.
        choosing: Whether texts are kept apart to choose on: alpha, and a reconstruction's ridges.
        recorded: Whether a recorded transport is used: then nothing is matched, and no features are read.
        path: Of the `TextSet`.
        kept_path: Of the one that a reconstruction is to leave the target as it is on.
    """

    recipe: Recipe
    target: Model
    source: Model
    data: Mapping[str, str]
    choosing: bool
    recorded: bool
    path: Path
    kept_path: Path

    name = "texts"
    note = TextsNote
    together = False

    def inputs(self) -> dict[str, Any]:
        """What decides the texts."""
        calibration, ends = self.recipe.digest("calibration", "seed"), {}
        if self.recipe.calibration.rows != "texts":
            # Where both tokenizers agree depends on both.
            calibration, ends = calibration + self.source.commit, {"ends": READING_AT_ENDS}
        return {
            "recipe": calibration,
            **ends,
            "target": self.target.commit,
            "choosing": self.choosing,
            "data": dict(self.data),
            **({} if self._keeping is None else {"keep": list(self._keeping)}),
        }

    def do(self, key: str, progress: Progress) -> TextsNote:
        """Read and split them."""
        progress.step("reading the calibration set", 0, 1, "datasets")
        settings, seed = self._pinned(), self.recipe.seed
        # So that the lack of one is seen before anything is kept.
        self.ahead()
        tokenizer = self.target.tokenizer
        texts = read_texts(
            settings, seed=seed, choosing=settings.choosing if self.choosing else 0.0, chat_tokenizer=tokenizer
        )
        if settings.match_on is not None and not self.recorded:
            kept_away = texts.choosing + texts.held_out
            texts = replace(texts, **other_texts(settings, kept_away, seed=seed, chat_tokenizer=tokenizer))
        self._refuse_changed({settings.dataset: texts.file_sha256, settings.match_on: texts.other_sha256})
        kept = self._kept(texts)
        self._refuse_unreadable(texts, kept)
        if settings.rows != "texts" and not self.recorded:
            texts = replace(texts, ends=self._common_ends(texts))
        texts.save(self.path)
        if kept is not None:
            kept.save(self.kept_path)
        progress.step("reading the calibration set", 1, 1, "datasets")
        return TextsNote(
            texts=TrainingTexts.model_validate(texts.to_dict()),
            kept=None if kept is None else TrainingTexts.model_validate(kept.to_dict()),
        )

    def ahead(self) -> None:
        """Read both tokenizers, which of a GGUF file takes seconds: they are kept with their models."""
        _ = self.target.tokenizer, self.source.tokenizer

    @property
    def _keeping(self) -> tuple[str, int] | None:
        """The dataset of texts that a reconstruction is to leave the target as it is on, and how many."""
        fusion = self.recipe.fusion
        if not isinstance(fusion, Reconstruction) or fusion.keep is None:
            return None
        return fusion.keep, fusion.keep_texts

    def _kept(self, texts: TextSet) -> TextSet | None:
        """Those texts; none of which chooses alpha or decides the verdict."""
        if self._keeping is None:
            return None
        dataset, count = self._keeping
        read = of_another(self.recipe.calibration, pinned(dataset, self.data[dataset]))
        read = read.model_copy(update={"texts": count})
        seed, tokenizer = self.recipe.seed, self.target.tokenizer
        # A ridge is chosen on some of them too: it would be chosen at their cost.
        choosing = read.choosing if "fusion.ridge" in self.recipe.fusion.chosen else 0.0
        kept = read_texts(
            read, seed=seed, choosing=choosing, chat_tokenizer=tokenizer, key="fusion.keep_texts", further=True
        )
        self._refuse_changed({dataset: kept.file_sha256})
        return kept.without((*texts.choosing, *texts.held_out))

    def _pinned(self) -> CalibrationSettings:
        """The recipe's, with its Hub datasets at the commits that were identified."""
        settings = self.recipe.calibration
        named = {"dataset": settings.dataset}
        if settings.match_on is not None and settings.match_on in self.data:
            named["match_on"] = settings.match_on
        return settings.model_copy(update={key: pinned(name, self.data[name]) for key, name in named.items()})

    def _refuse_changed(self, read: Mapping[str | None, str | None]) -> None:
        """Refuse texts of a file that was written to between being identified and being read."""
        for name, digest in read.items():
            if digest is not None and self.data[str(name)] != f"sha256:{digest}":
                raise DatasetError(f"dataset {name!r} changed while it was read; start again when it is written")

    def _refuse_unreadable(self, texts: TextSet, kept: TextSet | None) -> None:
        """Refuse texts that one of the models has no row of its embedding for, before its weights are read."""
        read = [*texts.texts, *texts.held_out, *texts.choosing, *texts.other]
        read += [] if kept is None else [*kept.texts, *kept.held_out, *kept.choosing]
        for model in (self.target, self.source):
            refuse_without_rows(model.reference, model.tokenizer, model.vocabulary_rows, read)

    def _common_ends(self, texts: TextSet) -> tuple[tuple[int, ...], ...]:
        """Where in each text both models are read, where features are of single tokens."""
        settings = self.recipe.calibration
        limits = [
            token_limit(model.facts.config.get_text_config(), settings.max_tokens)
            for model in (self.target, self.source)
        ]
        return common_ends(
            self.target.tokenizer,
            self.source.tokenizer,
            texts.matched_on,
            limits=(limits[0], limits[1]),
            wanted=settings.token_rows if settings.rows == "tokens" else None,
            seed=self.recipe.seed,
        )
