"""Text of others (repo names, cards, datasets, errors) on our pages: shown letter by letter, never acted on."""

from __future__ import annotations

import html

__all__ = ["bytes_words", "duration_words", "escape", "number_words", "plain_markdown"]

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


def number_words(value: float | None) -> str:
    """12,345 as it is; from a million on as 1.2 M, from a thousand million on as 1.2 B."""
    if value is None:
        return "not stated"
    if value >= 1e9:
        return f"{value / 1e9:.3g} B"
    return f"{value / 1e6:.3g} M" if value >= 1e6 else f"{value:,.0f}"


def bytes_words(value: float) -> str:
    """Bytes as B, kB, MB or GB."""
    if value < 1000:
        return f"{value:.0f} B"
    for unit, size in (("GB", 1e9), ("MB", 1e6)):
        if value >= size:
            return f"{value / size:.3g} {unit}" if value < 100 * size else f"{value / size:.0f} {unit}"
    return f"{value / 1e3:.3g} kB"


def duration_words(seconds: float) -> str:
    """Seconds as 12 s, 3 min 5 s or 2 h 10 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"
