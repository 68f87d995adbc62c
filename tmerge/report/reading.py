"""Reading a report.json that somebody wrote: it is a `Report`, or there is one line that says what is wrong with it."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from tmerge.documents import place_in, restored
from tmerge.errors import ReportError
from tmerge.report.report import SCHEMA, Report

__all__ = ["read_report", "report_of"]

_REMEDY = "run the merge again, or ask whoever made it for theirs"
_LONGEST = 60


def read_report(path: Path) -> Report:
    """A report from its file.

    Raises:
        ReportError: It cannot be read, is no JSON, or is not a report of this schema.
    """
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ReportError(f"{path} cannot be read: {error.strerror}; {_REMEDY}") from None
    except (ValueError, RecursionError):
        raise ReportError(f"{path} is damaged, it is no JSON; {_REMEDY}") from None
    return report_of(document, str(path))


def report_of(document: Any, where: str) -> Report:
    """A report from its document.

    Args:
        document: JSON values, as ``json.loads`` gives them.
        where: What to call it in errors.

    Raises:
        ReportError: It is of another schema, lacks something, holds something of the wrong kind, or a number that is
            none and not said to be undefined.
    """
    if not isinstance(document, Mapping) or "schema" not in document:
        raise ReportError(f"{where} is not a report of tmerge (it has no schema number); {_REMEDY}")
    schema = document["schema"]
    if isinstance(schema, int) and not isinstance(schema, bool) and schema != SCHEMA:
        raise ReportError(
            f"{where} is of schema {_shown(schema)}, and this tmerge reads schema {SCHEMA}; "
            + ("update tmerge" if schema > SCHEMA else _REMEDY)
        )
    for place, number in _not_finite(document):
        raise ReportError(f"{where} is no strict JSON, {place} is {number}; {_REMEDY}")
    try:
        return Report.model_validate(restored(document))
    except ValidationError as error:
        faults = error.errors(include_url=False)
        more = f" (and {len(faults) - 1} more)" if len(faults) > 1 else ""
        raise ReportError(
            f"{where} is not a report that this tmerge can read: {_fault(faults[0], document)}{more}; {_REMEDY}"
        ) from None


def _fault(fault: Any, document: Mapping[str, Any]) -> str:
    """What is wrong and where, in words."""
    place, value = "", document
    for part in fault["loc"]:
        if not _has(value, part):
            # What is missing has a place of its own; other parts name a kind that was tried, and are no place.
            place = place_in(place, part) if fault["type"] == "missing" else place
            break
        place, value = place_in(place, part), value[part]
    place = place if place.isprintable() else ascii(place)
    if fault["type"] == "missing":
        return f"{place} is missing"
    if fault["type"] == "value_error":
        said = str(fault["ctx"]["error"])
        return f"in {place}, {said}" if place else said
    if value is None:
        return f"{place} is null"
    said = fault["msg"].removeprefix("Input ")
    return f"{place} {said[:1].lower()}{said[1:]}, and is {_shown(value)}"


def _has(value: Any, part: int | str) -> bool:
    if isinstance(part, int):
        return isinstance(value, list) and part < len(value)
    return isinstance(value, Mapping) and part in value


def _shown(value: Any) -> str:
    """A value on one line, not at any length."""
    if isinstance(value, Mapping):
        return "an object"
    if isinstance(value, list):
        return "a list"
    text = ascii(value) if not isinstance(value, int) or value.bit_length() < 200 else "a very large number"
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."


def _not_finite(value: Any, place: str = "") -> Iterator[tuple[str, float]]:
    """Numbers that Python's reader takes and JSON does not know."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from _not_finite(item, place_in(place, key))
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from _not_finite(item, place_in(place, index))
    elif isinstance(value, float) and not math.isfinite(value):
        yield (place if place.isprintable() else ascii(place)), value
