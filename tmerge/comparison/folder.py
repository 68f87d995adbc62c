"""The folder of a comparison, while one works in it."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tmerge.errors import OutputExistsError
from tmerge.store import LOCK_FILES, locked

__all__ = ["at_work"]


@contextmanager
def at_work(folder: Path) -> Iterator[None]:
    """While a comparison works in a folder: nobody else does; if it ends with nothing in it, nothing is left.

    Raises:
        OutputExistsError: It cannot be made.
        RunBusyError: Another process is at work in it.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputExistsError(f"{folder} cannot be made: {error.strerror}; choose another --out") from None
    with locked(folder, folder):
        try:
            yield
        except BaseException:
            if all(path.name in LOCK_FILES for path in folder.iterdir()):
                shutil.rmtree(folder, ignore_errors=True)
            raise
