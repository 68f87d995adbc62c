"""The recipe as a form and as YAML, each made from the other. No components here: text and plain values only.

The YAML is what counts. It is short: what equals the default is left out, but for what a reader wants to see.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import yaml
from pydantic import BaseModel

from tmerge.errors import RecipeError, TmergeError
from tmerge.recipe import Recipe, load_recipe, preset_names
from tmerge.sections import TASK_VECTOR_DEFAULTS, section_defaults
from tmerge.strict_yaml import load_yaml

__all__ = [
    "GROUPS",
    "SETTINGS",
    "Setting",
    "form_values",
    "from_preset",
    "read_yaml",
    "recipe_of",
    "typed_value",
    "with_value",
    "write_yaml",
]

Kind = Literal["whole", "number", "words", "choice", "several", "switch", "value"]

# Longest recipe that is read; a page of comments fits, a bomb of nested lists does not.
_LONGEST = 20_000
_ALWAYS = ("target", "source", "calibration.dataset", "calibration.texts", "fusion.alpha", "fusion.projections")
# Only `tmerge compare` and `tmerge adapt` read these.
_LEFT_OUT = ("compare", "published", "adaptation")


@dataclass(frozen=True)
class Setting:
    """One field of the form.

    Attributes:
        key: In the recipe, dotted.
        label: Shown.
        kind: ``whole`` and ``number`` are numbers, ``choice`` one of `choices`, ``several`` some of them, ``switch``
            a boolean, ``words`` text or nothing, ``value`` what YAML reads (a number or a word, or a list of them).
        choices: What there is to choose.
        help: One line; the recipe's own description where it is empty.
    """

    key: str
    label: str
    kind: Kind
    choices: tuple[str, ...] = ()
    help: str = ""

    @property
    def description(self) -> str:
        """One line of help."""
        if self.help:
            return self.help
        *sections, name = self.key.split(".")
        model: Any = Recipe
        for section in sections:
            model = model.model_fields[section].annotation
        described = (model.model_fields[name].description or "").replace("`", "")
        return described[:1].upper() + described[1:]


GROUPS: dict[str, tuple[Setting, ...]] = {
    "Fusion": (
        Setting("fusion.alpha", "Strength (alpha)", "value"),
        Setting("fusion.alphas", "Strengths that auto tries", "value"),
        Setting("fusion.projections", "Projections", "several", ("q", "k", "v", "o", "gate", "up", "down")),
        Setting("fusion.top_k", "Neurons per projection and layer", "value"),
        Setting("fusion.scale", "Scale of the maps", "choice", ("barycentric", "literal", "row-norm")),
        Setting("fusion.units", "Units", "choice", ("none", "layer", "feature")),
        Setting("fusion.biases", "Biases", "switch"),
        Setting("fusion.affine", "Affine maps", "switch"),
        Setting("fusion.what", "What is transported", "choice", ("weights", "task-vector")),
        Setting("fusion.stream", "Embeddings and norms", "switch"),
        Setting(
            "source_base", "Source before its fine-tuning", "words", help="A Hub id; needed for a task vector only"
        ),
        Setting(
            "plan",
            "Plan of another run",
            "words",
            help="Hub id of a pushed run: its transport is fused from, and nothing is calibrated",
        ),
    ),
    "Calibration": (
        Setting("calibration.texts", "Texts", "whole"),
        Setting("calibration.max_tokens", "Longest text, tokens", "whole"),
        Setting("calibration.batch_tokens", "Tokens of a batch", "whole"),
        Setting("calibration.held_out", "Share held out", "number"),
        Setting("calibration.match_on", "Match neurons on", "words"),
        Setting("calibration.rows", "Features are of", "choice", ("texts", "tokens", "last")),
        Setting("calibration.token_rows", "Single tokens", "whole"),
        Setting("calibration.choosing", "Share to choose alpha on", "number"),
    ),
    "Transport": (
        Setting("transport.structure", "Structure", "choice", ("none", "shared")),
        Setting("transport.matching", "Matching", "choice", ("one-to-one", "entropic")),
        Setting("transport.signed", "Signed matching", "switch"),
        Setting("transport.map", "Map", "choice", ("plan", "procrustes", "ridge")),
        Setting("transport.ridge", "Ridge penalty", "number"),
        Setting("transport.epsilon", "Epsilon", "number"),
        Setting("transport.max_iterations", "Most iterations", "whole"),
        Setting("transport.tolerance", "Tolerance", "value"),
        Setting("transport.eta", "Eta", "number"),
        Setting("transport.layer_max_iterations", "Most iterations, layers", "whole"),
        Setting("transport.layer_tolerance", "Tolerance, layers", "value"),
        Setting("transport.layer_cost", "Layer cost", "choice", ("median-scaled", "plain")),
        Setting("transport.layer_marginals", "Layer marginals", "choice", ("balanced", "semi-relaxed")),
        Setting("transport.layers_kept", "Source layers kept", "whole"),
        Setting("transport.entries_kept", "Entries kept", "whole"),
    ),
    "Evaluation and machine": (
        Setting("evaluation.texts", "Held-out texts scored", "whole"),
        Setting("evaluation.controls", "Controls", "several", ("shrink", "noise", "permuted")),
        Setting("evaluation.bootstrap", "Bootstrap resamples", "whole"),
        Setting("evaluation.descent", "Texts of the descent control", "whole"),
        Setting(
            "dtype",
            "Number format",
            "choice",
            ("auto", "float32", "bfloat16", "float16"),
            "Of both models; auto is each checkpoint's own, bfloat16 for GGUF",
        ),
        Setting(
            "device", "Device", "choice", ("auto", "cpu", "cuda", "mps"), "Auto takes an accelerator when there is one"
        ),
        Setting("seed", "Seed", "whole", help="Of the split, the controls and the bootstrap"),
        Setting("save.max_shard_size", "Largest weights file", "value"),
    ),
}
"""The advanced settings, in groups."""

SETTINGS: tuple[Setting, ...] = tuple(setting for group in GROUPS.values() for setting in group)
"""All of them, in order."""


def read_yaml(text: str) -> dict[str, Any]:
    """The mapping that a recipe's YAML holds, known keys or not.

    Raises:
        RecipeError: Too long, not YAML, or not a mapping.
    """
    if len(text) > _LONGEST:
        raise RecipeError(f"the recipe is {len(text):,} characters long, where {_LONGEST:,} are read")
    if "&" in text or "*" in text:
        # Anchors let a short text unfold into gigabytes, and no recipe needs them.
        _refuse_anchors(text)
    data = load_yaml(text, "recipe")
    if data is None:
        return {}
    if not isinstance(data, dict) or not all(isinstance(key, str) for key in data):
        raise RecipeError("a recipe is a mapping of keys to values, starting with target: and source:")
    return data


def recipe_of(data: Mapping[str, Any]) -> Recipe:
    """The recipe of a mapping.

    Raises:
        RecipeError: One line that names the key, its value and what is allowed.
    """
    kept = {key: value for key, value in data.items() if value not in ("", None) or key not in ("target", "source")}
    for role in ("target", "source"):
        if role not in kept:
            raise RecipeError(f"name a {role} model first")
    return Recipe.from_mapping(kept)


def from_preset(name: str) -> dict[str, Any]:
    """A preset as the form's mapping, without the sections that a merge does not read."""
    if name not in preset_names():
        raise RecipeError(f"there is no preset {name!r}; there are {', '.join(preset_names())}")
    data = load_recipe(name).model_dump(mode="json")
    return _short({key: value for key, value in data.items() if key not in _LEFT_OUT})


