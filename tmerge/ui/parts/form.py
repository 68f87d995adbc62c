"""The recipe as a form and as YAML, each made from the other. No components here: text and plain values only.

The YAML is what counts. It is short: what equals the default is left out, but for what a reader wants to see.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import yaml

from tmerge.errors import RecipeError, TmergeError
from tmerge.recipe import Recipe, Reconstruction, TaskVector, load_recipe, load_yaml, preset_names
from tmerge.recipe.schema import sections_of, top_level
from tmerge.recipe.strict_yaml import StrictDumper
from tmerge.recipe.unsaid import with_unsaid
from tmerge.ui.parts.fields import SETTINGS, Setting

__all__ = [
    "form_values",
    "from_preset",
    "holds_value",
    "preset_of",
    "read_yaml",
    "recipe_of",
    "section_of",
    "typed_value",
    "with_adapter",
    "with_dataset",
    "with_value",
    "write_yaml",
]

# Longest recipe that is read; a page of comments fits, a bomb of nested lists does not.
_LONGEST = 20_000
_ALWAYS = ("target", "source", "calibration.dataset", "calibration.texts", "fusion.alpha", "fusion.projections")
# Only `tmerge compare` and `tmerge adapt` read these.
_LEFT_OUT = ("compare", "published", "adaptation")

_OF_IT = ("dataset", "config", "split", "column")

_SECTIONS = sections_of(Recipe)
_DECIDING = {setting.key for setting in SETTINGS if setting.decides}


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
    settings = load_yaml(text, "recipe")
    if settings is None:
        return {}
    if not isinstance(settings, dict) or not all(isinstance(key, str) for key in settings):
        raise RecipeError("a recipe is a mapping of keys to values, starting with target: and source:")
    return settings


def recipe_of(draft: Mapping[str, Any]) -> Recipe:
    """The recipe of a mapping.

    Raises:
        RecipeError: One line that names the key, its value and what is allowed.
    """
    kept = {key: value for key, value in draft.items() if value not in ("", None) or key not in ("target", "source")}
    for role in ("target", "source"):
        # Several are named in the YAML alone, and have their base in the place of a source.
        if role not in kept and not (role == "source" and kept.get("sources")):
            raise RecipeError(f"name a {role} model first")
    return Recipe.from_mapping(kept)


def from_preset(name: str) -> dict[str, Any]:
    """A preset as the form's mapping, without the sections that a merge does not read."""
    if name not in preset_names():
        raise RecipeError(f"there is no preset {name!r}; there are {', '.join(preset_names())}")
    settings = load_recipe(name).model_dump(mode="json")
    return _short({key: value for key, value in settings.items() if key not in _LEFT_OUT})


@functools.cache
def _preset_yaml() -> dict[str, str]:
    return {write_yaml(from_preset(name)): name for name in preset_names()}


def preset_of(draft: Mapping[str, Any]) -> str | None:
    """The preset that a mapping is; None where it is none, or none any more."""
    return _preset_yaml().get(write_yaml(draft))


