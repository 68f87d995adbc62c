"""The app's cards as HTML: what `check` says of two models, and what went wrong."""

from __future__ import annotations

from tmerge.preflight.document import CheckDocument
from tmerge.ui.parts.safe import render
from tmerge.ui.server.limits import AppSettings, describe_limits

__all__ = ["check_cards", "empty_card", "error_card", "limits_line", "note"]

_FILE = "cards.html"


def empty_card(title: str, line: str) -> str:
    """A card that says what will be here."""
    return render(_FILE, "empty_card", title=title, line=line)


def error_card(title: str, line: str) -> str:
    """A card for what has to be mended, read out by a screen reader as it comes."""
    return render(_FILE, "error_card", title=title, line=line)


def note(line: str, *, bad: bool = False, keep: bool = False) -> str:
    """One line beside a field.

    Args:
        line: Empty for none.
        bad: Whether it says what has to be mended.
        keep: Whether an empty line keeps its height, so that nothing jumps when there is one.
    """
    if not line and not keep:
        return ""
    return render(_FILE, "note", line=line, bad=bad and bool(line))


def check_cards(facts: CheckDocument, refused: str | None = None) -> str:
    """What `check` found, the two models side by side.

    Args:
        facts: What it found.
        refused: Why this app does not run it, if it does not.
    """
    # What the licences ask has a card of its own.
    elsewhere = {*facts.licence.refusals, *facts.licence.unknown}
    told = [line for line in facts.notes if line not in elsewhere]
    told += [f"{name} is left out: {why}" for name, why in facts.projections.skipped.items()]
    told += [f"{role}: {line}" for role in ("target", "source") for line in getattr(facts.left_alone, role)]
    matched = facts.projections.matched.items()
    sizes = [(name, *(" \u00d7 ".join(map(str, size)) for size in (of.target, of.source))) for name, of in matched]
    return render(_FILE, "check_cards", facts=facts, sizes=sizes, told=told, refused=refused)


def limits_line(settings: AppSettings) -> str:
    """What this app takes, in one line; empty where there are no limits."""
    limits = describe_limits(settings)
    return render(_FILE, "limits_line", limits=limits) if limits else ""
