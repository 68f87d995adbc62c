"""A run's report as a type: what report.json holds, validated whoever wrote it (schema 1)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field, Strict, model_validator

from tmerge.evaluation import Verdict
from tmerge.report.parts import (
    Calibration,
    Fusion,
    Items,
    Measured,
    MergedModel,
    Part,
    Projections,
    SavedAdapter,
    SeveralSource,
    TrainingTexts,
)
from tmerge.report.transport import Transport

if TYPE_CHECKING:
    from typing import Self  # of Python 3.11; 3.10 does not ask for it

__all__ = [
    "SCHEMA",
    "Adaptation",
    "Adapted",
    "Alone",
    "Control",
    "Descent",
    "DescentOfProjection",
    "Evaluation",
    "Report",
    "StageCost",
    "Timing",
]

SCHEMA: Literal[1] = 1


class Control(Measured):
    """A control's score, its difference to the target, and that of the fused model to it."""

    difference: Measured
    fused_minus_control: Measured


class Alone(Measured):
    """One of several sources alone, whole and at its own strength: as `Control`."""

    difference: Measured
    fused_minus_alone: Measured


class DescentOfProjection(Part):
    """Cosines with the descent direction by layer, as `tmerge.evaluation.Descent` has them, and their means."""

    layers: Items[int]
    cosine: Items[float]
    noise: Items[float]
    noise_sd: Items[float]
    draws: int
    mean: float
    standard_error: float | None
    noise_mean: float
    noise_standard_error: float | None

    @model_validator(mode="after")
    def _one_a_layer(self) -> Self:
        if {len(self.cosine), len(self.noise), len(self.noise_sd)} != {len(self.layers)}:
            raise ValueError("cosine, noise and noise_sd have to have one number for each of layers")
        return self


class Descent(Part):
    """Whether the merge points where the loss falls, on so many calibration texts."""

    texts: int
    projections: Mapping[str, DescentOfProjection]


class Adapted(Part):
    """A trained model's score, and its differences to the target and to the merge before training."""

    score: Measured
    difference: Measured
    difference_to_fused: Measured


class Kept(Part):
    """Scores on texts on which a reconstruction is to leave the target as it is.

    Attributes:
        dataset: Their name.
        revision: Commit of a dataset on the Hub.
        file_sha256: Of a local file.
        sha256: Of the texts, those that were fitted on too.
        texts: How many are scored, none of which was fitted on.
        difference: Of the fused model to the target, paired.
    """

    dataset: str
    revision: str | None = None
    file_sha256: str | None = None
    sha256: str = ""
    texts: int
    base: Measured
    fused: Measured
    difference: Measured


class Evaluation(Part):
    """Bits per byte on the held-out texts, of all models on the same ones.

    Attributes:
        source: Of several sources, their base's.
        alone: Of several, name -> the target with that source alone.
    """

    metric: str
    texts: int
    bytes: int
    base: Measured
    fused: Measured
    source: Measured
    difference: Measured
    controls: Mapping[str, Control]
    descent: Descent | None = None
    adapted: Adapted | None = None
    kept: Kept | None = None
    alone: Mapping[str, Alone] = Field(default_factory=dict)


class StageCost(Part):
    """What a stage took: seconds, those of them in forward passes, and the process's peak memory by then."""

    name: str
    seconds: float
    forward_seconds: float
    peak_rss_bytes: int


class Timing(Part):
    """Seconds of all stages together."""

    total_seconds: float
    forward_seconds: float
    other_seconds: float


class Adaptation(Part):
    """A training after the merge: the recipe's ``adaptation`` section, and what came of it.

    Attributes:
        alpha: That the residual was trained with.
        tokens: Trained on.
        aligned_share: Share of the tokens at which the source tells of the next one; None where it was not asked.
        loss_curve: (step, loss) pairs.
        verdict: Of the trained model against the target.
        device: Where it was trained; None of a report from before it was told, and so the next.
        versions: Of the libraries it was trained with; the report's own device and versions are the merge's.
    """

    objective: str
    residual: str
    alpha: float | Mapping[str, float]
    steps: int
    batch_size: int
    accumulation: int
    learning_rate: float
    warmup: float
    max_tokens: int
    lora_rank: int
    distill_weight: float
    distill_loss: str
    transport_weight: float
    completions_only: bool
    gradient_checkpointing: bool
    data: TrainingTexts
    tokens: int
    seconds: float
    trained_parameters: int
    aligned_share: float | None
    loss_curve: Annotated[Items[Annotated[tuple[int, float], Strict(False)]], Field(min_length=1)]
    verdict: Verdict
    device: str | None = None
    versions: Mapping[str, str] | None = None


class Report(Part):
    """report.json.

    Attributes:
        source_base_model: Of a task vector; older reports have its reference alone.
        adapter: That was named beside the source's base, which alone was matched; None where the source was.
        sources: Several that were carried and joined; then `source` is the base of all, as `source_base_model`.
        weights: File -> SHA-256 (hex).
        saved_adapter: What the folder holds is a LoRA of the target; None where it is a whole checkpoint.
        plan: The run whose transport was taken.
        method: As `tmerge.recipe.method_of`; None of a report from before it was told.
        notes: What its reader has to know; of a trained model, what is true of the merge alone says so.
        adaptation: Of a model that was trained after the merge.
    """

    schema_number: Literal[1] = Field(alias="schema")
    tmerge: str
    verdict: Verdict
    target: MergedModel
    source: MergedModel
    source_base: str | None = None
    source_base_model: MergedModel | None = None
    adapter: str | None = None
    sources: Items[SeveralSource] = ()
    same_model: bool
    calibration: Calibration
    transport: Transport
    projections: Projections
    fusion: Fusion
    evaluation: Evaluation
    stages: Items[StageCost]
    timing: Timing
    device: str
    dtype: str
    computed_in: str | None = None
    weights: Mapping[str, str]
    saved_adapter: SavedAdapter | None = None
    plan: str | None = None
    seed: int
    versions: Mapping[str, str]
    method: Mapping[str, int] | None = None
    notes: Items[str]
    adaptation: Adaptation | None = None

    @model_validator(mode="after")
    def _trained_and_scored(self) -> Self:
        if (self.adaptation is None) != (self.evaluation.adapted is None):
            raise ValueError("adaptation and evaluation.adapted have to be there both, or neither of them")
        return self

    @property
    def merged(self) -> list[MergedModel]:
        """Those that went into the target: the source, or several."""
        return [source.model for source in self.sources] or [self.source]

    @property
    def published_verdict(self) -> Verdict:
        """On what the folder holds: the merge, or what training made of it."""
        return self.verdict if self.adaptation is None else self.adaptation.verdict

    @property
    def published_score(self) -> Measured:
        """Of what the folder holds."""
        evaluation = self.evaluation
        return evaluation.fused if evaluation.adapted is None else evaluation.adapted.score

    @property
    def published_difference(self) -> Measured:
        """Of what the folder holds to the target."""
        evaluation = self.evaluation
        return evaluation.difference if evaluation.adapted is None else evaluation.adapted.difference
