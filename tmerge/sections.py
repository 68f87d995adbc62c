"""The sections of a recipe: what each stage of a run asks for, with its defaults (`tmerge.recipe` holds them together).

The defaults of weights are the paper's. Those of a task vector (``fusion.what: task-vector``) are what was measured
best on models that are related, and no worse than nothing elsewhere: see docs/experiments.md.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal, get_args, get_origin

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator, model_validator

__all__ = [
    "TASK_VECTOR_DEFAULTS",
    "AdaptationSettings",
    "CalibrationSettings",
    "CompareSettings",
    "EvaluationSettings",
    "FusionSettings",
    "ProjectionName",
    "PublishedScores",
    "SaveSettings",
    "Section",
    "TransportSettings",
    "section_defaults",
]

ProjectionName = Literal["q", "k", "v", "o", "gate", "up", "down"]

TASK_VECTOR_DEFAULTS: dict[str, dict[str, Any]] = {
    "calibration": {"rows": "tokens", "match_on": "samples:english"},
    "transport": {"structure": "shared"},
    "fusion": {
        "alphas": [0.3, 0.5, 1.0, 1.5],
        "top_k": 1.0,
        "projections": ["q", "k", "v", "o", "gate", "up", "down"],
    },
}
"""What a task vector's sections hold where a recipe says nothing else; `section_defaults` adds ``fusion.stream``."""


