"""Reading a recipe: a file, a preset or a variable, and the command line's words over it."""

from __future__ import annotations

import difflib
import os
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from tmerge.errors import RecipeError
from tmerge.recipe.recipe import Recipe
from tmerge.recipe.sources import repo_of
from tmerge.recipe.strict_yaml import load_yaml

__all__ = ["RECIPE_VARIABLE", "load_recipe", "parse_setting", "preset_names"]

RECIPE_VARIABLE = "TMERGE_RECIPE"
"""Where a machine without files finds its recipe: named as ``env:TMERGE_RECIPE``."""

_PRESETS = resources.files("tmerge.recipe") / "presets"


def preset_names() -> list[str]:
    """Names of the recipes that ship with the package."""
    return sorted(entry.name[:-5] for entry in _PRESETS.iterdir() if entry.name.endswith(".yaml"))


def load_recipe(
    name: str | None = None,
    overrides: Mapping[str, Any] | None = None,
    settings: Sequence[str] = (),
    *,
    start: Recipe | None = None,
) -> Recipe:
    """Read a recipe and lay the command line's words over it.

    Who names a ``source_base`` there, and no ``fusion.what``, wants what the source learned since, unless the recipe is
    one of a reconstruction, where it is the control ``source_base``. Who names an ``adapter``, or several ``sources``,
    wants what they learned. Each of them takes the place of whatever source the recipe has.

    Args:
        name: A YAML file, or a preset's name; None starts from the defaults, or from `start`.
        start: A recipe to begin from where no other is named.
        overrides: Top-level or dotted keys to values; None values are passed over.
        settings: ``section.key=value`` words of ``--set``; values are read as YAML.

    Raises:
        RecipeError: No such file or preset, not YAML, or not a valid recipe.
    """
    overrides = overrides or {}
    joined = bool(overrides.get("sources"))
    data, where = _read(name) if name is not None or start is None else (start.model_dump(mode="json"), "recipe")
    before = _models(data)
    for name in ("source", "adapter") if joined else ("sources",) if _names_one(overrides) else ():
        data.pop(name, None)
    for key, value in overrides.items():
        if value is not None:
            _put(data, key, value)
    said = dict(parse_setting(word) for word in settings)
    section = data.get("fusion")
    if overrides.get("adapter") is not None:
        _one_base(data, overrides)
    named = joined or overrides.get("source_base") is not None or overrides.get("adapter") is not None
    learned = named and overrides.get("fusion.what") is None
    if learned and not (isinstance(section, dict) and section.get("what") == "reconstruct"):
        _put(data, "fusion.what", "task-vector")
    for key, value in said.items():
        _put(data, key, value)
    # What a model is joined to goes with it, where another takes its place.
    if isinstance(bases := data.get("bases"), dict) and (gone := before - _models(data)):
        data["bases"] = {adapter: base for adapter, base in bases.items() if repo_of(str(adapter)) not in gone}
    return Recipe.from_mapping(data, where)


def _models(data: Mapping[str, Any]) -> set[str]:
    """The models that a recipe's mapping names, without revisions; what is no text names none."""
    listed = data.get("sources")
    entries = [entry.get("source") for entry in listed if isinstance(entry, dict)] if isinstance(listed, list) else []
    named = [data.get("target"), data.get("source"), data.get("source_base"), *entries]
    return {repo_of(name) for name in named if isinstance(name, str)}


def _names_one(overrides: Mapping[str, Any]) -> bool:
    """Whether one source is named, by itself or as an adapter."""
    return overrides.get("source") is not None or overrides.get("adapter") is not None


def _one_base(data: dict[str, Any], overrides: Mapping[str, Any]) -> None:
    """An adapter's base that is named beside it is source and source_base, whatever the recipe has for the other."""
    for name, other in (("source_base", "source"), ("source", "source_base")):
        if overrides.get(name) is not None and overrides.get(other) is None:
            data.pop(other, None)


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
            what = "is no file" if path.exists() else "no such file"
            raise RecipeError(f"recipe {name!r}: {what}; presets are {', '.join(preset_names())}")
        text, where = path.read_text(encoding="utf-8", errors="replace"), name
    elif name in preset_names():
        text, where = (_PRESETS / f"{name}.yaml").read_text("utf-8"), f"preset {name}"
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
