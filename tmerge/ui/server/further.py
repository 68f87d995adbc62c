"""What may be done here with a finished merge: a training on top of it, or its comparison with trainings."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from tmerge.comparison.compare import compare
from tmerge.comparison.inputs import merge_recipe
from tmerge.errors import NotEnoughMemoryError, RecipeError, RunNotFoundError
from tmerge.models.device import available_memory
from tmerge.quantities import bytes_words
from tmerge.recipe import Recipe
from tmerge.report import Report
from tmerge.run import Run
from tmerge.stages.adapt import adapt_run
from tmerge.ui.server.limits import AppSettings, operations_words
from tmerge.ui.server.visitor_run import Further, Way

__all__ = ["MOST_STEPS", "go_further", "refuse_for_memory", "refuse_further"]

MOST_STEPS = 1000
"""Most optimiser steps of a training that is started in the app."""


def refuse_further(report: Report, recipe: Recipe, steps: int, way: Way, settings: AppSettings) -> None:
    """Refuse what cannot be done, or takes longer than a merge may.

    Args:
        report: Of the merge.
        recipe: Likewise.
        steps: Of the optimiser, in every training.
        way: What is asked for.
        settings: What the app allows.

    Raises:
        RecipeError: With what it takes and what is allowed.
    """
    if not 1 <= steps <= MOST_STEPS:
        raise RecipeError(f"{steps} steps cannot be trained here; choose from 1 to {MOST_STEPS}")
    if way == "compare" and report.sources:
        raise RecipeError(f"a comparison takes one source, and this merge has {len(report.sources)}; name one of them")
    operations = _operations(report, recipe, steps, way)
    if operations > settings.max_operations:
        raise RecipeError(
            f"{_what(way)} of {steps} steps takes up to {operations_words(operations)}, where this app takes "
            f"{operations_words(settings.max_operations)}; choose fewer, or run it {_own(way)}"
        )


def refuse_for_memory(report: Report, recipe: Recipe, folder: Path, way: Way) -> None:
    """Refuse what takes more memory than is free now, as `refuse_further`.

    Args:
        report: Of the merge.
        recipe: Likewise.
        folder: Likewise; its config says how many tokens the vocabulary has.
        way: What is asked for.

    Raises:
        NotEnoughMemoryError: With what it takes and what is free.
        RunNotFoundError: The merge's files are gone.
    """
    needed, free = _memory(report, recipe, folder, way), available_memory(torch.device("cpu"))
    if needed > free:
        raise NotEnoughMemoryError(
            f"{_what(way)} needs about {bytes_words(needed)} of memory, where {bytes_words(free)} are free; run it "
            f"{_own(way)}"
        )


def _what(way: Way) -> str:
    return "a comparison with trainings" if way == "compare" else "a training"


def _own(way: Way) -> str:
    return f"on your own machine with tmerge {'compare' if way == 'compare' else 'adapt'}"


def _operations(report: Report, recipe: Recipe, steps: int, way: Way) -> float:
    """6 for a parameter and a token that is trained on (a forward and a backward pass), 2 for one that is only read.

    Texts are as long as they may be. Where the source is the teacher, it reads all calibration texts. A comparison's
    merge is evaluated anew where it did not ask whether the merge points downhill, which takes backward passes.
    """
    asked, target, source = recipe.adaptation, report.target.parameters, report.source.parameters
    training = 6.0 * target * steps * asked.batch_size * asked.accumulation * asked.max_tokens
    teaching = 2.0 * source * report.calibration.texts * asked.max_tokens
    if way != "compare":
        return training + teaching * (way == "distill")
    compared = recipe.compare
    trained = len(compared.seeds) * sum(training + teaching * row.endswith("distill") for row in compared.rows)
    still = 2 + len(recipe.evaluation.controls) + 3 * len(compared.alphas)
    models = (still + len(compared.seeds) * len(compared.rows)) * target + source
    read, downhill = 2.0 * models * report.evaluation.texts, 0.0
    if not recipe.evaluation.descent:
        read += 2.0 * (1 + len(recipe.evaluation.controls)) * target * report.evaluation.texts
        downhill = 6.0 * target * merge_recipe(recipe).evaluation.descent
    return trained + (read + downhill) * recipe.calibration.max_tokens


def _memory(report: Report, recipe: Recipe, folder: Path, way: Way) -> int:
    """Bytes: the weights, their gradients and AdamW's two means in float32, and three copies of a batch's logits.

    A comparison's teacher is in memory as a whole.
    """
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except OSError as error:
        # It may have been swept since it was found.
        raise RunNotFoundError(f"the merge's files cannot be read ({error.strerror}); start it again") from None
    vocabulary = config.get("vocab_size") or config.get("text_config", {}).get("vocab_size", 0)
    logits = 3 * 4 * recipe.adaptation.batch_size * recipe.adaptation.max_tokens * vocabulary
    teacher = 4 * report.source.parameters if way == "compare" else 0
    return 16 * report.target.parameters + logits + teacher


def go_further(further: Further, recipe: Recipe, folder: Path, call: Callable[[Callable[..., Any]], Any]) -> Report:
    """Do it, or take it up where it stopped.

    Args:
        further: What.
        recipe: The merge's.
        folder: Where a training goes; a comparison is in the folder that its merge is in.
        call: Calls a function with a listener, in the run's process.

    Returns:
        Of the training, or of the merge that was compared.
    """
    if further.way != "compare":
        trained: Report = call(
            partial(adapt_run, further.merged, folder, {"steps": further.steps, "objective": further.way})
        )
        return trained
    adaptation = recipe.adaptation.model_copy(update={"steps": further.steps})
    compared = recipe.model_copy(update={"adaptation": adaptation})
    # What the merge has finished is not done again.
    Run(further.merged).take_over(merge_recipe(compared))
    call(partial(compare, compared, further.merged.parent))
    return Run(further.merged).report()
