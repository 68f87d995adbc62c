"""Several sources in words, for terminal, page, card and app."""

from __future__ import annotations

from collections.abc import Sequence

from tmerge.report.parts import Fusion, SeveralSource

__all__ = ["join_words", "listed_words", "short_name", "strength_words"]


def short_name(reference: str) -> str:
    """Without user, revision and folders."""
    return reference.partition("@")[0].rstrip("/").rpartition("/")[2].removeprefix("demo:")


def strength_words(source: SeveralSource) -> str:
    """How strongly one went in: ``strength 0.5``, and its weight where that is not 1."""
    weight = "" if source.weight == 1 else f", weight {source.weight:g}"
    return f"strength {source.strength:g}{weight}"


def join_words(fusion: Fusion) -> str:
    """How they were joined; empty of one source."""
    if fusion.join is None:
        return ""
    if fusion.join == "sum":
        return "their sum"
    kept = "all" if fusion.density is None else f"{100 * fusion.density:.3g} %"
    how = "the largest" if fusion.join == "ties" else "drawn by lot,"
    return f"joined by {fusion.join.upper()}, {how} {kept} of each"


def listed_words(sources: Sequence[SeveralSource]) -> str:
    """All of them, by name and reference: ``source 1 (math-lora), source 2 (chat)``."""
    return ", ".join(f"{source.name} ({short_name(source.reference)})" for source in sources)
