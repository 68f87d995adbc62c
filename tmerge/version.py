"""The version of tmerge, in one place; ``pyproject.toml`` reads it from here."""

from __future__ import annotations

import re

__all__ = ["DISTRIBUTION", "VERSION", "installs_tmerge"]

VERSION = "0.1.0"

DISTRIBUTION = "tmerge-llm"
"""What pip calls it: on PyPI the name tmerge is another project's."""

_EXTRAS = r"(\[[\w,-]*\])?"
_ADDRESS = re.compile(rf"({DISTRIBUTION}{_EXTRAS} *@ *)?(git\+)?https://\S+", re.IGNORECASE)
_RELEASE = re.compile(rf"{DISTRIBUTION}{_EXTRAS}==[0-9][0-9A-Za-z.]*", re.IGNORECASE)


def installs_tmerge(requirement: str) -> bool:
    """Whether a job may install tmerge from this: an https address, or a release under this project's own name.

    Any other name would be another project's code, in a job that holds the user's token.
    """
    return bool(_ADDRESS.fullmatch(requirement) or _RELEASE.fullmatch(requirement))
