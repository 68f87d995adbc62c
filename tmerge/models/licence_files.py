"""A model's licence and the notices that go with it, as files: who passes the model on passes them on too."""

from __future__ import annotations

import shutil
from pathlib import Path

from tmerge.models.checkpoint import is_licence_file
from tmerge.models.place import GgufPlace, Place

__all__ = ["licence_files", "write_licence_files"]


def licence_files(place: Place | GgufPlace | None) -> dict[str, Path]:
    """Name -> path of a model's licence files, of the adapter's that is joined to it too; fetched if need be.

    Args:
        place: Where the model is. What lies beside a GGUF file need not be of it.

    Raises:
        TmergeError: As `tmerge.models.remote.fetch`.
    """
    found = {}
    if isinstance(place, Place):
        found = {name: path for name, path in place.beside().items() if is_licence_file(name)}
    if place is not None and place.adapter is not None:
        # Of two of one name the model's, whose weights they are.
        found = place.adapter.licence_files | found
    return found


def write_licence_files(place: Place | GgufPlace | None, folder: Path) -> None:
    """Copy them into a folder; raises as `licence_files`."""
    for name, path in licence_files(place).items():
        shutil.copyfile(path, folder / name)
