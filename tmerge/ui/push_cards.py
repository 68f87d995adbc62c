"""What the Push tab shows: the verdict, the files, the card as the Hub will show it, and the push as it goes."""

from __future__ import annotations

import base64
import re
import time
from pathlib import Path

from tmerge.evaluation import Verdict
from tmerge.hub import PushPlan
from tmerge.quantities import bytes_words, duration_words
from tmerge.report import verdict_tone
from tmerge.ui.cards import error_card
from tmerge.ui.pushes import PushUnderWay
from tmerge.ui.safe import escape

__all__ = ["card_preview", "files_card", "push_card", "verdict_card"]

_FRONT = re.compile(r"\A---\r?\n(.*?)\r?\n---\r?\n?(.*)\Z", re.DOTALL)
_PICTURE = re.compile(r"(!\[[^\]\n]*\]\()tmerge/figures/([A-Za-z0-9_-]+\.png)(\))")
# A card's picture has tens of kilobytes; what is much larger is none of ours.
_LARGEST_PICTURE = 2 * 2**20


def verdict_card(verdict: Verdict, line: str) -> str:
    """What the card will say first."""
    return (
        f'<div class="card"><p class="role">verdict</p><p class="verdict {verdict_tone(verdict)}">'
        f"{escape(verdict)}</p><p>{escape(line)}</p></div>"
    )


def files_card(planned: PushPlan) -> str:
    """Every file that would go, with its size, and what should be known before it does."""
    rows = "".join(
        f'<tr><th scope="row" class="break">{escape(name)}</th><td>{escape(bytes_words(size))}</td></tr>'
        for name, size in planned.files.items()
    )
    warnings = "".join(f"<li>{escape(line)}</li>" for line in planned.warnings)
    listed = f'<ul class="notes">{warnings}</ul>' if warnings else ""
    return (
        f'<div class="card"><p class="card-title">What goes: {len(planned.files)} files, '
        f"{escape(bytes_words(planned.total_bytes))}</p>{listed}"
        '<div class="scroll tall"><table class="plain"><caption class="unseen">Files and their sizes</caption>'
        '<thead><tr><th scope="col">file</th><th scope="col">size</th></tr></thead>'
        f"<tbody>{rows}</tbody></table></div></div>"
    )


def card_preview(text: str, folder: Path | None) -> tuple[str, str]:
    """The card's metadata as HTML, and its body as Markdown with the run's own pictures within it.

    Args:
        text: Of the card.
        folder: The run's, whose pictures are shown; None shows none.
    """
    found = _FRONT.match(text)
    front, body = (found[1], found[2]) if found else ("", text)

    def within(match: re.Match[str]) -> str:
        path = None if folder is None else folder / "tmerge" / "figures" / match[2]
        if path is None or not path.is_file() or path.stat().st_size > _LARGEST_PICTURE:
            return match[0]
        return f"{match[1]}data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}{match[3]}"

    metadata = (
        f'<details class="card"><summary>Metadata, which the Hub reads</summary><pre>{escape(front)}</pre></details>'
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
        pushed, url = under_way.pushed, escape(under_way.pushed.url)
        seconds = duration_words((under_way.ended or 0) - under_way.began)
        return (
            '<div class="card" role="status"><p class="card-title state done">Pushed</p>'
            f'<p><a class="break" href="{url}" target="_blank" rel="noopener">{url}</a></p>'
            f'<p class="small">commit <code class="version">{escape(pushed.commit[:10])}</code>, in {escape(seconds)}'
            "</p></div>"
        )
    steps = "".join(f"<li>{escape(line)}</li>" for line in under_way.lines)
    return (
        f'<div class="card" role="status"><p class="card-title">Pushing to {escape(under_way.repo)}, '
        f"{escape(duration_words(time.time() - under_way.began))}</p>"
        f'<ul class="notes">{steps}</ul></div>'
    )
