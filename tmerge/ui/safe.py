"""Text of others (repo names, cards, datasets, errors) on our pages: shown letter by letter, never acted on."""

from __future__ import annotations

import html

__all__ = ["escape", "plain_markdown"]

_ACTED_ON = frozenset("<>&|`*_[]()#!~\"'\\$:")


def escape(value: object, missing: str = "not stated") -> str:
    """A value within HTML, also within a quoted attribute."""
    if value is None:
        return missing
    # Letters that turn the direction of what follows could make one name look like another.
    text = "".join(letter for letter in str(value) if letter.isprintable() or letter in "\n\t")
    # Gradio's HTML component fills templates of these two kinds; what a repo is called is no template.
    return html.escape(text, quote=True).replace("{", "&#123;").replace("$", "&#36;")


def plain_markdown(value: object) -> str:
    """A value within Markdown, with nothing in it that Markdown, HTML or LaTeX would act on."""
    return "".join(f"&#{ord(letter)};" if letter in _ACTED_ON else letter for letter in str(value))
