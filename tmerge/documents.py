"""JSON documents for others to read: strict, so that every parser takes them.

Python writes NaN and Infinity into JSON as bare words, which are none. A number that is undefined is null here, and
the document says of which kind it was; a result is never withheld because one number of it is undefined.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

__all__ = ["UNDEFINED", "json_text"]

UNDEFINED = "undefined"
"""Key of a document under which the places that are null are listed, where there are any."""


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


def _strict(value: Any, place: str, undefined: dict[str, str]) -> Any:
    if isinstance(value, Mapping):
        return {key: _strict(item, f"{place}.{key}".lstrip("."), undefined) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_strict(item, f"{place}[{index}]", undefined) for index, item in enumerate(value)]
    if isinstance(value, float) and not math.isfinite(value):
        undefined[place] = str(float(value))
        return None
    return value