def section_of(draft: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """A section of the mapping; empty where it says nothing, or what is no mapping."""
    section = draft.get(name)
    return section if isinstance(section, dict) else {}


def with_value(draft: Mapping[str, Any], key: str, value: Any) -> dict[str, Any]:
    """The mapping with one dotted key set, or without it where the value says nothing."""
    changed = {name: dict(inner) if isinstance(inner, dict) else inner for name, inner in draft.items()}
    section, dot, name = key.partition(".")
    if dot:
        if not isinstance(changed.get(section), dict):
            changed[section] = {}
        holder = changed[section]
    else:
        holder, name = changed, section
    if value is None or value == "":
        holder.pop(name, None)
    else:
        holder[name] = value
    return _follow(draft, changed, key) if key in _DECIDING else changed


def with_adapter(draft: Mapping[str, Any], name: str) -> dict[str, Any]:
    """The mapping with an adapter of the source, whose change is a task vector; or without one, and what came with it.

    Args:
        draft: The recipe.
        name: Of the adapter; empty for none.
    """
    before = draft.get("adapter")
    changed = with_value(draft, "adapter", name)
    if not name and before and changed.get("source_base") in (None, changed.get("source")):
        changed.pop("source_base", None)
        return with_value(changed, "fusion.what", "weights")
    if name and _value_of(draft, "fusion.what") != "task-vector":
        return with_value(changed, "fusion.what", "task-vector")
    return changed


def with_dataset(draft: Mapping[str, Any], dataset: str) -> dict[str, Any]:
    """The mapping with another dataset, and without what was said of the one before."""
    kept = {key: value for key, value in section_of(draft, "calibration").items() if key not in _OF_IT}
    return {**draft, "calibration": {"dataset": dataset, **kept}}


def _follow(before: Mapping[str, Any], changed: dict[str, Any], key: str) -> dict[str, Any]:
    """Without the settings that said what was the default before, which follow to what is the default now.

    Nor with those that what is chosen now does not have.
    """
    for section in {"fusion", *TaskVector.beside, *Reconstruction.beside} if key == "fusion.what" else ():
        inner = changed.get(section)
        if isinstance(inner, dict):
            changed[section] = {
                name: value
                for name, value in inner.items()
                if f"{section}.{name}" == key or not _is_default(f"{section}.{name}", value, before)
            }
    filled = with_unsaid(changed)
    for section, facts in _SECTIONS.items():
        inner = changed.get(section)
        if isinstance(inner, dict) and facts.chooser is not None:
            known = facts.kinds[facts.chosen(filled[section])].keys
            changed[section] = {
                name: value for name, value in inner.items() if name in known or not facts.kinds_with(name)
            }
    return changed


def write_yaml(draft: Mapping[str, Any]) -> str:
    """A mapping as YAML, without what equals the default; unknown keys stay, to be complained about."""
    return yaml.dump(_short(draft), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100)


class _Dumper(StrictDumper):
    """Lists on one line, mappings one key a line."""


_Dumper.add_representer(
    list, lambda dumper, value: dumper.represent_sequence("tag:yaml.org,2002:seq", value, flow_style=True)
)


def form_values(draft: Mapping[str, Any]) -> dict[Setting, Any]:
    """What the form shows for a mapping, by setting."""
    return {setting: _shown(setting, _value_of(draft, setting.key)) for setting in SETTINGS}


def holds_value(setting: Setting, draft: Mapping[str, Any], value: Any) -> bool:
    """Whether what a component gave is what a mapping holds.

    Raises:
        RecipeError: As `typed_value`.
    """
    if value == _shown(setting, _value_of(draft, setting.key)):
        return True
    # Written otherwise, as 0.10 is.
    return _short(with_value(draft, setting.key, typed_value(setting, value))) == _short(draft)


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
        if setting.listed:
            text = f"[{text.strip('[]')}]"
        try:
            read = read_yaml(f"value: {text}")["value"]
        except TmergeError:
            raise RecipeError(f"{setting.key} is {value!r}: a number or a word is meant") from None
        try:
            # YAML reads 1e-6, without a point, as a word.
            return float(read) if isinstance(read, str) else read
        except ValueError:
            return read
    return value.strip() if isinstance(value, str) else value


def _refuse_anchors(text: str) -> None:
    try:
        anchored = any(
            isinstance(token, (yaml.AnchorToken, yaml.AliasToken)) for token in yaml.scan(text, yaml.SafeLoader)
        )
    except yaml.YAMLError:
        return
    if anchored:
        raise RecipeError("the recipe uses YAML anchors (& and *), which are not read here; write the values out")


def _value_of(draft: Mapping[str, Any], key: str) -> Any:
    section, dot, name = key.partition(".")
    if not dot:
        return draft[section] if section in draft else _default(key, draft)
    inner = section_of(draft, section)
    return inner[name] if name in inner else _default(key, draft)


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


def _default(key: str, draft: Mapping[str, Any]) -> Any:
    """What a recipe that says `draft` holds under a key that it does not name; None where it has no such key."""
    section, dot, name = key.partition(".")
    if not dot:
        return top_level(Recipe)[section].get("default") if section in top_level(Recipe) else None
    inner = draft.get(section)
    rest = {key: value for key, value in inner.items() if key != name} if isinstance(inner, dict) else inner
    filled = with_unsaid({**draft, section: rest}).get(section)
    if isinstance(filled, dict) and name in filled:
        return filled[name]
    facts = _SECTIONS[section]
    return facts.kinds[facts.chosen(filled)].keys.get(name, {}).get("default")


def _short(draft: Mapping[str, Any]) -> dict[str, Any]:
    """Keys in the recipe's own order, and without what equals the default, but for `_ALWAYS`."""
    result: dict[str, Any] = {}
    filled = with_unsaid(draft)
    known = [name for name in Recipe.model_fields if name in draft]
    for name in [*known, *(name for name in draft if name not in known)]:
        value, facts = draft[name], _SECTIONS.get(name)
        if facts is not None and isinstance(value, dict):
            keys = facts.kinds[facts.chosen(filled[name])].keys
            order = [key for key in keys if key in value] + [key for key in value if key not in keys]
            value = {
                key: value[key]
                for key in order
                if f"{name}.{key}" in _ALWAYS
                or key in filled[name]
                and not _is_default(f"{name}.{key}", value[key], draft)
            }
            if value:
                result[name] = value
        elif name in _ALWAYS or name not in known or not _is_default(name, value, draft):
            result[name] = value
    return result


def _is_default(key: str, value: Any, draft: Mapping[str, Any]) -> bool:
    default = _default(key, draft)
    # Of a switch, 1 is no way to say yes.
    return bool(value == default) and isinstance(value, bool) == isinstance(default, bool)
