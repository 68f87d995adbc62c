"""What each stage notes of what it did: typed, frozen, and the same after it was written to the run's cache and read.

A note is made once, by the stage that measured what is in it; the stages after it, the report, `adapt` and `compare`
read it and nothing else of that stage but its files.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict

from tmerge.evaluation import Scores
from tmerge.fusion import FinalGoal
from tmerge.report import Choice, Descent, Relatedness, SavedAdapter, TrainingTexts

__all__ = [
    "CarriedNote",
    "ChooseNote",
    "EvaluateNote",
    "FuseNote",
    "Note",
    "ReadNote",
    "ReconstructNote",
    "SaveNote",
    "ScoreNote",
    "TextsNote",
    "TransportNote",
]


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True)


class Note(_Frozen):
    """Of any stage.

    Attributes:
        forward_seconds: Of the models' forward passes in it.
    """

    forward_seconds: float = 0.0


class ScoreNote(_Frozen):
    """Scores of a model, exactly: a JSON float read back is the float that was written.

    Attributes:
        bits: -log2 probability of every text.
        bytes: Its length in UTF-8.
        tokens: Scored in all.
    """

    bits: list[float]
    bytes: list[float]
    tokens: int

    @classmethod
    def of(cls, scores: Scores) -> ScoreNote:
        """What is kept of scores."""
        return cls(bits=scores.bits.tolist(), bytes=scores.bytes.tolist(), tokens=scores.tokens)

    def scores(self) -> Scores:
        """As they were, but for the time that they took."""
        bits, sizes = (torch.tensor(values, dtype=torch.float64) for values in (self.bits, self.bytes))
        return Scores(bits, sizes, self.tokens, 0.0)


class TextsNote(Note):
    """Of the calibration set; the texts themselves are in the run's cache.

    Attributes:
        texts: What was read, and how it was split.
        kept: Likewise, of the texts that a reconstruction is to leave the target as it is on; None without any.
    """

    texts: TrainingTexts
    kept: TrainingTexts | None = None


class ReadNote(Note):
    """Of a model that was read for its features and scored.

    Attributes:
        scores: On the held-out texts.
        tokens: Read for the features.
        truncated: Texts of which the end was not read.
        heads: Layer -> how its attention heads divide (`head_facts`); None where a recorded transport is used.
    """

    scores: ScoreNote
    tokens: int
    truncated: int
    heads: dict[str, Any] | None = None


class TransportNote(Note):
    """Of the problems that were solved.

    Attributes:
        problems: How many.
        iterations: ``median`` and ``max`` over them.
        worst_marginal_violation: Largest over them.
        converged: How many reached the tolerance.
        weights: Whether neurons were matched by their weights too.
        in_place: Share of the target's neurons that are matched with the source's of the same number; None where the
            two are not of one shape, or no one correspondence was solved.
        relatedness: None where it cannot be asked.
    """

    problems: int
    iterations: dict[str, int]
    worst_marginal_violation: float
    converged: int
    weights: bool = False
    in_place: float | None = None
    relatedness: Relatedness | None = None


class CarriedNote(_Frozen):
    """Of one source's weights that were transported; as `FuseNote`.

    Attributes:
        norm_ratios: As there.
        biases: Likewise.
        stream: Likewise.
    """

    norm_ratios: dict[str, list[float | None]]
    biases: dict[str, str]
    stream: list[str]


class FuseNote(Note):
    """Of the weights that were transported.

    Attributes:
        norm_ratios: Projection -> per layer, the transported rows' norm to the target's own; None where that is zero.
            Of several sources, of all of them joined at strength 1.
        by_source: Of several sources, name -> the same of each.
        layers: Projection -> the target's layers that have it.
        biases: Projection -> what became of its biases.
        stream: Names of what else was carried: embeddings, head and norms.
        eta: The layer problem's regularisation, as used.
        layer_plans_converged: Whether the layer problems reached the tolerance.
    """

    norm_ratios: dict[str, list[float | None]]
    layers: dict[str, list[int]]
    biases: dict[str, str]
    stream: list[str]
    eta: Any
    layer_plans_converged: Any
    by_source: dict[str, dict[str, list[float | None]]] = {}


class ReconstructNote(FuseNote):
    """Of weights that were fitted; a ratio is that of the change's norm to the target's own.

    Attributes:
        errors: Projection -> per layer, ``|Y - X W^T|^2 / |Y|^2`` before and after its fit; None where Y is zero.
        ridges: Projection -> per layer, the lambda that its fit took.
        rows: Tokens that were fitted on, those of `keep_texts` too.
        fit_seconds: That it took, in all calls, and without what the controls took.
        final_goal: What the last block was fitted to: ``logits`` or ``stream``.
        keep: The dataset of texts that are kept; None without one.
        keep_texts: Of it, on which the target's own activations were the goal.
    """

    errors: dict[str, list[tuple[float | None, float | None]]]
    ridges: dict[str, list[float]]
    rows: int
    fit_seconds: float
    final_goal: FinalGoal
    keep: str | None
    keep_texts: int


class ChooseNote(Note):
    """Of choosing alpha.

    Attributes:
        choice: What was tried and chosen.
    """

    choice: Choice

    @property
    def alpha(self) -> dict[str, float]:
        """Projection, or one of several sources -> alpha."""
        return dict(self.choice.alpha)


class EvaluateNote(Note):
    """Of the held-out check.

    Attributes:
        scores: ``fused``, the controls and each of several sources alone -> their scores.
        kept: ``base`` and ``fused`` -> their scores on texts that a reconstruction is to keep; empty without any.
        descent: Of the descent control, where it was asked for.
    """

    scores: dict[str, ScoreNote]
    descent: Descent | None = None
    kept: dict[str, ScoreNote] = {}


class SaveNote(Note):
    """Of the checkpoint.

    Attributes:
        dtype: It is stored in.
        computed_in: The dtype that the model ran in.
        weights: File name -> SHA-256 (hex).
        least_release: The first ``transformers`` that reads it; None where the target's own files do not tell.
        adapter: Of what was written as an adapter of the target; None of a whole checkpoint.
        licence_files: The target's licence and notices, which lie beside the weights.
        source_licence_files: Those of the models that went into it, by their paths in the folder.
    """

    dtype: str
    computed_in: str
    weights: Mapping[str, str]
    least_release: str | None = None
    adapter: SavedAdapter | None = None
    licence_files: tuple[str, ...] = ()
    source_licence_files: tuple[str, ...] = ()
