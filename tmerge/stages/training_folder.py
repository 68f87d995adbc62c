"""The folder of a training after a merge: begun, taken up again, and left as it was found where nothing comes of it."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tmerge.adaptation import last_checkpoint, teacher_path
from tmerge.errors import Cancelled, OutputExistsError, ProcessLostError
from tmerge.run import Run
from tmerge.store import locked, read_json

__all__ = ["TrainingFolder"]

# By which a dataset is known to be another under the same name: a file's contents, a Hub dataset's commit.
_IDENTITY = ("file_sha256", "revision")


class TrainingFolder:
    """Where a trained model goes.

    Args:
        adapted: Its run, which has no stages: a note under the training's key says that it was begun.
    """

    def __init__(self, adapted: Run) -> None:
        self._adapted = adapted

    @property
    def work(self) -> Path:
        """Of what the training keeps while it lasts."""
        return self._adapted.cache / "training"

    @property
    def has_teacher(self) -> bool:
        """Whether what the source predicts is kept there, so that it need not be read again."""
        return teacher_path(self.work).is_file()

    def open(self, key: str, data: Mapping[str, Any]) -> None:
        """Begin a training in a new folder, or take up this very one.

        Args:
            key: Of all that decides what comes of it.
            data: What the report says of its texts.

        Raises:
            OutputExistsError: The folder holds something else, or another training that can be gone on with.
            RunBusyError: Another process trains in it.
        """
        adapted, marker = self._adapted, self._adapted.cache / "adapt.json"
        read = {name: data[name] for name in ("dataset", "sha256", *_IDENTITY)}
        folder = adapted.folder
        if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
            adapted.make()
            adapted.finish("adapt", key, read)
            return
        if Run.note(marker, key) is not None:
            return
        if (begun := read_json(marker)) is not None and not self._goes_on and not adapted.published:
            # Killed before anything was kept of it: what it would have become is in nobody's way.
            with locked(adapted.cache, folder):
                shutil.rmtree(self.work, ignore_errors=True)
                adapted.finish("adapt", key, read)
            return
        before = {} if begun is None else begun.get("facts", {})
        changed = before.get("dataset") == read["dataset"] and any(
            name in before and before[name] != read[name] for name in _IDENTITY
        )
        why = "exists and is not this training, begun before"
        if changed:
            why = f"was begun before {read['dataset']} changed, and trains on its former texts"
        raise OutputExistsError(f"{folder} {why}; choose another --out, or delete the folder")

    @contextmanager
    def at_work(self) -> Iterator[None]:
        """While the training lasts, as `Run.at_work`; if it fails with nothing to go on from, the folder goes.

        Raises:
            RunBusyError: Another process trains in it.
        """
        with self._adapted.at_work(self._goes_on_after):
            yield

    @property
    def _goes_on(self) -> bool:
        return self.has_teacher or last_checkpoint(self.work) is not None

    def _goes_on_after(self, error: BaseException) -> bool:
        """Whether something is kept of which the same command would make more.

        What was stopped goes on as it is, and so does what lost one of its processes. What failed (memory, a setting)
        needs other settings, with which it is another training: then what the source predicts is not worth that it
        bars the folder.
        """
        stopped = isinstance(error, Cancelled | ProcessLostError) or not isinstance(error, Exception)
        return self._goes_on if stopped else last_checkpoint(self.work) is not None
