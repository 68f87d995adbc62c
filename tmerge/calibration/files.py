"""Rows of a local data file, one at a time, with errors that name the line."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TextIO

import pyarrow
import pyarrow.parquet

from tmerge.documents import parse_json
from tmerge.errors import DatasetError

__all__ = ["AS_A_FILE", "FILE_SUFFIXES", "Row", "local_file", "read_file", "refuse_unreadable"]


class Row(dict[str, Any]):
    """A row's values by column.

    Attributes:
        where: It is in its file: ``line 4``.
    """

    def __init__(self, values: Mapping[str, Any], where: str) -> None:
        super().__init__(values)
        self.where = where


# Of a text file: a book has a million letters.
_LONGEST_LINE = 1 << 26

FILE_SUFFIXES = (".txt", ".jsonl", ".json", ".csv", ".tsv", ".parquet")
"""Kinds of file that are read, by the end of their name."""

AS_A_FILE = "save what is meant of it as a file (.jsonl, .csv or .parquet, its one column named text), and name that"
"""What to do where a dataset leaves open what of it is read, and there is no key to say it with."""


def local_file(reference: str) -> Path | None:
    """The file that a dataset's reference names, there or not; None of a Hub dataset. Not to be asked of samples.

    Raises:
        DatasetError: No file can have such a name.
    """
    try:
        reference.encode()
        path = Path(reference.strip()).expanduser()
        is_file = path.exists() or path.suffix.lower() in FILE_SUFFIXES or path.is_absolute()
    except (OSError, RuntimeError, UnicodeEncodeError) as error:  # over 255 letters; ~ of nobody; no text
        said = getattr(error, "strerror", None) or error
        raise DatasetError(f"dataset {reference[:80]!r}: {said}; name a file or a Hub dataset") from None
    return path if is_file else None


def refuse_unreadable(path: Path) -> None:
    """Refuse what no reader is for, before it is opened.

    Raises:
        DatasetError: No such file, a folder, or another kind of file.
    """
    if not path.exists():
        raise DatasetError(f"dataset {str(path)!r}: no such file; check the path")
    if path.is_dir():
        raise DatasetError(f"dataset {str(path)!r} is a folder; name one of its {', '.join(FILE_SUFFIXES)} files")
    if path.suffix.lower() not in FILE_SUFFIXES:
        raise DatasetError(f"dataset {path.name!r}: not a kind of file that is read; use {', '.join(FILE_SUFFIXES)}")


def read_file(path: Path) -> Iterator[Row]:
    """Read a data file row by row; memory does not grow with the file, but for ``.json``, which is read whole.

    A ``.txt`` file has one text per line, in a column named ``text``. A ``.jsonl`` file has one object per line, a
    ``.json`` file one list of objects, a ``.csv`` or ``.tsv`` file a header line. All are UTF-8.

    Args:
        path: The file; its suffix says what it is.

    Raises:
        DatasetError: No such file, another kind of file, or contents that are not what the suffix says.
    """
    name, suffix = path.name, path.suffix.lower()
    refuse_unreadable(path)
    readers = {".txt": _text, ".jsonl": _json_lines, ".json": _json, ".parquet": _parquet}
    try:
        yield from readers.get(suffix, _csv)(path)
    except UnicodeDecodeError as error:
        raise DatasetError(
            f"dataset {name!r} is not UTF-8 text (byte {error.object[error.start]:#04x}); save it as UTF-8"
        ) from None
    except OSError as error:
        raise DatasetError(f"dataset {name!r} cannot be read ({error.strerror or error}); check the file") from None


def _text(path: Path) -> Iterator[Row]:
    # utf-8-sig: a byte order mark, as some editors write, is not part of the first text.
    with path.open(encoding="utf-8-sig") as lines:
        for number, line in _lines(path, lines):
            yield Row({"text": line}, f"line {number}")


def _lines(path: Path, file: TextIO) -> Iterator[tuple[int, str]]:
    """Number and text of each line, which is no longer than can be held."""
    number = 0
    while line := file.readline(_LONGEST_LINE + 1):
        number += 1
        if len(line) > _LONGEST_LINE:
            raise DatasetError(
                f"dataset {path.name!r}, line {number} is longer than {_LONGEST_LINE:,} letters; cut it into texts"
            )
        yield number, line


def _json_lines(path: Path) -> Iterator[Row]:
    with path.open(encoding="utf-8-sig") as lines:
        for number, line in _lines(path, lines):
            if line.strip():
                try:
                    row = parse_json(line)
                except json.JSONDecodeError as error:
                    raise DatasetError(
                        f"dataset {path.name!r}, line {number}: not valid JSON ({error.msg}); one object a line"
                    ) from None
                yield _as_object(row, path, f"line {number}")


def _json(path: Path) -> Iterator[Row]:
    try:
        rows = parse_json(path.read_text(encoding="utf-8-sig"))
    except json.JSONDecodeError as error:
        raise DatasetError(
            f"dataset {path.name!r}, line {error.lineno}: not valid JSON ({error.msg}); "
            "one list of objects is expected, and one object per line in a .jsonl file"
        ) from None
    if not isinstance(rows, list):
        raise DatasetError(f"dataset {path.name!r}: a list of objects is expected, not one {type(rows).__name__}")
    for number, row in enumerate(rows, 1):
        yield _as_object(row, path, f"entry {number}")


def _as_object(row: Any, path: Path, where: str) -> Row:
    if not isinstance(row, dict):
        raise DatasetError(
            f'dataset {path.name!r}, {where}: an object such as {{"text": "..."}} is expected, not {type(row).__name__}'
        )
    try:
        "".join(row).encode()
    except UnicodeEncodeError:
        raise DatasetError(f"dataset {path.name!r}, {where}: the name of a column is no text; rename it") from None
    return Row(row, where)


def _csv(path: Path) -> Iterator[Row]:
    # The library's own limit is 128 KiB per field, less than a long document.
    csv.field_size_limit(_LONGEST_LINE)
    delimiter = "\t" if path.suffix.lower() == ".tsv" else ","
    with path.open(encoding="utf-8-sig", newline="") as lines:
        reader = csv.reader(lines, delimiter=delimiter, strict=True)
        try:
            header = next(reader, None)
            if header is None:
                return
            if len(set(header)) != len(header):
                raise DatasetError(f"dataset {path.name!r}, line 1: a column name appears twice; rename one")
            begins = reader.line_num + 1
            for fields in reader:
                where, begins = f"line {begins}", reader.line_num + 1
                if not fields:
                    continue
                if len(fields) != len(header):
                    raise DatasetError(
                        f"dataset {path.name!r}, line {reader.line_num}: {len(fields)} fields where the header has "
                        f"{len(header)}; put fields with a delimiter or a line break in double quotes"
                    )
                yield Row(dict(zip(header, fields, strict=True)), where)
        except csv.Error as error:
            raise DatasetError(
                f"dataset {path.name!r}, line {reader.line_num}: bad CSV ({error}); check its quotes"
            ) from None


def _parquet(path: Path) -> Iterator[Row]:
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            number = 0
            for batch in file.iter_batches(batch_size=1024):
                for values in batch.to_pylist():
                    number += 1
                    yield Row(values, f"row {number}")
    except OverflowError as error:  # a date or a duration beyond what Python has
        raise DatasetError(
            f"dataset {path.name!r}: a value cannot be read ({error}); leave its column out of the file"
        ) from None
    except pyarrow.ArrowException as error:
        raise DatasetError(
            f"dataset {path.name!r} is not a readable Parquet file ({str(error).splitlines()[0]}); write it again"
        ) from None
