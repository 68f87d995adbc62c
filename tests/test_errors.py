"""Messages that repeat what somebody wrote: one line, whatever that was."""

from __future__ import annotations

import pytest

from tmerge.errors import RecipeError, TmergeError
from tmerge.recipe import Recipe


@pytest.mark.parametrize(
    ("letter", "shown"),
    [("\n", r"\n"), ("\r", r"\r"), ("\x1b", r"\x1b"), ("\x85", r"\x85"), ("\u2028", r"\u2028"), ("\u202e", r"\u202e")]
    + [("\ud800", r"\ud800"), ("\x00", r"\x00")],
)
def test_what_no_line_can_hold_is_shown_by_its_escape(letter, shown):
    said = str(TmergeError(f"'a{letter}b' is no name; give é or 名"))
    assert said == f"'a{shown}b' is no name; give é or 名"
    assert len(said.splitlines()) == 1 and said.encode()


def test_a_list_given_as_text_with_a_line_end():
    with pytest.raises(RecipeError) as raised:
        Recipe.from_mapping({"target": "a", "source": "b", "trust_remote_code": "org/one\n@x, org/two"})
    assert str(raised.value).endswith(r"write a list: [org/one\n@x, org/two]")


def test_a_list_given_as_endless_text():
    with pytest.raises(RecipeError, match="write a list") as raised:
        Recipe.from_mapping({"target": "a", "source": "b", "trust_remote_code": "a" * 5000})
    assert len(str(raised.value)) < 500
