"""The sample texts that ship with the package: enough to try a merge with no download."""

from __future__ import annotations

import difflib
from importlib import resources

from tmerge.errors import DatasetError

__all__ = ["SAMPLES_PREFIX", "sample_language_code", "sample_languages", "sample_texts"]

SAMPLES_PREFIX = "samples:"

# As model cards name them: ISO 639-1 where there is a code, else 639-3.
_CODES = {"cantonese": "yue", "english": "en", "indonesian": "id", "malay": "ms", "thai": "th"}


def sample_languages() -> list[str]:
    """The languages that ``samples:LANGUAGE`` may name, sorted."""
    folder = resources.files("tmerge.calibration") / "samples"
    return sorted(entry.name[:-4] for entry in folder.iterdir() if entry.name.endswith(".txt"))


def sample_language_code(language: str) -> str:
    """The language's code in a model card's metadata (ISO 639)."""
    return _CODES[language]


def sample_texts(language: str) -> list[str]:
    """The sample texts of a language, in the file's order, without empty lines.

    Raises:
        DatasetError: There are none in that language.
    """
    known = sample_languages()
    if language not in known:
        close = difflib.get_close_matches(language.lower(), known, 1)
        hint = f"did you mean {SAMPLES_PREFIX}{close[0]}?" if close else f"there are {', '.join(known)}"
        raise DatasetError(f"dataset {SAMPLES_PREFIX + language!r}: no sample texts in that language; {hint}")
    file = resources.files("tmerge.calibration") / "samples" / f"{language}.txt"
    return [line.strip() for line in file.read_text(encoding="utf-8").split("\n") if line.strip()]
