"""What a recipe's own schema says of its keys: sections, kinds, choices, bounds, defaults and descriptions.

Read by the page of all keys, by the lines that say what is wrong with a recipe, and by the app's form.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

from pydantic import BaseModel

__all__ = ["Keys", "Kind", "SectionFacts", "entries_of", "kind_words", "sections_of", "top_level"]

Keys = Mapping[str, Mapping[str, Any]]
"""Key -> its JSON schema."""

_WORDS = {
    "string": "text",
    "integer": "whole number",
    "number": "number",
    "boolean": "true or false",
    "null": "null",
}


@dataclass(frozen=True)
class Kind:
    """One kind of a section.

    Attributes:
        description: Of its class, in Markdown.
        keys: That it has, in order.
    """

    description: str
    keys: Keys


@dataclass(frozen=True)
class SectionFacts:
    """A section of the recipe.

    Attributes:
        name: At the top level.
        chooser: The key whose value says of which kind it is; None where there is one kind.
        kinds: That value -> the kind, the first being the default; the one kind under "".
    """

    name: str
    chooser: str | None
    kinds: Mapping[str, Kind]

    def chosen(self, section: Any) -> str:
        """Of which kind a section's mapping is; the default, where it says nothing that can be read."""
        value = section.get(self.chooser) if isinstance(section, Mapping) and self.chooser is not None else None
        return value if isinstance(value, str) and value in self.kinds else next(iter(self.kinds))

    def kinds_with(self, key: str) -> list[str]:
        """Values of the chooser with which there is such a key."""
        return [value for value, kind in self.kinds.items() if key in kind.keys]

    def schema(self, key: str, chosen: str | None = None) -> Mapping[str, Any]:
        """A key's schema: in the kind that is chosen, or else in the first that has it.

        Raises:
            KeyError: No kind has it.
        """
        if chosen is not None and key in self.kinds[chosen].keys:
            return self.kinds[chosen].keys[key]
        for kind in self.kinds.values():
            if key in kind.keys:
                return kind.keys[key]
        raise KeyError(key)


@cache
def sections_of(model: type[BaseModel]) -> dict[str, SectionFacts]:
    """The sections of a recipe's model, by name."""
    schema, sections = model.model_json_schema(), {}
    for name, field in schema["properties"].items():
        choices = [choice["$ref"] for choice in (field, *_either(field)) if "$ref" in choice]
        kinds = [_kind(schema, reference) for reference in choices]
        if len(kinds) > 1:
            chooser = next(key for key in kinds[0].keys if all("const" in kind.keys.get(key, ()) for kind in kinds))
            sections[name] = SectionFacts(name, chooser, {kind.keys[chooser]["const"]: kind for kind in kinds})
        elif kinds:
            sections[name] = SectionFacts(name, None, {"": kinds[0]})
    return sections


@cache
def entries_of(model: type[BaseModel]) -> dict[str, Kind]:
    """Keys of a recipe's model that hold lists of sections -> what each of those is."""
    schema = model.model_json_schema()
    listed = {name: (field.get("items") or {}).get("$ref") for name, field in schema["properties"].items()}
    return {name: _kind(schema, reference) for name, reference in listed.items() if reference is not None}


@cache
def top_level(model: type[BaseModel]) -> Keys:
    """The keys of a recipe's model that are values, not sections."""
    fields: dict[str, Any] = model.model_json_schema()["properties"]
    return {name: field for name, field in fields.items() if name not in sections_of(model)}


def kind_words(key: Mapping[str, Any]) -> str:
    """What kind of value a key takes, in words."""
    if "$ref" in key:
        return "section, below"
    if "anyOf" in key:
        return " or ".join(map(kind_words, key["anyOf"]))
    if "enum" in key or "const" in key:
        return ", ".join(f"`{value}`" for value in key.get("enum", [key.get("const")]))
    if key.get("type") == "array":
        return f"list of: {kind_words(key.get('items') or {'type': 'number'})}"
    if key.get("type") == "object":
        return f"name: {kind_words(key['additionalProperties'])}"
    return " ".join([_WORDS[str(key.get("type"))], *_bounds(key)])


def _bounds(key: Mapping[str, Any]) -> list[str]:
    """``in [0, 1]``, ``in (0, 0.9)``, ``of 8 or more``, ``above 0``; nothing where all values are taken."""
    low, high = key.get("minimum", key.get("exclusiveMinimum")), key.get("maximum", key.get("exclusiveMaximum"))
    if low is not None and high is not None:
        opened, closed = "[" if "minimum" in key else "(", "]" if "maximum" in key else ")"
        return [f"in {opened}{low:.10g}, {high:.10g}{closed}"]
    if low is not None:
        return [f"of {low:g} or more" if "minimum" in key else f"above {low:g}"]
    return [] if high is None else [f"of {high:g} or less" if "maximum" in key else f"below {high:g}"]


def _either(field: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    return [*field.get("anyOf", ()), *field.get("oneOf", ())]


def _kind(schema: Mapping[str, Any], reference: str) -> Kind:
    definition = schema["$defs"][reference.rpartition("/")[2]]
    return Kind(definition["description"], definition["properties"])
