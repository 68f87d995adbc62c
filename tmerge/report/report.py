"""A run's report as a type: what report.json holds, validated whoever wrote it (schema 1).

The fields stand in the order in which they are written. What a part has besides them, as a later tmerge may write, is
kept as it is; what it lacks or has of another kind is said by `read_report`, in one line.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import BaseModel, ConfigDict, Field, Strict, model_validator

from tmerge.evaluation import Verdict

__all__ = [
    "SCHEMA",
    "Adaptation",
    "Adapted",
    "Calibration",
    "Choice",
    "Control",
    "Descent",
    "DescentOfProjection",
    "Evaluation",
    "Fusion",
    "FusedProjection",
    "Iterations",
    "Measured",
    "MergedModel",
    "OfBoth",
    "Part",
    "Projections",
    "Relatedness",
    "Report",
    "StageCost",
    "Timing",
    "TrainingTexts",
    "Transport",
    "Trial",
]

SCHEMA = 1

_Item = TypeVar("_Item")
# JSON knows lists only.
Items = Annotated[tuple[_Item, ...], Strict(False)]


class Part(BaseModel):
    """A part of a report; it is not changed once it is made."""

    model_config = ConfigDict(frozen=True, extra="allow", strict=True, ser_json_inf_nan="constants")

    def to_dict(self) -> dict[str, Any]:
        """As the document holds it: its keys and no others, in the order in which they are written.

        Numbers that are undefined are NaN or infinite here; `tmerge.documents.json_text` writes them as null.
        """
        return self.model_dump(mode="json", by_alias=True, exclude_unset=True)


class Measured(Part):
    """A value with its 95 % interval over texts, in bits per byte.

    Attributes:
        value: NaN where it is undefined.
        ci95: Lower and upper end.
    """

    value: float
    ci95: Annotated[tuple[float, float], Strict(False)]

    @property
    def low(self) -> float:
        """Lower end of the interval."""
        return self.ci95[0]

    @property
    def high(self) -> float:
        """Upper end of the interval."""
        return self.ci95[1]


class OfBoth(Part):
    """A count of the target's and one of the source's."""

    target: int
    source: int


class MergedModel(Part):
    """One of the models that went into a merge.

    Attributes:
        ref: As it was asked for.
        commit: Of its repo; of local files ``sha256:`` and their digest.
        licence: As it states it; None where it states none.
    """

    ref: str
    commit: str
    architecture: str
    parameters: int
    layers: int
    hidden_size: int
    licence: str | None


class Calibration(Part):
    """The texts that the merge read.

    Attributes:
        texts: How many were read for features.
        revision: Commit of a dataset on the Hub.
        sha256: Of the texts.
        choosing: Texts kept apart to choose alpha on.
        other: Texts of `other_dataset` that the neurons were matched on in their place; 0 for none.
        file_sha256, other_sha256: Of local files.
        held_out_texts: Those that nothing but the scores has seen.
        tokens: That each model read.
        truncated: Texts that were cut.
    """

    texts: int
    dataset: str
    revision: str | None
    config: str | None
    split: str | None
    column: str | None
    read: int
    empty: int
    duplicates: int
    sha256: str
    choosing: int = 0
    prompts: int = 0
    other: int = 0
    other_dataset: str | None = None
    file_sha256: str | None = None
    other_sha256: str | None = None
    held_out_texts: int
    tokens: OfBoth
    truncated: OfBoth


class TrainingTexts(Part):
    """The texts of a training after the merge; as in `Calibration`."""

    texts: int
    held_out: int
    dataset: str
    revision: str | None
    config: str | None
    split: str | None
    column: str | None
    read: int
    empty: int
    duplicates: int
    sha256: str
    notes: Items[str]
    choosing: int = 0
    prompts: int = 0
    other: int = 0
    other_dataset: str | None = None
    file_sha256: str | None = None
    other_sha256: str | None = None


class Iterations(Part):
    """Sinkhorn sweeps of the feature plans."""

    median: int | float
    max: int


class Relatedness(Part):
    """Shares of the target's neurons, 0 to 1, as `tmerge.transport.Relatedness`."""

    value: float
    permuted: float
    stream: float
    mlp: float | None
    rows: int