def with_value(data: Mapping[str, Any], key: str, value: Any) -> dict[str, Any]:
    """The mapping with one dotted key set, or without it where the value says nothing."""
    changed = {name: dict(inner) if isinstance(inner, dict) else inner for name, inner in data.items()}
    section, dot, name = key.partition(".")
    if dot:
        if not isinstance(changed.get(section), dict):
            changed[section] = {}
        place = changed[section]
    else:
        place, name = changed, section
    if value is None or value == "":
        place.pop(name, None)
    else:
        place[name] = value
    return _follow(data, changed) if key == "fusion.what" else changed


def _follow(before: Mapping[str, Any], changed: dict[str, Any]) -> dict[str, Any]:
    """Without the settings that said what was the default before: they follow to what is the default now."""
    for section in TASK_VECTOR_DEFAULTS:
        inner = changed.get(section)
        if isinstance(inner, dict):
            changed[section] = {
                name: value
                for name, value in inner.items()
                if name == "what" or not _is_default(f"{section}.{name}", value, before)
            }
    return changed


def write_yaml(data: Mapping[str, Any]) -> str:
    """A mapping as YAML, without what equals the default; unknown keys stay, to be complained about."""
    return yaml.dump(_short(data), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100)


class _Dumper(yaml.SafeDumper):
    """Lists on one line, mappings one key a line."""


_Dumper.add_representer(
    list, lambda dumper, value: dumper.represent_sequence("tag:yaml.org,2002:seq", value, flow_style=True)
)


