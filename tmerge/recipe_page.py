"""All keys of a recipe, as a page: written from the recipe's own schema, so that it cannot say anything else."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from tmerge.recipe import Recipe

__all__ = ["recipe_page"]

_HEAD = """# The recipe

Everything that decides a run is one YAML file. Each key can also be set on the command line: `--set section.key=value`.
Unknown keys, keys given twice and values of another kind are refused. `tmerge recipe` prints this page, and the
`tmerge/recipe.yaml` of a finished run has every key written out.

A task vector (`fusion.what: task-vector`) has defaults of its own: see `TASK_VECTOR_DEFAULTS` in `tmerge/sections.py`.
"""
_BOUNDS = {"minimum": "at least", "exclusiveMinimum": "above", "maximum": "at most", "exclusiveMaximum": "below"}


def recipe_page() -> str:
    """Markdown: a table for the top level, and one for each section, of key, kind of value, default and meaning."""
    schema = Recipe.model_json_schema()
    sections = {name: _section(field, schema) for name, field in schema["properties"].items()}
    parts = [_HEAD, "## Top level\n", _table(schema, {name for name, section in sections.items() if section is None})]
    for name, section in sections.items():
        if section is not None:
            parts += [f"## {name}\n", f"{section['description']}\n", _table(section, set(section["properties"]))]
    return "\n".join(parts)


def _section(field: Mapping[str, Any], schema: Mapping[str, Any]) -> dict[str, Any] | None:
    """The schema of the section that a top-level key holds; None where it holds a value."""
    for choice in (field, *field.get("anyOf", ())):
        if "$ref" in choice:
            found: dict[str, Any] = schema["$defs"][choice["$ref"].rpartition("/")[2]]
            return found
    return None


def _table(schema: Mapping[str, Any], names: set[str]) -> str:
    rows = ["| key | value | default | |", "|---|---|---|---|"]
    for name, field in schema["properties"].items():
        if name in names:
            default = f"`{json.dumps(field['default'], ensure_ascii=False)}`" if "default" in field else "must be given"
            cells = (f"`{name}`", _kind(field), default, field.get("description", ""))
            rows.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(rows) + "\n"


def _kind(field: Mapping[str, Any]) -> str:
    """What kind of value a key takes, in words."""
    if "anyOf" in field:
        return " or ".join(_kind(choice) for choice in field["anyOf"])
    if "enum" in field or "const" in field:
        return ", ".join(f"`{value}`" for value in field.get("enum", [field.get("const")]))
    kind = field.get("type")
    if kind == "array":
        inner = field.get("items") or {"type": "number"}
        return f"list of: {_kind(inner)}"
    if kind == "object":
        return f"name: {_kind(field['additionalProperties'])}"
    words = {
        "string": "text",
        "integer": "whole number",
        "number": "number",
        "boolean": "true or false",
        "null": "null",
    }
    bounds = [f"{says} {field[bound]:g}" for bound, says in _BOUNDS.items() if bound in field]
    return ", ".join([words[str(kind)], *bounds])