class Transport(Part):
    """How the plans were solved.

    Attributes:
        problems: Feature plans, or correspondences.
        converged: Those that reached the tolerance.
        seconds: Of the stage.
        eta_used: Feature key -> eta of its layer plan.
        relatedness: None where it cannot be asked.
    """

    problems: int
    iterations: Iterations
    worst_marginal_violation: float
    converged: int
    seconds: float
    epsilon: float
    eta: float
    eta_used: Mapping[str, float]
    layer_cost: str
    layer_marginals: str
    layer_plans_converged: bool
    rows: str = "texts"
    structure: str = "none"
    matching: str = "entropic"
    signed: bool = False
    map: str = "plan"
    relatedness: Relatedness | None = None


class Projections(Part):
    """Which projections were fused, which were asked for and skipped (with the reason), what was left alone."""

    fused: Items[str]
    skipped: Mapping[str, str]
    left_alone: Items[str]


class FusedProjection(Part):
    """What one projection's fusion came to.

    Attributes:
        layers: The target's.
        norm_ratio: Of each of them: norm of what was transported over the norm of its own, None where that is zero.
        neurons: Selected in each layer.
        of: So many.
        bias: What became of it.
    """

    layers: Annotated[Items[int], Field(min_length=1)]
    norm_ratio: Items[float | None]
    neurons: int
    of: int
    bias: str

    @model_validator(mode="after")
    def _one_a_layer(self) -> Self:
        if len(self.norm_ratio) != len(self.layers):
            raise ValueError("norm_ratio has to have one number for each of layers")
        return self


class Trial(Part):
    """An alpha that was tried for a group of projections, on so many of the choosing texts."""

    group: Items[str]
    alpha: float
    gain: Measured
    texts: int


class Choice(Part):
    """What ``alpha: auto`` chose: projection -> alpha, and how it compares on the choosing texts."""

    alpha: Mapping[str, float]
    difference: Measured
    trials: Items[Trial]
    texts: int


class Fusion(Part):
    """What was fused, and how strongly.

    Attributes:
        alpha: As the recipe asks for it.
        top_k: Neurons of a projection and layer: a count, or a share.
        stream: What else lies on the residual stream and was carried.
        choice: Of ``alpha: auto``; None otherwise.
    """

    what: str
    alpha: float | Literal["auto"]
    scale: str
    units: str
    top_k: int | float
    projections: Annotated[Mapping[str, FusedProjection], Field(min_length=1)]
    stream: Items[str] = ()
    choice: Choice | None = None

    @property
    def alpha_used(self) -> float | Mapping[str, float]:
        """The alpha that the neurons were written with; one for each projection where it was chosen."""
        if self.choice is not None:
            return self.choice.alpha
        assert self.alpha != "auto"  # its run chooses
        return self.alpha

    @model_validator(mode="after")
    def _auto_has_chosen(self) -> Self:
        if self.alpha == "auto" and self.choice is None:
            raise ValueError("alpha is auto, so there has to be a choice")
        return self


class Control(Measured):
    """A control's score, its difference to the target, and that of the fused model to it."""

    difference: Measured
    fused_minus_control: Measured


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


class Evaluation(Part):
    """Bits per byte on the held-out texts, of all models on the same ones."""

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
        aligned_share: Share of the tokens whose texts end where the source's do; None where it was not asked.
        loss_curve: (step, loss) pairs.
        verdict: Of the trained model against the target.
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


class Report(Part):
    """report.json.

    Attributes:
        source_base_model: Of a task vector; older reports have its reference alone.
        weights: File -> SHA-256 (hex).
        plan: The run whose transport was taken.
        adaptation: Of a model that was trained after the merge.
    """

    schema_number: Literal[1] = Field(alias="schema")
    tmerge: str
    verdict: Verdict
    target: MergedModel
    source: MergedModel
    source_base: str | None = None
    source_base_model: MergedModel | None = None
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
    plan: str | None = None
    seed: int
    versions: Mapping[str, str]
    notes: Items[str]
    adaptation: Adaptation | None = None

    @model_validator(mode="after")
    def _trained_and_scored(self) -> Self:
        if (self.adaptation is None) != (self.evaluation.adapted is None):
            raise ValueError("adaptation and evaluation.adapted have to be there both, or neither of them")
        return self

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
