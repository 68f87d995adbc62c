"""Reading a model: its features over the calibration texts, and its score on the held-out ones."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tmerge.calibration import TextSet, capture
from tmerge.evaluation import Scores
from tmerge.models import Model, give_back_memory, head_facts
from tmerge.recipe import Recipe
from tmerge.recorded import RecordedRun
from tmerge.stages.learned_weights import LearnedWeights
from tmerge.stages.notes import ReadNote, ScoreNote
from tmerge.stages.scoring import held_out, opened, reading, score, unit
from tmerge.stages.source_weights import SourceWeights
from tmerge.stages.step import Progress

__all__ = ["Read"]


@dataclass(frozen=True)
class Read:
    """The stages ``target`` and ``source``.

    Attributes:
        name: The model's role.
        recipe: Of the run.
        model: To be read.
        texts: To read and to score it on.
        projections: Whose features are wanted.
        folder: Of the features.
        recorded: A recorded transport, with which the model is scored alone.
        kept: Of a model that is fused from: its weights, which outlive it. The model is let go then.
        let_go: Whether it is let go too where it has been read, to leave room for another.
        scored: What is scored in its place, after it: a source with the adapter that its base alone is read for.
    """

    name: str
    recipe: Recipe
    model: Model
    texts: TextSet
    projections: list[str]
    folder: Path
    recorded: RecordedRun | None
    kept: SourceWeights | LearnedWeights | None = None
    let_go: bool = False
    scored: Model | None = None

    note = ReadNote
    together = True

    def inputs(self) -> dict[str, Any]:
        """What decides the features and the scores."""
        texts, calibration = self.texts, self.recipe.calibration
        return {
            "texts": texts.sha256,
            # Where in the texts the tokens are read, which both tokenizers decide.
            **({"ends": texts.ends} if texts.ends else {}),
            **({"other": texts.other} if texts.other else {}),
            "commit": self.model.commit,
            **({} if self.scored is None else {"scored": self.scored.commit}),
            "dtype": self.recipe.dtype,
            "device": self.recipe.device,
            "projections": self.projections,
            "max_tokens": calibration.max_tokens,
            "batch_tokens": calibration.batch_tokens,
            "held_out": self.recipe.evaluation.texts,
            "plan": None if self.recorded is None else self.recorded.key,
        }

    def do(self, key: str, progress: Progress) -> ReadNote:
        """Load, read and score it."""
        note = self._read(key, progress)
        if (kept := self.kept) is not None:
            progress.processes.from_first(lambda: kept.keep(progress))
        if self.kept is not None or self.let_go:
            self.model.release()
            give_back_memory()
        return note

    def _read(self, key: str, progress: Progress) -> ReadNote:
        if self.recorded is not None:
            return self._score_alone(self.recorded, progress)
        loaded = opened(self.model, progress)
        views = self.model.views
        captured = capture(
            loaded,
            views,
            self.texts.matched_on,
            self.projections,
            self.folder,
            max_tokens=self.recipe.calibration.max_tokens,
            batch_tokens=self.recipe.calibration.batch_tokens,
            key=key,
            ends=self.texts.ends or None,
            processes=progress.processes,
            progress=progress.counting(f"{self.name}: reading features", unit(loaded)),
            note=progress.note,
            room=progress.room,
        )
        heads = head_facts(loaded.model, views)
        del loaded, views
        scores = self._score(progress)
        return ReadNote(
            scores=ScoreNote.of(scores),
            tokens=captured.tokens,
            truncated=captured.truncated,
            forward_seconds=captured.forward_seconds + scores.seconds,
            heads=heads,
        )

    def _score_alone(self, recorded: RecordedRun, progress: Progress) -> ReadNote:
        scores, read = self._score(progress), recorded.report.calibration
        return ReadNote(
            scores=ScoreNote.of(scores),
            tokens=getattr(read.tokens, self.name),
            truncated=getattr(read.truncated, self.name),
            forward_seconds=scores.seconds,
        )

    def _score(self, progress: Progress) -> Scores:
        texts, what = held_out(self.recipe, self.texts), f"{self.name}: held-out texts"
        if self.scored is None:
            return score(self.recipe, opened(self.model, progress), texts, progress, what)
        self.model.release()
        give_back_memory()
        with reading(self.scored, progress) as joined:
            return score(self.recipe, joined, texts, progress, what)