def section_defaults(data: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """What a recipe's sections hold where its mapping says nothing, if that differs from their own defaults.

    Args:
        data: Top-level keys; the sections as mappings.
    """
    fusion, transport = ({} if data.get(name) is None else data[name] for name in ("fusion", "transport"))
    if not isinstance(fusion, Mapping) or fusion.get("what") != "task-vector":
        return {}
    defaults = {name: dict(values) for name, values in TASK_VECTOR_DEFAULTS.items()}
    structure = transport.get("structure", "shared") if isinstance(transport, Mapping) else "shared"
    fitted = isinstance(transport, Mapping) and transport.get("map", "plan") != "plan"
    # A fitted map is another one for every layer, and the stream has none of its own.
    defaults["fusion"]["stream"] = structure == "shared" and not fitted
    return defaults


def _kinds(annotation: Any) -> Iterator[Any]:
    """The plain types that an annotation is made of."""
    parts = get_args(annotation)
    if not parts or get_origin(annotation) is Literal:
        yield annotation
    for part in parts if get_origin(annotation) is not Literal else ():
        yield from _kinds(part)


def _holds_boolean(value: Any) -> bool:
    if isinstance(value, Mapping):
        value = list(value.values())
    return any(map(_holds_boolean, value)) if isinstance(value, (list, tuple)) else isinstance(value, bool)


class Section(BaseModel):
    """Frozen and strict: unknown keys are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _no_word_is_a_number(cls, value: Any, info: ValidationInfo) -> Any:
        """Pydantic reads true as 1, and YAML reads yes and on as true: ``alpha: yes`` would be 1.0."""
        kinds = set(_kinds(cls.model_fields[str(info.field_name)].annotation))
        has_own = any(isinstance(kind, type) and issubclass(kind, BaseModel) for kind in kinds)
        if bool not in kinds and not has_own and _holds_boolean(value):
            raise ValueError("true and false, which YAML reads yes, no, on and off as too, are no value here")
        return value


class CalibrationSettings(Section):
    """The texts that both models read, and how they are read."""

    dataset: str = Field(
        "samples:english",
        description="`samples:LANGUAGE` (built in), a Hub dataset id (@revision), or a .txt/.jsonl/.csv/.parquet file",
    )
    config: str | None = Field(None, description="configuration of a Hub dataset")
    split: str = Field("train", description="split of a Hub dataset")
    column: str | None = Field(None, description="column that holds the text; found by itself when there is only one")
    texts: Annotated[int, Field(ge=16)] = Field(2000, description="most texts to read, held-out ones included")
    max_tokens: Annotated[int, Field(ge=8)] = Field(256, description="longer texts are cut here, per model")
    batch_tokens: Annotated[int, Field(ge=64)] = Field(2048, description="padded tokens of one forward batch")
    held_out: Annotated[float, Field(gt=0, lt=0.9)] = Field(
        0.2, description="share of the texts kept away from calibration, chosen by hash, for the verdict"
    )
    match_on: str | None = Field(
        None,
        description="another dataset, whose texts the neurons are matched on: in a language that both models read, "
        "where the target hardly reads the dataset's own",
    )
    rows: Literal["texts", "tokens", "last"] = Field(
        "texts",
        description="features are means over whole texts (the paper's), single tokens where both tokenizers agree, or "
        "the last of these in each text",
    )
    token_rows: Annotated[int, Field(ge=64)] = Field(
        2000, description="with rows: tokens, how many in all, spread evenly over the texts"
    )
    choosing: Annotated[float, Field(gt=0, lt=0.9)] = Field(
        0.2, description="with fusion.alpha auto: share of the other texts that serve to choose alpha, and nothing else"
    )


class TransportSettings(Section):
    """Feature plans (Eq. 7-9) and layer plans (Eq. 10-13)."""

    structure: Literal["none", "shared"] = Field(
        "none",
        description="shared: one residual stream for all layers, whole heads, MLP neurons as units, layers in order",
    )
    matching: Literal["one-to-one", "entropic"] = Field(
        "one-to-one", description="with structure: shared, the limit of epsilon towards 0, or plans at epsilon"
    )
    signed: bool = Field(
        False, description="with structure: shared, a neuron may meet another's negative, and takes its sign along"
    )
    map: Literal["plan", "procrustes", "ridge"] = Field(
        "plan", description="what carries weights: the plan, or as rivals an orthogonal or a least-squares map"
    )
    ridge: Annotated[float, Field(gt=0)] = Field(
        0.1, description="with map: ridge, the penalty, relative to the mean variance of the features mapped from"
    )
    epsilon: Annotated[float, Field(gt=0)] = Field(0.1, description="entropic regularisation of the feature plans")
    max_iterations: Annotated[int, Field(ge=1)] = Field(200, description="most Sinkhorn sweeps of a feature plan")
    tolerance: Annotated[float, Field(gt=0)] = Field(
        1e-6, description="largest marginal violation, relative to the marginal's own entry 1/n"
    )
    eta: Annotated[float, Field(gt=0)] = Field(0.1, description="entropic regularisation of the layer plans")
    layer_max_iterations: Annotated[int, Field(ge=1)] = Field(1000, description="most sweeps of a layer plan")
    layer_tolerance: Annotated[float, Field(gt=0)] = Field(1e-9, description="as tolerance, of the layer plans")
    layer_cost: Literal["median-scaled", "plain"] = Field(
        "median-scaled", description="divide the shifted layer cost by its median (official code) or take it as it is"
    )
    layer_marginals: Literal["balanced", "semi-relaxed"] = Field(
        "balanced", description="semi-relaxed: a source layer may stay unused (only the target marginal is fixed)"
    )
    layers_kept: Annotated[int, Field(ge=1)] = Field(3, description="source layers kept per target layer")
    entries_kept: Annotated[int, Field(ge=1)] = Field(
        128, description="a plan's entry stays if it is among this many of its row and of its column"
    )


class FusionSettings(Section):
    """What is written into the target (Eq. 14, A.5)."""

    what: Literal["weights", "task-vector"] = Field(
        "weights", description="task-vector: what `source` learned since `source_base`, instead of its weights"
    )
    alpha: Annotated[float, Field(ge=0)] | Literal["auto"] = Field(
        "auto", description="fusion strength; auto chooses it per projection group, 0 included, on texts kept for that"
    )
    alphas: tuple[Annotated[float, Field(gt=0)], ...] = Field(
        (0.01, 0.03, 0.1, 0.3, 1.0), min_length=1, description="what alpha: auto tries beside 0"
    )
    scale: Literal["barycentric", "literal", "row-norm"] = Field(
        "barycentric", description="barycentric: maps that average; literal: the paper's; row-norm: as large as the row"
    )
    units: Literal["none", "layer", "feature"] = Field(
        "none", description="match the sizes of the two models' activations: not, one factor a layer, or per feature"
    )
    top_k: Annotated[int, Field(ge=1)] | Annotated[float, Field(gt=0, le=1)] = Field(
        128, description="neurons selected per projection and layer: a count, or a fraction such as 0.1"
    )
    projections: tuple[ProjectionName, ...] = Field(("q", "k", "v", "o"), description="sublayers that are fused")
    stream: bool = Field(
        False,
        description="a task vector's embeddings and norms too, where the vocabulary is shared (structure: shared)",
    )
    affine: bool = Field(
        False, description="the features' means go into the biases: maps carry deviations (where the target has biases)"
    )
    biases: bool = Field(True, description="fuse the biases of these projections as well, where both models have them")

    @field_validator("projections")
    @classmethod
    def _some_and_distinct(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if not value or len(set(value)) != len(value):
            raise ValueError("name at least one projection, each once")
        return value

    @model_validator(mode="after")
    def _settings_agree(self) -> FusionSettings:
        if self.what == "task-vector" and self.scale == "row-norm":
            raise ValueError(
                "fusion.scale is row-norm, which would make what was learned as long as the target's own rows; for a "
                "task vector choose barycentric"
            )
        if self.affine and not self.biases:
            raise ValueError("fusion.affine writes into biases, and fusion.biases is off; set one of them otherwise")
        return self

    @model_validator(mode="after")
    def _alpha_in_range(self) -> FusionSettings:
        # A task vector may be overshot on purpose; a weight is interpolated, and past 1 it extrapolates.
        if self.what == "weights" and self.alpha != "auto" and self.alpha > 1:
            raise ValueError(f"fusion.alpha is {self.alpha}, outside [0, 1]; choose a value between 0 and 1")
        if self.what == "weights" and any(alpha > 1 for alpha in self.alphas):
            raise ValueError(f"fusion.alphas has {max(self.alphas)}, outside [0, 1]; choose values between 0 and 1")
        return self


class EvaluationSettings(Section):
    """The held-out check that every merge ends with."""

    texts: Annotated[int, Field(ge=8)] = Field(200, description="most held-out texts to score")
    controls: tuple[Literal["shrink", "noise", "permuted"], ...] = Field(
        ("shrink", "noise", "permuted"), description="what the merge has to beat, at the same strength and place"
    )
    bootstrap: Annotated[int, Field(ge=100)] = Field(2000, description="resamples of the paired bootstrap")
    descent: Annotated[int, Field(ge=0)] = Field(
        0, description="calibration texts for the descent control, which needs a backward pass; 0 leaves it out"
    )


_SIZE = re.compile(r"(\d{1,15}(?:\.\d{1,15})?)\s*([KMGT]B)", re.IGNORECASE)
_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}


class SaveSettings(Section):
    """How the checkpoint is written."""

    max_shard_size: Annotated[int, Field(ge=1)] | str = Field(
        "5GB", description="largest weights file of the checkpoint: 5GB, 500MB, or a number of bytes"
    )
    language: tuple[Annotated[str, Field(pattern=r"^([a-z]{2,3}|multilingual|code)$")], ...] = Field(
        (), description="for the model card, as ISO 639 codes (id, ms, yue); the built-in samples know their own"
    )

    @field_validator("max_shard_size", mode="after")
    @classmethod
    def _is_a_size(cls, value: int | str) -> int | str:
        # As huggingface_hub reads it when the checkpoint is written, after all other stages.
        found = _SIZE.fullmatch(value.strip()) if isinstance(value, str) else None
        if isinstance(value, str) and (found is None or float(found[1]) * _UNITS[found[2].upper()] < 1):
            raise ValueError("write it as 5GB or 500MB (TB, GB, MB or KB), or as a number of bytes")
        return value

    @property
    def shard_bytes(self) -> float:
        """The size in bytes, however it is written."""
        if isinstance(self.max_shard_size, int):
            return self.max_shard_size
        found = _SIZE.fullmatch(self.max_shard_size.strip())
        assert found is not None  # or it would have been refused
        return float(found[1]) * _UNITS[found[2].upper()]


class AdaptationSettings(Section):
    """Training after the merge, and of the baselines (Eq. 15-18)."""

    objective: Literal["sft", "distill"] = Field(
        "sft", description="sft: next tokens; distill: also the source's next-token distribution"
    )
    residual: Literal["frozen", "none"] = Field(
        "frozen", description="frozen: the transported residual stays fixed while the base weights train (Eq. 15-17)"
    )
    alpha: Annotated[float, Field(ge=0)] | None = Field(
        None, description="strength of the trained residual; None takes the fusion's own"
    )
    steps: Annotated[int, Field(ge=1)] = Field(100, description="optimiser steps")
    batch_size: Annotated[int, Field(ge=1)] = Field(8, description="texts of one forward and backward pass")
    accumulation: Annotated[int, Field(ge=1)] = Field(1, description="such passes in one optimiser step")
    learning_rate: Annotated[float, Field(gt=0)] = Field(2e-4, description="peak; falls linearly to zero")
    warmup: Annotated[float, Field(ge=0, lt=1)] = Field(0.0, description="share of the steps in which it rises")
    max_tokens: Annotated[int, Field(ge=8)] = Field(256, description="longer texts are cut here")
    lora_rank: Annotated[int, Field(ge=0)] = Field(0, description="0 trains the weights, else LoRA on q k v o")
    distill_weight: Annotated[float, Field(ge=0)] = Field(1.0, description="of the distillation term")
    distill_loss: Literal["first-piece", "uld"] = Field(
        "first-piece", description="how the source's distribution meets the target's vocabulary"
    )
    transport_weight: Annotated[float, Field(ge=0)] = Field(
        0.0, description="of the features' distance to the source's, carried through the plan"
    )
    completions_only: bool = Field(False, description="prompt-completion and chat data: no loss on the prompts")
    gradient_checkpointing: bool = Field(False, description="less memory, a third more time")


TrainedRow = Literal["sft", "distill", "sft+transport", "fused+sft", "fused+distill"]


class CompareSettings(Section):
    """What `tmerge compare` holds against each other; `tmerge merge` reads none of it."""

    rows: tuple[TrainedRow, ...] = Field(
        ("sft", "distill", "fused+sft", "fused+distill"),
        description="what is trained, all on the same texts and for the same steps; fused+... keeps the transported "
        "residual frozen",
    )
    seeds: tuple[Annotated[int, Field(ge=0)], ...] = Field((0,), min_length=1, description="of the trained rows")
    alphas: tuple[Annotated[float, Field(gt=0)], ...] = Field(
        (0.01, 0.03, 0.1, 0.3, 1.0), description="sweep without training (Figure 5), beside shrink and noise"
    )
    sources: tuple[str, ...] = Field((), description="further sources, each merged with the same recipe (Figure 4)")
    domains: dict[str, str] = Field(
        {}, description="name -> dataset: further texts that every row is scored on (Figures 1 and 6)"
    )
    tasks: tuple[str, ...] = Field((), description="benchmark tasks or groups of lm-evaluation-harness for every row")
    task_data: dict[str, str] = Field({}, description="task -> local file in place of its Hub dataset")
    task_limit: Annotated[int, Field(ge=1)] | None = Field(None, description="questions of each task at most")

    @field_validator("rows", "seeds", "alphas", "sources")
    @classmethod
    def _distinct(cls, value: tuple[Any, ...]) -> tuple[Any, ...]:
        if len(set(value)) != len(value):
            raise ValueError("name each once")
        return value


class PublishedScores(Section):
    """What the paper reports for a preset's pair, to be shown beside what is measured here."""

    table: str
    metric: str
    scores: dict[str, tuple[float, float, float]] = Field(
        description="benchmark -> base, fused without adaptation, fused with adaptation"
    )
    by_source: dict[str, dict[str, float]] = Field(
        {}, description="size of the source -> benchmark -> fused with adaptation (Table 7)"
    )
