"""A recipe: everything that decides a run, as one YAML file.

The recipe is frozen and strict. Two runs of one recipe on one machine give the same weights, so nothing
that changes a weight may live anywhere else. Unknown keys are refused with the nearest known one.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from tmerge.errors import RecipeError

__all__ = [
    "RECIPE_VARIABLE",
    "AdaptationSettings",
    "CalibrationSettings",
    "CompareSettings",
    "EvaluationSettings",
    "FusionSettings",
    "ProjectionName",
    "Recipe",
    "SaveSettings",
    "TransportSettings",
    "load_recipe",
    "preset_names",
]

RECIPE_VARIABLE = "TMERGE_RECIPE"
"""Where a machine without files finds its recipe: named as ``env:TMERGE_RECIPE``."""

ProjectionName = Literal["q", "k", "v", "o", "gate", "up", "down"]


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)


class CalibrationSettings(_Section):
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
    choosing: Annotated[float, Field(gt=0, lt=0.9)] = Field(
        0.2, description="with fusion.alpha auto: share of the other texts that serve to choose alpha, and nothing else"
    )


class TransportSettings(_Section):
    """Feature plans (Eq. 7-9) and layer plans (Eq. 10-13)."""

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


class FusionSettings(_Section):
    """What is written into the target (Eq. 14, A.5)."""

    what: Literal["weights", "task-vector"] = Field(
        "weights", description="task-vector: what `source` learned since `source_base`, instead of its weights"
    )
    alpha: Annotated[float, Field(ge=0)] | Literal["auto"] = Field(
        0.1, description="fusion strength; auto chooses it per projection group, 0 included, on texts kept for that"
    )
    alphas: tuple[Annotated[float, Field(gt=0)], ...] = Field(
        (0.01, 0.03, 0.1, 0.3, 1.0), description="what alpha: auto tries beside 0"
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
    biases: bool = Field(True, description="fuse the biases of these projections as well, where both models have them")

    @field_validator("projections")
    @classmethod
    def _some_and_distinct(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if not value or len(set(value)) != len(value):
            raise ValueError("name at least one projection, each once")
        return value

    @model_validator(mode="after")
    def _alpha_in_range(self) -> FusionSettings:
        # A task vector may be overshot on purpose; a weight is interpolated, and past 1 it extrapolates.
        if self.what == "weights" and self.alpha != "auto" and self.alpha > 1:
            raise ValueError(f"fusion.alpha is {self.alpha}, outside [0, 1]; choose a value between 0 and 1")
        if self.what == "weights" and any(alpha > 1 for alpha in self.alphas):
            raise ValueError(f"fusion.alphas has {max(self.alphas)}, outside [0, 1]; choose values between 0 and 1")
        return self


class EvaluationSettings(_Section):
    """The held-out check that every merge ends with."""

    texts: Annotated[int, Field(ge=8)] = Field(200, description="most held-out texts to score")
    controls: tuple[Literal["shrink", "noise", "permuted"], ...] = Field(
        ("shrink", "noise", "permuted"), description="what the merge has to beat, at the same strength and place"
    )
    bootstrap: Annotated[int, Field(ge=100)] = Field(2000, description="resamples of the paired bootstrap")
    descent: Annotated[int, Field(ge=0)] = Field(
        0, description="calibration texts for the descent control, which needs a backward pass; 0 leaves it out"
    )


class SaveSettings(_Section):
    """How the checkpoint is written."""

    max_shard_size: str = Field("5GB", description="largest weights file of the checkpoint")
    language: tuple[Annotated[str, Field(pattern=r"^([a-z]{2,3}|multilingual|code)$")], ...] = Field(
        (), description="for the model card, as ISO 639 codes (id, ms, yue); the built-in samples know their own"
    )


class AdaptationSettings(_Section):
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


class CompareSettings(_Section):
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


class PublishedScores(_Section):
    """What the paper reports for a preset's pair, to be shown beside what is measured here."""

    table: str
    metric: str
    scores: dict[str, tuple[float, float, float]] = Field(
        description="benchmark -> base, fused without adaptation, fused with adaptation"
    )
    by_source: dict[str, dict[str, float]] = Field(
        {}, description="size of the source -> benchmark -> fused with adaptation (Table 7)"
    )


