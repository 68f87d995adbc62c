"""What is wrong with a recipe, in one line that names the key, its value, and what to write instead."""

from __future__ import annotations

import difflib
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from tmerge.recipe.schema import SectionFacts, entries_of, kind_words, sections_of, top_level
from tmerge.recipe.strict_yaml import shown_value
from tmerge.validation import value_due

__all__ = ["one_line"]

_MENDED_FIRST = {"extra_forbidden": 0, "missing": 2}
_MAPPING = "a mapping of keys to values"
_LONGEST_LIST = 200
# Keys that an option of the command line gives as well, among those that have to be there.
_OPTIONS = ("target", "source", "source_base")


def one_line(error: ValidationError, where: str, model: type[BaseModel]) -> str:
    """The first mistake, and how many more there are.

    Args:
        error: What pydantic found.
        where: Named first: a file or a preset.
        model: The recipe's.
    """
    mistakes = error.errors(include_url=False)
    # What is misspelt, or of the wrong kind, often leaves another key missing: it is what to mend.
    first = min(mistakes, key=lambda mistake: _MENDED_FIRST.get(mistake["type"], 1))
    # One value that is neither this nor that is one mistake.
    keys = [_key(mistake["loc"], model) for mistake in mistakes]
    key, others = _key(first["loc"], model), len(dict.fromkeys(keys)) - 1
    more = f" (and {others} more)" if others else ""
    return f"{where}: {_said(first, key, keys.count(key) > 1, model)}{more}"


def _said(error: ErrorDetails, key: tuple[str, ...], neither: bool, model: type[BaseModel]) -> str:
    name, value = ".".join(key), error["input"]
    section = sections_of(model).get(key[0]) if key else None
    if error["loc"][-1:] == ("[key]",):
        return f"{name}: the key {shown_value(value)} is no text; put it in quotes"
    if len(key) > 1 and key[0] in entries_of(model):
        return _said_of_entry(error, key, model)
    if error["type"] in ("extra_forbidden", "invalid_key"):
        return _unknown(key, value, error["loc"], section, model)
    if error["type"] == "missing":
        return _missing(error, key)
    if error["type"] == "union_tag_invalid" and section is not None:
        return _no_kind(section, value)
    if len(key) == 1 and section is not None and (error["type"] == "union_tag_not_found" or value_due(error)):
        return f"{name} is {shown_value(value)}: a section is {_MAPPING}"
    # What is said of a whole section comes from a validator that names its keys itself.
    if isinstance(value, dict) and (not key or section is not None and len(key) == 1):
        return _message(error)
    # Of a list it is one of its values.
    verb = "has" if any(isinstance(part, int) for part in error["loc"][1:]) else "is"
    said = f"{name} {verb} {shown_value(value)}: "
    if name in entries_of(model) and value_due(error) == "a list":
        return f"{said}write a list of mappings, {_as_entry(name, model)}"
    if section is None or len(key) < 2:
        return said + _remedy(error)
    chosen = _chosen(error["loc"], section)
    schema = section.schema(key[1], chosen)
    remedy = f"write a {kind_words(schema).replace('`', '')}" if neither else _remedy(error)
    # Where another kind of the section takes other values, it is this kind that refuses it.
    limits = {kind_words(section.schema(key[1], kind)) for kind in section.kinds_with(key[1])}
    because = f", with {section.name}.{section.chooser}: {chosen}" if len(limits) > 1 else ""
    return f"{said}{remedy}{because}"


def _message(error: ErrorDetails) -> str:
    """What a validator of ours says."""
    return str(error["msg"]).removeprefix("Value error, ")


def _remedy(error: ErrorDetails) -> str:
    """What to write in a value's place."""
    due, value = value_due(error, _MAPPING), error["input"]
    if due is None:
        message = _message(error)
        return message[:1].lower() + message[1:]
    if due == "text" and value is not None and not isinstance(value, list | tuple | dict):
        return "that is no text in YAML; put it in quotes"
    if due == "a list" and isinstance(value, str):
        listed = ", ".join(part.strip() for part in value.split(","))
        return f"write a list: [{listed}]" if len(listed) <= _LONGEST_LIST else "write a list: [one, another]"
    return f"write {due}"


