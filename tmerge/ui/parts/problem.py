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

__all__ = ["EDITOR", "places_of", "problem", "problem_box", "problem_of"]

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
    line: str = "", *, bad: bool = False, at: Sequence[str] = (), unread: bool | None = False, seek: bool = False
) -> str:
    """The box's value.

    Args:
        line: Empty for none.
        bad: Whether it says what has to be mended.
        at: Elements that it is about; it stands at the first that is in sight.
        unread: Whether the recipe on the page cannot be read, so that what was expected of the one before is not shown;
            None leaves that as it is.
        seek: Whether the page goes to where it stands.
    """
    return json.dumps({"line": line, "bad": bad and bool(line), "at": list(at), "unread": unread, "seek": seek})


def problem_of(
    error: TmergeError, at: Sequence[str] | None = None, *, unread: bool | None = False, seek: bool = False
) -> str:
    """The box's value for an error, at the field whose key it names first, or where it is said to be.

    Args:
        error: What is wrong with the recipe.
        at: As `problem`; by the error's words if None.
        unread: As `problem`.
        seek: Likewise.
    """
    line = str(error).removeprefix("recipe: ")
    return problem(line, bad=True, at=places_of(line) if at is None else at, unread=unread, seek=seek)


def places_of(line: str) -> tuple[str, ...]:
    """The elements of the field that an error's line is about; the editor's where there is no field."""
    found = None if _OF_THE_EDITOR.match(line) else _KEY.search(line)
    return _PLACES[found[1]] if found else (EDITOR,)
