"""YAML as recipes are written in it: no key twice, and every number a number."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Hashable
from typing import Any

import yaml

from tmerge.errors import RecipeError

__all__ = ["StrictDumper", "load_yaml", "shown_value"]


class _KeyTwiceError(yaml.MarkedYAMLError):
    pass


class _Loader(yaml.SafeLoader):
    """The safe loader, but for a key that is given twice: YAML lets the last one win without a word."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        first: dict[tuple[str, str], int] = {}
        for key, _ in node.value:
            written = (key.tag, str(key.value))
            if written in first:
                raise _KeyTwiceError(
                    problem=f"the key {key.value!r} is given twice, first in line {first[written]}; keep one of them",
                    problem_mark=key.start_mark,
                )
            first[written] = key.start_mark.line + 1
        return super().construct_mapping(node, deep)


# YAML 1.1 has no number without a point before its exponent: 1e-6 would be a word. YAML 1.2 has.
_NUMBER = ("tag:yaml.org,2002:float", re.compile(r"[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789"))
_Loader.add_implicit_resolver(*_NUMBER)


class StrictDumper(yaml.SafeDumper):
    """Writes what is read back as it was: texts like numbers, and what YAML takes for the end of a line, in quotes."""


def _written(dumper: StrictDumper, text: str) -> yaml.ScalarNode:
    quoted = len(f"{text}.".splitlines()) > 1
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style='"' if quoted else None)


StrictDumper.add_implicit_resolver(*_NUMBER)
StrictDumper.add_representer(str, _written)


def load_yaml(text: str, where: str) -> Any:
    """What a YAML document holds.

    Args:
        text: The document.
        where: Named in the error.

    Raises:
        RecipeError: It is no YAML, gives a key twice, or holds a value that cannot be read; one line, with the line's
            number.
    """
    try:
        value = yaml.load(text, _Loader)
        json.dumps(value, default=str)  # which finds what holds itself
        return value
    except _KeyTwiceError as error:
        raise RecipeError(f"{where}{_line(error)}: {error.problem}") from None
    except yaml.YAMLError as error:
        problem = getattr(error, "problem", None) or "unreadable"
        raise RecipeError(f"{where}{_line(error)}: not YAML ({problem})") from None
    except (
        ValueError,
        TypeError,
        RecursionError,
    ):  # no date, no end, an anchor within itself
        raise RecipeError(f"{where}: a value in it cannot be read; quote it") from None


def _line(error: yaml.YAMLError) -> str:
    mark = getattr(error, "problem_mark", None)
    return "" if mark is None else f", line {mark.line + 1}"


def shown_value(value: Any, longest: int = 100) -> str:
    """A value on one line as YAML has it, texts in quotes, for messages.

    Args:
        value: As YAML gives it.
        longest: Characters; what is beyond is cut off.
    """
    text = _flow(value)
    return text if len(text) <= longest else f"{text[: longest - 1]}…"


def _flow(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    if isinstance(value, float) and not math.isfinite(value):
        return f".{value}".replace(".-", "-.")
    if isinstance(value, dict):
        return f"{{{', '.join(f'{_flow(key)}: {_flow(item)}' for key, item in value.items())}}}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_flow, value))}]"
    return repr(value) if isinstance(value, str) else str(value)
