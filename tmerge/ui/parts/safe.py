"""Text of others (repo names, cards, datasets, errors) on our pages: shown letter by letter, never acted on."""

from __future__ import annotations

from typing import Any

import markupsafe

from tmerge.quantities import bytes_words, duration_words, number_words
from tmerge.report import verdict_tone, verdict_words
from tmerge.templates import html_templates

__all__ = ["escape", "printable", "render"]


def escape(value: object, missing: str = "not stated") -> markupsafe.Markup:
    """A value within HTML, also within a quoted attribute; what is HTML of ours already stays as it is."""
    if isinstance(value, markupsafe.Markup):
        return value
    if value is None:
        return markupsafe.Markup(missing)
    # Gradio's HTML component fills templates of these two kinds; what a repo is called is no template.
    escaped = str(markupsafe.escape(printable(str(value))))
    return markupsafe.Markup(escaped.replace("{", "&#123;").replace("$", "&#36;"))


def printable(text: str) -> str:
    """Without what moves the cursor, or turns the direction of writing and so makes one name look like another."""
    return "".join(letter for letter in text if letter.isprintable() or letter in "\n\t")


_TEMPLATES = html_templates("tmerge.ui", "tmerge.plots", finalize=escape)
_TEMPLATES.filters |= {
    "bytes": bytes_words,
    "duration": duration_words,
    "number": number_words,
    "tone": verdict_tone,
    "verdict": verdict_words,
}


def render(file: str, macro: str, **values: Any) -> str:
    """A piece of the page: one macro of a file in ``templates``, in which every value is escaped by `escape`.

    Args:
        file: Such as ``cards.html``.
        macro: Its name there.
        **values: Its arguments; one that is missing is an error where it is used.
    """
    return str(getattr(_TEMPLATES.get_template(file).module, macro)(**values))
