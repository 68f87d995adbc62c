"""How many texts a run reads, and for what, as far as that is known before any of them is read."""

from __future__ import annotations

from dataclasses import dataclass

from tmerge.calibration import SAMPLES_PREFIX, sample_texts
from tmerge.recipe import Recipe

__all__ = ["TOKENS_PER_TEXT", "TextCounts"]

TOKENS_PER_TEXT = 64
"""What an estimate assumes of texts that it has not read."""


@dataclass(frozen=True)
class TextCounts:
    """Texts of a run.

    Attributes:
        texts: All.
        held_out: That decide the verdict.
        apart: That serve to choose.
        fitted: That a reconstruction is fitted on; those on which ridges are chosen pass beside them.
        read: Whose features are taken; none with another run's plan, where the models only read what is held out.
        tokens_per_text: Of each.
        rows: Of the features.
    """

    texts: int
    held_out: int
    apart: int
    fitted: int
    read: int
    tokens_per_text: int
    rows: int

    @classmethod
    def of(cls, recipe: Recipe) -> TextCounts:
        """Those of a recipe's run."""
        texts = _most_texts(recipe.calibration.dataset, recipe.calibration.texts)
        held_out = min(recipe.evaluation.texts, round(texts * recipe.calibration.held_out))
        apart = round((texts - held_out) * recipe.calibration.choosing) if recipe.fusion.chosen else 0
        fitted = texts - held_out - (0 if "fusion.ridge" in recipe.fusion.chosen else apart)
        read = texts - held_out - apart
        if recipe.calibration.match_on is not None:
            read = _most_texts(recipe.calibration.match_on, recipe.calibration.texts)
        if recipe.plan is not None:
            read = 0
        tokens = min(recipe.calibration.max_tokens, TOKENS_PER_TEXT)
        by_token = recipe.calibration.rows == "tokens"
        rows = min(recipe.calibration.token_rows, read * tokens) if by_token else read
        return cls(texts, held_out, apart, fitted, read, tokens, rows)


def _most_texts(dataset: str, wanted: int) -> int:
    """As many as are asked for, or as the built-in samples have."""
    if not dataset.startswith(SAMPLES_PREFIX):
        return wanted
    return min(wanted, len(sample_texts(dataset.removeprefix(SAMPLES_PREFIX))))