def form_values(data: Mapping[str, Any]) -> list[Any]:
    """What the form shows for a mapping, setting by setting in the order of `SETTINGS`."""
    return [_shown(setting, _value_of(data, setting.key)) for setting in SETTINGS]


def holds_value(setting: Setting, data: Mapping[str, Any], value: Any) -> bool:
    """Whether what a component gave is what a mapping holds.

    Raises:
        RecipeError: As `typed_value`.
    """
    if value == _shown(setting, _value_of(data, setting.key)):
        return True
    # Written otherwise, as 0.10 is.
    return _short(with_value(data, setting.key, typed_value(setting, value))) == _short(data)


def typed_value(setting: Setting, value: Any) -> Any:
    """What a component gave, as YAML would have read it.

    Raises:
        RecipeError: It is not a number, or not YAML.
    """
    if setting.kind == "several":
        return list(value or [])
    if setting.kind == "whole" and isinstance(value, float) and value.is_integer():
        return int(value)
    if setting.kind == "value" and isinstance(value, str):
        text = value.strip()
        if setting.key == "fusion.alphas":
            text = f"[{text.strip('[]')}]"
        try:
            read = read_yaml(f"value: {text}")["value"]
        except TmergeError:
            raise RecipeError(f"{setting.label}: {value!r} is not a number or a word") from None
        return float(read) if isinstance(read, str) and _is_number(read) else read
    return value.strip() if isinstance(value, str) else value


def _is_number(text: str) -> bool:
    """YAML reads 1e-6, without a point, as a word."""
    try:
        float(text)
    except ValueError:
        return False
    return True


def _refuse_anchors(text: str) -> None:
    try:
        found = any(
            isinstance(token, (yaml.AnchorToken, yaml.AliasToken)) for token in yaml.scan(text, yaml.SafeLoader)
        )
    except yaml.YAMLError:
        return
    if found:
        raise RecipeError("the recipe uses YAML anchors (& and *), which are not read here; write the values out")


def _value_of(data: Mapping[str, Any], key: str) -> Any:
    section, dot, name = key.partition(".")
    if not dot:
        return data[section] if section in data else _default(key, data)
    inner = data.get(section)
    return inner[name] if isinstance(inner, dict) and name in inner else _default(key, data)


def _shown(setting: Setting, value: Any) -> Any:
    if setting.kind == "several":
        return [item for item in value if item in setting.choices] if isinstance(value, (list, tuple)) else []
    if setting.kind == "switch":
        return value is True
    if setting.kind == "choice":
        return value if value in setting.choices else None
    if setting.kind in ("whole", "number"):
        return value if isinstance(value, (int, float)) and not isinstance(value, bool) else None
    if isinstance(value, (list, tuple)):
        return ", ".join(map(str, value))
    return "" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def _default(key: str, data: Mapping[str, Any]) -> Any:
    """What a recipe that says `data` holds under a key that it does not name."""
    section, dot, name = key.partition(".")
    others = section_defaults(data).get(section, {})
    if name in others:
        return others[name]
    field = Recipe.model_fields[section]
    if not dot:
        return None if field.is_required() else field.default
    value = getattr(field.default, name)
    return list(value) if isinstance(value, tuple) else value


def _short(data: Mapping[str, Any]) -> dict[str, Any]:
    """Keys in the recipe's own order, and without what equals the default, but for `_ALWAYS`."""
    result: dict[str, Any] = {}
    known = [name for name in Recipe.model_fields if name in data]
    for name in [*known, *(name for name in data if name not in Recipe.model_fields)]:
        value = data[name]
        field = Recipe.model_fields.get(name)
        if field is not None and isinstance(field.default, BaseModel) and isinstance(value, dict):
            inner_fields = type(field.default).model_fields
            order = [key for key in inner_fields if key in value] + [key for key in value if key not in inner_fields]
            value = {
                key: value[key]
                for key in order
                if f"{name}.{key}" in _ALWAYS
                or key not in inner_fields
                or not _is_default(f"{name}.{key}", value[key], data)
            }
            if value:
                result[name] = value
        elif name in _ALWAYS or field is None or not _is_default(name, value, data):
            result[name] = value
    return result


def _is_default(key: str, value: Any, data: Mapping[str, Any]) -> bool:
    default = _default(key, data)
    default = list(default) if isinstance(default, tuple) else default
    return (
        type(value) is type(default)
        and value == default
        or (
            isinstance(value, (int, float))
            and isinstance(default, (int, float))
            and not isinstance(value, bool)
            and not isinstance(default, bool)
            and value == default
        )
    )
