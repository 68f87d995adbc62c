"""What identifies a dataset: its contents, as its name may stand for others by the next run."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from pathlib import Path

from tmerge.calibration.files import local_file, refuse_unreadable
from tmerge.calibration.samples import SAMPLES_PREFIX, sample_texts
from tmerge.errors import DatasetError
from tmerge.models import file_digest
from tmerge.store import read_json, write_json

__all__ = ["DatasetRecord", "dataset_identity", "file_identity", "pinned"]

_LOCAL = "sha256:"


def file_identity(path: Path) -> str:
    """``sha256:HEX`` over a local file's bytes.

    Raises:
        DatasetError: No such file, or it cannot be read.
    """
    if not path.is_file():
        what = "is no regular file; name one" if path.exists() else "no such file; check the path"
        raise DatasetError(f"data file {str(path)!r}: {what}")
    try:
        return _LOCAL + file_digest(path)
    except OSError as error:
        raise DatasetError(
            f"dataset {path.name!r} cannot be read ({error.strerror or error}); check the file"
        ) from None


def dataset_identity(reference: str) -> str:
    """What a dataset is now: ``sha256:HEX`` of a local file or of built-in samples, the commit of a Hub dataset.

    Args:
        reference: As ``calibration.dataset``.

    Raises:
        DatasetError: No such dataset, or it cannot be reached.
    """
    name = reference.strip()
    if name.startswith(SAMPLES_PREFIX):
        texts = "\n".join(sample_texts(name.removeprefix(SAMPLES_PREFIX)))
        return _LOCAL + hashlib.sha256(texts.encode()).hexdigest()
    path = local_file(name)
    if path is not None:
        refuse_unreadable(path)
        return file_identity(path)
    # The library behind it takes a second to import, and samples and files do without.
    from tmerge.calibration.remote import remote_commit

    return remote_commit(name)


def pinned(reference: str, identity: str) -> str:
    """The reference to read so that it is what was identified: a Hub dataset at its commit, all else as it is named."""
    return reference if identity.startswith(_LOCAL) else f"{reference.strip().partition('@')[0]}@{identity}"


class DatasetRecord:
    """What a run's datasets were when it last began, kept in its cache, and what has become of them since.

    Args:
        path: The record's file; need not be there.
        note: Hears a sentence for each dataset that is another by now, or that can no longer be asked.
    """

    def __init__(self, path: Path, note: Callable[[str], None]) -> None:
        self.path, self.note = path, note
        self.known: dict[str, str] = {name: str(value) for name, value in (read_json(path) or {}).items()}
        self.found: dict[str, str] = {}

    def identify(
        self, references: Iterable[str], identity: Callable[[str], str] = dataset_identity, *, what: str = "dataset"
    ) -> dict[str, str]:
        """Each dataset's identity now; where it cannot be asked any more, the one that was recorded.

        A run whose file has been deleted, or whose Hub dataset is out of reach, still has what it read of it.

        Args:
            references: As ``calibration.dataset``.
            identity: What asks for it.
            what: What they are, for the notes.

        Raises:
            DatasetError: One cannot be asked, and nothing was recorded of it.
        """
        identities: dict[str, str] = {}
        for reference in dict.fromkeys(references):
            before = self.known.get(reference)
            try:
                identities[reference] = identity(reference)
            except DatasetError as error:
                if before is None:
                    raise
                self.note(f"{error}; what this run read of it before is kept")
                identities[reference] = before
            if before is not None and before != identities[reference]:
                self.note(_changed_words(what, reference, before, identities[reference]))
        self.found |= identities
        return identities

    def save(self) -> None:
        """Write down what was identified; its folder is there by now."""
        if any(self.known.get(reference) != value for reference, value in self.found.items()):
            self.known |= self.found
            write_json(self.path, self.known)


def _changed_words(what: str, reference: str, before: str, now: str) -> str:
    of = "the contents of " if now.startswith(_LOCAL) else ""
    then, here = (value.removeprefix(_LOCAL)[:12] for value in (before, now))
    changed = f"{of}{what} {reference!r} changed since this run read it ({then} then, {here} now)"
    return f"{changed}: what depends on it is done anew"
