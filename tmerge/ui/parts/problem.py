"""The line that says what has to be mended before a merge can start: once, at the field that it is about.

No field of Gradio's has a place for a fault, so this is its HTML component with a script that puts the line there.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence

import gradio as gr

from tmerge.errors import TmergeError
from tmerge.templates import static_text
from tmerge.ui.parts.fields import SETTINGS

__all__ = ["EDITOR", "places_of", "problem", "problem_box"]

EDITOR = "recipe-yaml"
"""The element of the recipe's editor."""

_PLACES: dict[str, tuple[str, ...]] = {
    **{setting.key: (setting.element,) for setting in SETTINGS},
    **{role: (f"{role}-model",) for role in ("target", "source", "adapter")},
    "calibration.dataset": ("texts-dataset", "texts-file", "texts-language"),
    **{f"calibration.{name}": (f"texts-{name}",) for name in ("config", "split", "column")},
}
_KEY = re.compile(rf"(?<![\w.])({'|'.join(map(re.escape, sorted(_PLACES, key=len, reverse=True)))})(?![\w-])")
# What the editor alone can hold.
_OF_THE_EDITOR = re.compile(r"(unknown key|trust_remote_code|sources\b)")


def problem_box() -> gr.HTML:
    """Where the line is while it is about no field in sight."""
    return gr.HTML(
        problem(),
        elem_id="problem-box",
        html_template="",
        js_on_load=static_text("tmerge.ui", "problem.js"),
        apply_default_css=False,
    )


def problem(
    said: str | TmergeError = "",
    at: Sequence[str] | None = None,
    *,
    bad: bool = False,
    unread: bool | None = False,
    seek: bool = False,
) -> str:
    """The box's value.

    Args:
        said: A line, empty for none; or what is wrong with the recipe.
        at: Elements that it is about; it stands at the first that is in sight. Of an error, if None, those of the field
            whose key its line names first.
        bad: Whether a line says what has to be mended, as an error does.
        unread: Whether the recipe on the page cannot be read, so that what was expected of the one before is not shown;
            None leaves that as it is.
        seek: Whether the page goes to where it stands.
    """
    line = str(said)
    if isinstance(said, TmergeError):
        line, bad = line.removeprefix("recipe: "), True
        at = places_of(line) if at is None else at
    return json.dumps({"line": line, "bad": bad, "at": list(at or ()), "unread": unread, "seek": seek})


def places_of(line: str) -> tuple[str, ...]:
    """The elements of the field that an error's line is about; the editor's where there is no field."""
    found = None if _OF_THE_EDITOR.match(line) else _KEY.search(line)
    return _PLACES[found[1]] if found else (EDITOR,)
