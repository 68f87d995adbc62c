"""Files that are not what their name says."""

from __future__ import annotations

from pathlib import Path

import pytest

from tmerge.calibration.files import read_file
from tmerge.errors import DatasetError


def test_fields_may_be_long_and_hold_line_breaks(tmp_path: Path) -> None:
    long = "word " * 50_000
    (tmp_path / "a.csv").write_text(f'\ufefftext,n\n"two\nlines, quoted ""so""",1\n\n"{long}",2\n', encoding="utf-8")
    rows = list(read_file(tmp_path / "a.csv"))
    assert rows == [{"text": 'two\nlines, quoted "so"', "n": "1"}, {"text": long, "n": "2"}]


def test_blank_lines_of_json_are_passed_over(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('\ufeff{"a": 1}\n\n  \n{"a": "สวัสดี"}\n', encoding="utf-8")
    assert list(read_file(tmp_path / "a.jsonl")) == [{"a": 1}, {"a": "สวัสดี"}]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"a": 1}\n{"a": \n', r"'a\.jsonl', line 2: not valid JSON \(Expecting value\)"),
        ("a.jsonl", b'{"a": 1}\n[1]\n', r"line 2: an object such as .* is expected, not list"),
        ("a.jsonl", b"[" * 100_000, r"line 1: not valid JSON"),
        ("a.json", b'[{"a": 1},\n}', r"line 2: not valid JSON .* \.jsonl file"),
        ("a.json", b'{"a": 1}', r"a list of objects is expected, not one dict"),
        ("a.json", b'[{"a": 1}, 3]', r"entry 2: an object .* not int"),
        ("a.json", b"[" * 100_000, r"line 1: not valid JSON"),
        ("a.csv", b"a,b\n1,2\n1,2,3\n", r"line 3: 3 fields where the header has 2"),
        ("a.csv", b'a,b\n1,"2\n', r"line 2: bad CSV"),
        ("a.csv", b"a,a\n1,2\n", r"line 1: a column name appears twice"),
        ("a.tsv", b"a\tb\n1\n", r"line 2: 1 fields where the header has 2"),
        ("a.parquet", b"PAR1 and no more", r"not a readable Parquet file"),
        ("a.parquet", b"", r"not a readable Parquet file"),
        ("a.txt", "naïve".encode("latin-1"), r"not UTF-8 text \(byte 0xef\); save it as UTF-8"),
        ("a.txt", "text".encode("utf-16"), r"not UTF-8 text"),
        ("a.docx", b"PK", r"not a kind of file that is read; use \.txt, \.jsonl"),
    ],
)
def test_bad_files(name: str, content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DatasetError, match=message) as caught:
        list(read_file(tmp_path / name))
    assert "\n" not in str(caught.value)
    assert str(tmp_path) not in str(caught.value)


def test_missing_files_and_folders(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match=r"no such file; check the path"):
        list(read_file(tmp_path / "none.txt"))
    with pytest.raises(DatasetError, match=r"is a folder; name one of its"):
        list(read_file(tmp_path))
