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
from pydantic import BaseModel, Field, ValidationError, model_validator

from tmerge.errors import RecipeError
from tmerge.sections import (
    TASK_VECTOR_DEFAULTS,
    AdaptationSettings,
    CalibrationSettings,
    CompareSettings,
    EvaluationSettings,
    FusionSettings,
    ProjectionName,
    PublishedScores,
    SaveSettings,
    Section,
    TransportSettings,
    section_defaults,
)
from tmerge.strict_yaml import load_yaml

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
    "parse_setting",
    "preset_names",
]

RECIPE_VARIABLE = "TMERGE_RECIPE"
"""Where a machine without files finds its recipe: named as ``env:TMERGE_RECIPE``."""


class Recipe(Section):
    """Everything that decides a run; each key says what it is in its description (`tmerge recipe` shows them all)."""

    target: str = Field(description="the model that is changed: Hub id (with `@revision`), folder or `.gguf` file")
    source: str = Field(description="the model that is read")
    source_base: str | None = Field(None, description="the source before its fine-tuning, for task vectors")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto",
        description="of both models' weights and forward passes; auto is each checkpoint's own, bfloat16 for GGUF",
    )
    device: str = Field("auto", description="auto takes an accelerator when there is one; or cpu, cuda, cuda:1, mps")
    seed: Annotated[int, Field(ge=0)] = Field(0, description="of the split, the controls and the bootstrap")
    trust_remote_code: tuple[str, ...] = Field(
        (), description="the references, and no others, whose repos may run their own code"
    )
    plan: str | None = Field(
        None, description="a finished run, folder or Hub id, whose transport is fused from; then nothing is calibrated"
    )
    calibration: CalibrationSettings = CalibrationSettings()
    transport: TransportSettings = TransportSettings()
    fusion: FusionSettings = FusionSettings()
    evaluation: EvaluationSettings = EvaluationSettings()
    save: SaveSettings = SaveSettings()
    adaptation: AdaptationSettings = AdaptationSettings()
    compare: CompareSettings = CompareSettings()
    published: PublishedScores | None = None

    @model_validator(mode="before")
    @classmethod
    def _defaults_of_task_vectors(cls, data: Any) -> Any:
        """What a task vector's recipe does not say; a resolved recipe says everything."""
        if not isinstance(data, Mapping):
            return data
        given = {name: _given(data.get(name)) for name in TASK_VECTOR_DEFAULTS}
        if not all(isinstance(section, Mapping) for section in given.values()):
            return data
        defaults = section_defaults(given)
        return {**data, **{name: {**values, **given[name]} for name, values in defaults.items()}}

    @model_validator(mode="after")
    def _task_vector_has_a_base(self) -> Recipe:
        if self.fusion.what == "task-vector" and self.source_base is None:
            raise ValueError("fusion.what is task-vector, which needs source_base: the source before its fine-tuning")
        if self.fusion.what == "weights" and self.source_base is not None:
            raise ValueError("source_base is only read when fusion.what is task-vector; set that, or drop source_base")
        if self.fusion.stream and (self.fusion.what != "task-vector" or self.transport.structure != "shared"):
            raise ValueError("fusion.stream needs fusion.what: task-vector and transport.structure: shared")
        if self.transport.map != "plan" and self.plan is not None:
            raise ValueError(f"transport.map is {self.transport.map}, which a recorded plan does not hold; drop plan")
        if self.transport.signed and self.transport.structure != "shared":
            raise ValueError("transport.signed needs transport.structure: shared")
        if self.transport.map != "plan" and (self.fusion.units != "none" or self.fusion.scale == "literal"):
            raise ValueError(
                f"transport.map is {self.transport.map}, a fitted map, which has its units and its scale already; set "
                "fusion.units: none and fusion.scale: barycentric"
            )
        if self.fusion.stream and self.transport.map != "plan":
            raise ValueError(f"fusion.stream needs transport.map: plan, not {self.transport.map}; set it to false")
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


def _given(section: Any) -> Any:
    """What a section sets itself, as a mapping whichever form it comes in."""
    if isinstance(section, BaseModel):
        return section.model_dump(exclude_unset=True)
    return {} if section is None else section


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
        _put(data, *parse_setting(word))
    return Recipe.from_mapping(data, where)


def parse_setting(word: str) -> tuple[str, Any]:
    """Key and value of one ``section.key=value`` of ``--set``, the value read as YAML.

    Raises:
        RecipeError: It is not of that form.
    """
    key, separator, text = word.partition("=")
    if not separator or not key.strip():
        raise RecipeError(f"--set {word!r} is not of the form section.key=value, for example fusion.alpha=0.1")
    return key.strip(), load_yaml(text, f"--set {word!r}")


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
    data = load_yaml(text, where)
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
        hint = f"did you mean {close[0]!r}?" if close else f"there are {', '.join(known)}."
        return f"{where}: unknown key {key!r}; {hint} All keys: tmerge recipe{more}"
    if first["type"] == "missing":
        return f"{where}: {key!r} is missing; name it in the recipe or as --{key.replace('_', '-')} REF{more}"
    message = str(first["msg"]).removeprefix("Value error, ")
    # What is said of a whole section comes from a validator that names its keys itself.
    if isinstance(first["input"], dict) and len(location) < 2:
        return f"{where}: {message}{more}"
    return f"{where}: {key} is {first['input']!r}: {message[:1].lower() + message[1:]}{more}"
