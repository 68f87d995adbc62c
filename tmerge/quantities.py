"""Quantities in words: bytes, durations, counts, each written in one way in messages, tables, card, page and app."""

from __future__ import annotations

__all__ = ["bytes_words", "count_words", "duration_words", "number_words"]


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


def count_words(number: int, one: str, many: str | None = None) -> str:
    """How many of what: ``1 layer``, ``30 layers`` or ``49,152 neurons``."""
    return f"{number:,} {one if number == 1 else many or one + 's'}"