def _missing(error: ErrorDetails, key: tuple[str, ...]) -> str:
    name, value = ".".join(key), error["input"]
    if isinstance(error["loc"][-1], int):
        return f"{name} is {shown_value(value)}: its value number {error['loc'][-1] + 1} is missing; write it too"
    if name == "source" and isinstance(value, dict) and value.get("sources"):
        return "'source_base' is missing: the model that all sources were made from; name it beside sources"
    if name in _OPTIONS:
        return f"{name!r} is missing; name it in the recipe or as --{name.replace('_', '-')} REF"
    return f"{name!r} is missing; write it under {key[0]}"


def _said_of_entry(error: ErrorDetails, key: tuple[str, ...], model: type[BaseModel]) -> str:
    """Of one of several sections in a list, or of a key of one: ``weight of source 2 is -1: ...``."""
    entry, value = f"{key[0].removesuffix('s')} {key[1]}", error["input"]
    known = list(entries_of(model)[key[0]].keys)
    if error["type"] in ("extra_forbidden", "invalid_key"):
        return f"unknown key {key[2]!r} of {entry}; {_meant(key[2], known)} All keys: tmerge recipe"
    if len(key) == 2 and value_due(error) is not None:
        return f"{entry} is {shown_value(value)}: {_MAPPING} is meant, {_as_entry(key[0], model)}"
    if len(key) == 2:
        return f"{entry}: {_message(error)}"
    return f"{key[2]} of {entry} is {shown_value(value)}: {_remedy(error)}"


def _as_entry(name: str, model: type[BaseModel]) -> str:
    first, second, *_ = entries_of(model)[name].keys
    return f"as - {first}: REF or - {second}: REF"


def _key(location: tuple[int | str, ...], model: type[BaseModel]) -> tuple[str, ...]:
    """The recipe's keys in an error's location, which also has union members, kinds of sections and places in lists."""
    first, *rest = map(str, location) if location else ("",)
    section = sections_of(model).get(first)
    if first in entries_of(model) and rest and rest[0].isdecimal():
        return (first, str(int(rest[0]) + 1), *rest[1:2])
    if section is None:
        return (first,) if first else ()
    if section.chooser is not None and rest and rest[0] in section.kinds:
        rest = rest[1:]
    # A key that holds names of the user's own is followed by one of them.
    named = rest and any(kind.keys.get(rest[0], {}).get("type") == "object" for kind in section.kinds.values())
    return (first, *rest[: 2 if named else 1])


def _chosen(location: tuple[int | str, ...], section: SectionFacts) -> str:
    return str(location[1]) if section.chooser is not None else next(iter(section.kinds))


def _unknown(
    key: tuple[str, ...],
    value: Any,
    location: tuple[int | str, ...],
    section: SectionFacts | None,
    model: type[BaseModel],
) -> str:
    """A key that is not there, or not with what was chosen."""
    name, last = ".".join(key), key[-1]
    if section is None:
        return f"unknown key {name!r}; {_meant(last, [*top_level(model), *sections_of(model)])} All keys: tmerge recipe"
    chosen = _chosen(location, section)
    elsewhere = section.kinds_with(last)
    if elsewhere:
        kind = f"{section.name}.{section.chooser}: {elsewhere[0]}"
        what = section.schema(last)["description"]
        return f"{name} is {shown_value(value)}, which needs {kind}; set that, or drop {name} ({what})"
    own = section.kinds[chosen].keys
    every = dict.fromkeys(other for kind in section.kinds.values() for other in kind.keys)
    near = _near(last, [*own, *every])
    if near is not None and near not in own:
        kind = f"{section.name}.{section.chooser}: {section.kinds_with(near)[0]}"
        return f"unknown key {name!r}; did you mean {near!r}, which needs {kind}? All keys: tmerge recipe"
    return f"unknown key {name!r}; {_meant(last, list(own))} All keys: tmerge recipe"


def _near(word: str, known: list[str]) -> str | None:
    return next(iter(difflib.get_close_matches(word, known, 1, cutoff=0.4)), None)


def _meant(word: str, known: list[str]) -> str:
    near = _near(word, known)
    return f"there are {', '.join(known)}." if near is None else f"did you mean {near!r}?"


def _no_kind(section: SectionFacts, value: Any) -> str:
    given = value.get(section.chooser) if isinstance(value, dict) else getattr(value, str(section.chooser), None)
    return f"{section.name}.{section.chooser} is {shown_value(given)}: it takes {' or '.join(section.kinds)}"