class Recipe(_Section):
    """Everything that decides a run.

    Attributes:
        target: The model that is changed: Hub id (with ``@revision``), folder or ``.gguf`` file.
        source: The model that is read.
        source_base: The source before its fine-tuning, for task vectors.
        dtype: Of both models' weights and forward passes; ``auto`` is each checkpoint's own, bfloat16 for GGUF.
        device: ``auto`` takes an accelerator when there is one.
        trust_remote_code: The references, and no others, whose repos may run their own code.
        plan: A finished run, a folder or a Hub id, whose transport plan is fused from; then nothing is calibrated.
    """

    target: str
    source: str
    source_base: str | None = None
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    device: str = "auto"
    seed: Annotated[int, Field(ge=0)] = 0
    trust_remote_code: tuple[str, ...] = ()
    plan: str | None = None
    calibration: CalibrationSettings = CalibrationSettings()
    transport: TransportSettings = TransportSettings()
    fusion: FusionSettings = FusionSettings()
    evaluation: EvaluationSettings = EvaluationSettings()
    save: SaveSettings = SaveSettings()
    adaptation: AdaptationSettings = AdaptationSettings()
    compare: CompareSettings = CompareSettings()
    published: PublishedScores | None = None

    @model_validator(mode="after")
    def _task_vector_has_a_base(self) -> Recipe:
        if self.fusion.what == "task-vector" and self.source_base is None:
            raise ValueError("fusion.what is task-vector, which needs source_base: the source before its fine-tuning")
        if self.fusion.what == "weights" and self.source_base is not None:
            raise ValueError("source_base is only read when fusion.what is task-vector; set that, or drop source_base")
        return self

    @classmethod
    def from_mapping(cls, data: Mapping[str, Any], where: str = "recipe") -> Recipe:
        """Validate a mapping.

        Args:
            data: The recipe's keys, as YAML gives them.
            where: Named in the error: a file or a preset.

        Raises:
            RecipeError: One line that names the key, its value and what is allowed.
        """
        try:
            return cls.model_validate(data)
        except ValidationError as error:
            raise RecipeError(_one_line(error, where)) from None

    def to_yaml(self) -> str:
        """The recipe with every default written out; reading it back gives an equal recipe."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)

    def digest(self, *sections: str) -> str:
        """SHA-256 (hex) of the named top-level sections, or of all; stages are recognised by it."""
        data = self.model_dump(mode="json")
        chosen = {name: data[name] for name in sections} if sections else data
        return hashlib.sha256(json.dumps(chosen, sort_keys=True).encode()).hexdigest()


def preset_names() -> list[str]:
    """Names of the recipes that ship with the package."""
    folder = resources.files("tmerge") / "recipes"
    return sorted(entry.name[:-5] for entry in folder.iterdir() if entry.name.endswith(".yaml"))


def load_recipe(
    name: str | None = None,
    overrides: Mapping[str, Any] | None = None,
    settings: Sequence[str] = (),
    *,
    start: Recipe | None = None,
) -> Recipe:
    """Read a recipe and lay the command line's words over it.

    Args:
        name: A YAML file, or a preset's name; None starts from the defaults, or from `start`.
        start: A recipe to begin from where no other is named.
        overrides: Top-level or dotted keys to values; None values are passed over.
        settings: ``section.key=value`` words of ``--set``; values are read as YAML.

    Raises:
        RecipeError: No such file or preset, not YAML, or not a valid recipe.
    """
    data, where = _read(name) if name is not None or start is None else (start.model_dump(mode="json"), "recipe")
    for key, value in (overrides or {}).items():
        if value is not None:
            _put(data, key, value)
    for word in settings:
        key, separator, text = word.partition("=")
        if not separator or not key:
            raise RecipeError(f"--set {word!r} is not of the form section.key=value, for example fusion.alpha=0.1")
        try:
            _put(data, key.strip(), yaml.safe_load(text))
        except yaml.YAMLError:
            raise RecipeError(f"--set {word!r}: the value is not YAML; quote it") from None
    return Recipe.from_mapping(data, where)


def _read(name: str | None) -> tuple[dict[str, Any], str]:
    if name is None:
        return {}, "recipe"
    path = Path(name)
    if name == f"env:{RECIPE_VARIABLE}":
        text, where = os.environ.get(RECIPE_VARIABLE, ""), f"the variable {RECIPE_VARIABLE}"
    elif path.suffix in {".yaml", ".yml"} or path.exists():
        if not path.is_file():
            raise RecipeError(f"recipe {name!r}: no such file; presets are {', '.join(preset_names())}")
        text, where = path.read_text(encoding="utf-8", errors="replace"), name
    elif name in preset_names():
        text, where = (resources.files("tmerge") / "recipes" / f"{name}.yaml").read_text("utf-8"), f"preset {name}"
    else:
        close = difflib.get_close_matches(name, preset_names(), 1)
        hint = f"; did you mean {close[0]!r}?" if close else f"; presets are {', '.join(preset_names())}"
        raise RecipeError(f"recipe {name!r} is neither a file nor a preset{hint}")
    try:
        data = yaml.safe_load(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        raise RecipeError(f"{where}{line}: not YAML ({getattr(error, 'problem', 'unreadable')})") from None
    if not isinstance(data, dict):
        raise RecipeError(f"{where}: a recipe is a mapping of keys to values, starting with target: and source:")
    return data, where


def _put(data: dict[str, Any], key: str, value: Any) -> None:
    *path, last = key.split(".")
    for part in path:
        inner = data.setdefault(part, {})
        if not isinstance(inner, dict):
            raise RecipeError(f"{key!r}: {part!r} is a value, not a section")
        data = inner
    data[last] = value


def _keys(path: tuple[int | str, ...]) -> list[str]:
    """Known keys of the section that an error's location lies in."""
    model: Any = Recipe
    for part in path[:-1]:
        field = model.model_fields.get(str(part))
        if field is None or not (isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel)):
            return []
        model = field.annotation
    return list(model.model_fields)


