"""What the Push tab shows: the files, the card as the Hub will show it, and the push as it goes."""

from __future__ import annotations

import base64
import re
import time
from pathlib import Path

from tmerge.hub import PushPlan
from tmerge.quantities import bytes_words
from tmerge.ui.parts.cards import error_card
from tmerge.ui.parts.safe import render
from tmerge.ui.server.pushes import PushUnderWay

__all__ = ["card_preview", "files_card", "push_card"]

_FILE = "push_cards.html"
_FRONT = re.compile(r"\A---\r?\n(.*?)\r?\n---\r?\n?(.*)\Z", re.DOTALL)
_PICTURE = re.compile(r"(!\[[^\]\n]*\]\()tmerge/figures/([A-Za-z0-9_-]+\.png)(\))")
# A card's picture has tens of kilobytes; what is much larger is none of ours.
_LARGEST_PICTURE = 2 * 2**20


def files_card(planned: PushPlan) -> str:
    """Every file that would go, with its size, and what should be known before it does."""
    files = [(name, bytes_words(size)) for name, size in planned.files.items()]
    return render(_FILE, "files_card", planned=planned, files=files)


def card_preview(text: str, folder: Path | None) -> tuple[str, str]:
    """The card's metadata as HTML, and its body as Markdown with the run's own pictures within it.

    Args:
        text: Of the card.
        folder: The run's, whose pictures are shown; None shows none.
    """
    front_matter = _FRONT.match(text)
    front, body = (front_matter[1], front_matter[2]) if front_matter else ("", text)

    def within(match: re.Match[str]) -> str:
        path = None if folder is None else folder / "tmerge" / "figures" / match[2]
        if path is None or not path.is_file() or path.stat().st_size > _LARGEST_PICTURE:
            return match[0]
        return f"{match[1]}data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}{match[3]}"

    metadata = (
        render(_FILE, "metadata", front=front)
        if front
        else error_card("No metadata", "the card has to begin with its metadata, between two lines of ---")
    )
    return metadata, _PICTURE.sub(within, body)


def push_card(under_way: PushUnderWay | None) -> str:
    """A push: its steps so far, and where the run has gone or why it has not."""
    if under_way is None:
        return ""
    if under_way.state == "failed":
        return error_card("Not pushed", under_way.error or "")
    if under_way.state == "done" and under_way.pushed is not None:
        seconds = (under_way.ended or 0) - under_way.began
        return render(_FILE, "pushed", done=under_way.pushed, seconds=seconds)
    return render(_FILE, "pushing", under_way=under_way, seconds=time.time() - under_way.began)
