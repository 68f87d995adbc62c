"""A model's licence and the notices that go with it, as files: who passes the model on passes them on too.

A merge is made of its sources as of its target. Most licences that ask for anything ask that their text and notices go
with what is made of the model (Apache's NOTICE, Llama's and Gemma's agreements), whichever side it was on: the target's
stay where they are, a source's lie in a folder of their own, so that none takes the place of another.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path, PurePosixPath

from tmerge.errors import CheckpointError
from tmerge.models.checkpoint import LICENCE_FOLDER
from tmerge.models.place import GgufPlace, Place
from tmerge.models.reference import ModelReference

__all__ = ["licence_files", "source_licence_files", "write_licence_files"]


def licence_files(place: Place | GgufPlace | None) -> dict[str, Path]:
    """Path in a merge's folder -> licence file of its target, and of the adapter joined to that; fetched if need be.

    Args:
        place: Where the model is. What lies beside a GGUF file need not be of it.

    Raises:
        TmergeError: As `tmerge.models.remote.fetch`.
    """
    found = {}
    if isinstance(place, Place):
        found = _placed(place.licence_files, "")
    if place is not None and place.adapter is not None:
        # Of two of one name the model's, whose weights they are.
        found = _placed(place.adapter.licence_files, "") | found
    return found


def source_licence_files(target: Place | GgufPlace, sources: Iterable[Place | GgufPlace]) -> dict[str, Path]:
    """Path in a merge's folder -> file, of the models that go into a target, and of their adapters; fetched if need be.

    Args:
        target: Whose own files lie elsewhere.
        sources: What goes into it. A model that is named twice, or that the target is, is one.

    Raises:
        TmergeError: As `tmerge.models.remote.fetch`.
    """
    of_target = [target, *([] if target.adapter is None else [target.adapter])]
    seen, folders = {each.reference.text for each in of_target}, set[str]()
    own, found = licence_files(target), dict[str, Path]()
    for place in sources:
        for each in (place, place.adapter):
            if each is None or isinstance(each, GgufPlace) or each.reference.text in seen:
                continue
            seen.add(each.reference.text)
            files = each.licence_files
            if not files:
                continue
            folder = _folder_of(each.reference, folders)
            folders.add(folder)
            for inside, path in _placed(files, f"{LICENCE_FOLDER}/{folder}/").items():
                if inside not in own:
                    found.setdefault(inside, path)
    return found


def _placed(files: Mapping[str, Path], folder: str) -> dict[str, Path]:
    """Where a model's licence files go in a merge.

    Args:
        files: By their names at the model.
        folder: For those beside its weights; empty for a target's, whose folder of licences is `LICENCE_FOLDER` then.
    """
    placed: dict[str, Path] = {}
    for name, path in files.items():
        parts = PurePosixPath(name).parts
        if len(parts) == 3:
            # Of a model that is a merge itself, what it was made of keeps its place.
            within = f"{LICENCE_FOLDER}/{parts[1]}/"
        else:
            within = folder or ("" if len(parts) == 1 else f"{LICENCE_FOLDER}/")
        # One beside the weights and one in a folder may have one name.
        plain = PurePosixPath(parts[-1])
        names = (parts[-1], *(f"{plain.stem}-{number}{plain.suffix}" for number in range(2, len(files) + 2)))
        placed[next(inside for each in names if (inside := within + each) not in placed)] = path
    return placed


def write_licence_files(files: Mapping[str, Path], folder: Path) -> None:
    """Copy some into a folder, as they are to be called there.

    Raises:
        CheckpointError: One is gone by now.
    """
    for name, path in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        try:
            shutil.copyfile(path, folder / name)
        except FileNotFoundError:
            raise CheckpointError(
                f"{str(path)!r}, a licence file that goes with the merge, is gone; put it back, and the same command "
                "continues"
            ) from None


def _folder_of(reference: ModelReference, taken: set[str]) -> str:
    """A folder's name for a model: its repo's, whole, or its folder's, and no one else's."""
    plain = re.sub(r"[^\w.-]+", "-", (reference.repo or reference.name).replace("/", "--")).strip("-.") or "model"
    names = (plain if number == 1 else f"{plain}-{number}" for number in range(1, len(taken) + 2))
    return next(name for name in names if name not in taken)
