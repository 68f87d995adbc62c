"""JSON documents for others to read: strict, so that every parser takes them.

Python writes NaN and Infinity into JSON as bare words, which are none. A number that is undefined is null here, and
the document says of which kind it was; a result is never withheld because one number of it is undefined.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

__all__ = ["UNDEFINED", "json_text", "parse_json", "place_in", "restored"]

UNDEFINED = "undefined"
"""Key of a document under which the places that are null are listed, where there are any."""
_KINDS = ("nan", "inf", "-inf")
# Objects and lists within each other; what reads a document may recurse, and nobody has written one beyond this.
_DEEPEST = 100


def json_text(document: Mapping[str, Any], **options: Any) -> str:
    """A document as strict JSON.

    Args:
        document: JSON values. Numbers that are not finite become null, and are listed under ``undefined``: where they
            are in the document -> ``nan``, ``inf`` or ``-inf``.
        **options: As of ``json.dumps``.
    """
    undefined: dict[str, str] = {}
    strict = _strict(document, "", undefined)
    if undefined:
        strict[UNDEFINED] = undefined
    return json.dumps(strict, **options, allow_nan=False)


def parse_json(text: str) -> Any:
    """What a JSON document of others holds.

    Raises:
        json.JSONDecodeError: It is none, or nested beyond all use.
    """
    try:
        value = json.loads(text)
    except json.JSONDecodeError:
        raise
    except ValueError:  # a number of more digits than Python reads
        raise json.JSONDecodeError("a number of too many digits", text, 0) from None
    except RecursionError:
        raise json.JSONDecodeError("nested too deeply", text, 0) from None
    if text.count("[") + text.count("{") > _DEEPEST and _depth(value) > _DEEPEST:
        raise json.JSONDecodeError("nested too deeply", text, 0)
    return value


def _depth(value: Any) -> int:
    depth, level = 0, [value]
    while level:
        depth += 1
        containers = (item for item in level if isinstance(item, dict | list))
        level = [inner for item in containers for inner in (item.values() if isinstance(item, dict) else item)]
    return depth


def restored(document: Mapping[str, Any]) -> dict[str, Any]:
    """What was written by `json_text`, read back: undefined numbers as they were.

    Args:
        document: JSON values. Places that it lists and that are not null are left as they are.
    """
    undefined = document.get(UNDEFINED)
    if not isinstance(undefined, Mapping):
        return dict(document)
    found: dict[str, Any] = _restored({key: item for key, item in document.items() if key != UNDEFINED}, "", undefined)
    return found


def place_in(place: str, part: int | str) -> str:
    """A key or index of what is at a place in a document: ``a.b`` or ``a[0]``."""
    return f"{place}[{part}]" if isinstance(part, int) else f"{place}.{part}".lstrip(".")


def _strict(value: Any, place: str, undefined: dict[str, str]) -> Any:
    if isinstance(value, Mapping):
        return {key: _strict(item, place_in(place, key), undefined) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_strict(item, place_in(place, index), undefined) for index, item in enumerate(value)]
    if isinstance(value, float) and not math.isfinite(value):
        undefined[place] = str(float(value))
        return None
    return value


def _restored(value: Any, place: str, undefined: Mapping[str, Any]) -> Any:
    if isinstance(value, Mapping):
        return {key: _restored(item, place_in(place, key), undefined) for key, item in value.items()}
    if isinstance(value, list):
        return [_restored(item, place_in(place, index), undefined) for index, item in enumerate(value)]
    if value is None and undefined.get(place) in _KINDS:
        return float(undefined[place])
    return value
