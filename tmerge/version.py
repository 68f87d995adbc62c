"""The version of tmerge, in one place; ``pyproject.toml`` reads it from here."""

from __future__ import annotations

__all__ = ["DISTRIBUTION", "VERSION"]

VERSION = "0.1.0"

DISTRIBUTION = "tmerge-llm"
"""What pip calls it: on PyPI the name tmerge is another project's."""
