"""Keeping ``transformers``' own progress bars off the terminal: progress is the pipeline's to report."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from transformers.utils import logging

__all__ = ["quiet"]


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """While open, no bars."""
    bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if bars:
            logging.enable_progress_bar()
