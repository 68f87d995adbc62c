"""Reading a document that somebody wrote: it is of its type, or there is one line that says what is wrong with it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from pydantic import ValidationError

from tmerge.documents import parse_json, place_in, restored
from tmerge.errors import ReportError, TmergeError
from tmerge.report.parts import Part
from tmerge.report.report import SCHEMA, Report
from tmerge.validation import value_due

__all__ = ["DocumentKind", "read_report", "report_of"]

_LONGEST = 60
_Document = TypeVar("_Document", bound=Part)


@dataclass(frozen=True)
class DocumentKind(Generic[_Document]):
    """A kind of document that has a schema number, and how a wrong one is spoken of.

    Attributes:
        read_as: Its type.
        schema: The number that this tmerge writes and reads.
        name: ``report``.
        error: Raised where it cannot be read.
        remedy: Ends each error's line.
    """

    read_as: type[_Document]
    schema: int
    name: str
    error: type[TmergeError]
    remedy: str

    def read(self, path: Path) -> _Document:
        """A document from its file.

        Raises:
            TmergeError: `error`: it cannot be read, is no JSON, or is not a document of this kind and schema.
        """
        try:
            document = parse_json(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise self.error(f"{path} cannot be read: {error.strerror}; {self.remedy}") from None
        except ValueError:
            raise self.error(f"{path} is damaged, it is no JSON; {self.remedy}") from None
        return self.of(document, str(path))

    def of(self, document: Any, where: str) -> _Document:
        """A document from its JSON values.

        Args:
            document: As ``json.loads`` gives them.
            where: What to call it in errors.

        Raises:
            TmergeError: `error`: it is of another schema, lacks something, holds something of the wrong kind, or a
                number that is none and not said to be undefined.
        """
        if not isinstance(document, Mapping) or "schema" not in document:
            raise self.error(f"{where} is not a {self.name} of tmerge (it has no schema number); {self.remedy}")
        schema = document["schema"]
        if isinstance(schema, int) and not isinstance(schema, bool) and schema != self.schema:
            raise self.error(
                f"{where} is of schema {_shown(schema)}, and this tmerge reads schema {self.schema}; "
                + ("update tmerge" if schema > self.schema else self.remedy)
            )
        for place, number in _not_finite(document):
            raise self.error(f"{where} is no strict JSON, {place} is {number}; {self.remedy}")
        try:
            return self.read_as.model_validate(restored(document))
        except ValidationError as error:
            faults = error.errors(include_url=False)
            more = f" (and {len(faults) - 1} more)" if len(faults) > 1 else ""
            raise self.error(
                f"{where} is not a {self.name} that this tmerge can read: {_fault(faults[0], document)}{more}; "
                f"{self.remedy}"
            ) from None


_REPORTS = DocumentKind(Report, SCHEMA, "report", ReportError, "run the merge again, or ask whoever made it for theirs")


def read_report(path: Path) -> Report:
    """A report from its file.

    Raises:
        ReportError: It cannot be read, is no JSON, or is not a report of this schema.
    """
    return _REPORTS.read(path)


def report_of(document: Any, where: str) -> Report:
    """A report from its document; see `DocumentKind.of`.

    Raises:
        ReportError: It is not a report that can be read.
    """
    return _REPORTS.of(document, where)


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
    due = value_due(fault)
    said = f"{fault['msg'][:1].lower()}{fault['msg'][1:]}" if due is None else f"should be {due}"
    return f"{place} {said}, and is {_shown(value)}"


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