def _one_line(error: ValidationError, where: str) -> str:
    found = error.errors(include_url=False)
    # A misspelt key often leaves another one missing: the misspelling is what to mend.
    first = next((one for one in found if one["type"] == "extra_forbidden"), found[0])
    # Union members and literals add their own names to the location; only the recipe's keys are the user's.
    location = tuple(part for part in first["loc"] if isinstance(part, str) and part.isidentifier())
    key = ".".join(location)
    more = "" if error.error_count() == 1 else f" (and {error.error_count() - 1} more)"
    if first["type"] == "extra_forbidden":
        known = _keys(tuple(first["loc"]))
        close = difflib.get_close_matches(str(first["loc"][-1]), known, 1, cutoff=0.4)
        hint = f"did you mean {close[0]!r}?" if close else f"known keys: {', '.join(known)}"
        return f"{where}: unknown key {key!r}; {hint}{more}"
    if first["type"] == "missing":
        return f"{where}: {key!r} is missing; name it in the recipe or as --{key.replace('_', '-')} REF{more}"
    message = str(first["msg"]).removeprefix("Value error, ")
    if isinstance(first["input"], dict):  # said of a whole section, by a validator that names its keys itself
        return f"{where}: {message}{more}"
    return f"{where}: {key} is {first['input']!r}: {message[:1].lower() + message[1:]}{more}"
