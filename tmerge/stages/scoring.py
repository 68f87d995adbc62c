"""Which texts a run's models are scored on, and how: the same for target, source, fused and controls."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from tmerge.calibration import TextSet
from tmerge.evaluation import Scores, score_texts
from tmerge.models import LoadedModel, Model, give_back_memory, pick_device
from tmerge.models.agreed import least_share
from tmerge.recipe import Recipe
from tmerge.stages.step import Progress

__all__ = ["cut", "held_out", "load", "opened", "reading", "score", "unit"]

# Characters of a held-out text that are scored, per token that calibration reads; one cut for all models.
_SCORED_CHARACTERS = 4


def load(model: Model, progress: Progress) -> LoadedModel:
    """A model in memory; that it is being loaded is said, as it takes its time."""
    if not model.is_loaded:
        progress.step(f"loading {model.reference}", 0, 1, "models")
    return model.load()


def opened(model: Model, progress: Progress) -> LoadedModel:
    """A model to be read, in memory or by blocks, whatever `Model.open` finds fit.

    Where several processes do the stage all of them open it, in the same way.
    """
    free = None
    if model.memory == "auto":
        # Asked whether it is open or not, as it may be in some of them: all come here.
        free = least_share(pick_device(model.device), progress.processes)
    if not model.is_open:
        progress.step(f"opening {model.reference}", 0, 1, "models")
        if model.open(free).block_weights is not None:
            progress.note(f"{model.reference} is read block by block, as it does not fit in memory or memory says so")
    return model.open()


@contextmanager
def reading(model: Model, progress: Progress) -> Iterator[LoadedModel]:
    """As `opened`, and let go afterwards."""
    try:
        yield opened(model, progress)
    finally:
        model.release()
        give_back_memory()


def unit(loaded: LoadedModel) -> str:
    """Of what is counted while a model reads."""
    return "texts" if loaded.block_weights is None else "blocks"


def cut(recipe: Recipe, texts: Sequence[str]) -> list[str]:
    """At most as many texts as are scored, cut to one length for all models."""
    limit = _SCORED_CHARACTERS * recipe.calibration.max_tokens
    return [text[:limit] for text in texts[: recipe.evaluation.texts]]


def held_out(recipe: Recipe, texts: TextSet) -> list[str]:
    """The texts that decide the verdict."""
    return cut(recipe, texts.held_out)


def score(
    recipe: Recipe, model: LoadedModel, texts: Sequence[str], progress: Progress, what: str, *, finite: bool = True
) -> Scores:
    """Score a model, as it is in memory now; see `score_texts`.

    Args:
        recipe: Of the run.
        model: To be scored.
        texts: From `held_out` or `cut`.
        progress: Hears of it.
        what: Is being scored, in words.
        finite: Whether a score that is not finite is refused.
    """
    return score_texts(
        model,
        texts,
        batch_tokens=recipe.calibration.batch_tokens,
        finite=finite,
        processes=progress.processes,
        progress=progress.counting(what, unit(model)),
        note=progress.note,
        room=progress.room,
    )
