"""What the package writes for browsers and terminals: no string holds a letter that nobody meant."""

from __future__ import annotations

import ast
import unicodedata
from pathlib import Path

import pytest

import tmerge

MODULES = sorted(Path(tmerge.__file__).parent.rglob("*.py"))


def unmeant(source: str) -> list[tuple[int, str]]:
    """Line and letter of every control character in a string, but for tabs and line ends.

    A CSS or JavaScript escape such as ``\\25B2`` in a string that is not raw is read by Python first, as an octal one.
    """
    return [
        (node.lineno, letter)
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
        for letter in node.value
        if unicodedata.category(letter) == "Cc" and letter not in "\t\n\r"
    ]


def test_an_escape_of_another_language_is_found():
    assert unmeant("CSS = \"a::before { content: '\\25B2 ' }\"") == [(1, "\x15")]
    assert unmeant('CSS = r"a::before { content: \'\\25B2 \' }"\nTEXT = "a\\tb\\n"') == []


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.stem)
def test_no_string_holds_a_control_character(path):
    assert unmeant(path.read_text(encoding="utf-8")) == []
