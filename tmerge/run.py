"""Run: one merge's folder, which of its stages are finished, and how it is taken up again.

```
fused/                        a plain transformers checkpoint, README.md (the card)
  tmerge/recipe.yaml          resolved: every default written out, revisions as commit hashes
  tmerge/report.json
  tmerge/transport.safetensors
  tmerge/cache/               features and finished stages; never pushed
```

A stage is finished when the cache holds a note of it under the right *key*: a hash over everything that decides its
result (the recipe's words for it, the models' commits, the texts, the stages before it, the library versions). That
a file is there proves nothing.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tmerge.errors import OutputExistsError, RecipeError, RunNotFoundError
from tmerge.recipe import DECIDE_NOTHING, DECIDE_WRITING, Recipe, load_recipe
from tmerge.store import locked, read_json, write_json

if TYPE_CHECKING:
    from tmerge.report import Report

__all__ = ["Run", "differences", "stage_key"]


def stage_key(stage: str, **facts: Any) -> str:
    """SHA-256 (hex) over a stage's name and all that decides its result."""
    return hashlib.sha256(json.dumps([stage, facts], sort_keys=True).encode()).hexdigest()


class Run:
    """A run's folder.

    Attributes:
        folder: The model repo that the run makes.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = Path(folder)
        # Folders that were made to begin it, from itself upwards: they go with it, should nothing come of it.
        self._made: list[Path] = []

    @property
    def work(self) -> Path:
        """``tmerge/`` in the folder: recipe, report, transport."""
        return self.folder / "tmerge"

    @property
    def cache(self) -> Path:
        """``tmerge/cache/``: never pushed."""
        return self.work / "cache"

    @property
    def kept_texts_path(self) -> Path:
        """Of the texts that a reconstruction is to leave the target as it is on."""
        return self.cache / "kept.json"

    @property
    def texts_path(self) -> Path:
        """Of the calibration set, in the cache."""
        return self.cache / "calibration.json"

    def features(self, role: str) -> Path:
        """Folder of a model's features, in the cache; `role` is ``target`` or ``source``."""
        return self.cache / "features" / role

    @property
    def reported(self) -> bool:
        """Whether a report has been written here before."""
        return (self.work / "report.json").is_file()

    @property
    def transport_path(self) -> Path:
        """transport.safetensors."""
        return self.work / "transport.safetensors"

    @classmethod
    def open(cls, folder: Path, recipe: Recipe) -> Run:
        """Begin a run in a new folder, or take up the one of this very recipe; how it is saved may be another by now.

        Args:
            folder: May be missing or empty.
            recipe: As asked for (before revisions are resolved).

        Raises:
            OutputExistsError: The folder holds something else, or a run of another recipe.
        """
        run = cls(folder)
        try:
            str(folder).encode()
        except UnicodeEncodeError:
            raise OutputExistsError(
                f"{str(folder)!r} is no name in UTF-8, which files need; choose another --out"
            ) from None
        request = run.cache / "request.json"
        if run.folder.exists() and (not run.folder.is_dir() or any(run.folder.iterdir())):
            if not run.work.is_dir():
                raise OutputExistsError(
                    f"{folder} exists and is not a run of tmerge; choose another --out, or move it away"
                )
            asked = read_json(request)
            if asked is None:
                raise OutputExistsError(
                    f"{folder} holds a run without its cache, which cannot be continued; choose another --out"
                )
            before, now = _as_written_now(asked), recipe.model_dump(mode="json")
            other = differences(_deciding(before), _deciding(now))
            if other:
                raise OutputExistsError(
                    f"{folder} is a run of another recipe ({', '.join(other[:3])}); choose another --out, "
                    "or delete the folder"
                )
            if any(before.get(key) != now[key] for key in DECIDE_WRITING):
                write_json(request, now)
        else:
            run.make()
            write_json(request, recipe.model_dump(mode="json"))
        return run

    def make(self) -> None:
        """Make its folder and cache; they go again, should nothing come of it.

        Raises:
            OutputExistsError: They cannot be made.
        """
        above = [self.folder, *self.folder.parents]
        self._made = [path for path in above if not path.exists() and not path.is_symlink()]
        try:
            self.cache.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OutputExistsError(f"{self.folder} cannot be made: {error.strerror}; choose another --out") from None

    def take_over(self, recipe: Recipe) -> None:
        """Let a copy of a run's folder be another recipe's run, which keeps of its stages those that decide alike."""
        write_json(self.cache / "request.json", recipe.model_dump(mode="json"))

    def finished(self, stage: str, key: str) -> dict[str, Any] | None:
        """What a stage noted when it finished under this key; None where it has not."""
        return self.note(self.cache / f"{stage}.json", key)

    @staticmethod
    def note(path: Path, key: str) -> dict[str, Any] | None:
        """What a file notes under this key; None where there is none, or it is of another key."""
        note = read_json(path)
        facts = note.get("facts") if note and note.get("key") == key else None
        return facts if isinstance(facts, dict) else None

    def noted(self, stage: str) -> dict[str, Any]:
        """What a stage of a finished run noted.

        Raises:
            RunNotFoundError: The run's cache is gone.
        """
        note = read_json(self.cache / f"{stage}.json")
        if note is None or "facts" not in note:
            raise RunNotFoundError(f"{self.folder} has no tmerge/cache/{stage}.json any more; run the merge again")
        return note["facts"]

    def key(self, stage: str) -> str:
        """What decided a finished stage's result, hashed.

        Raises:
            RunNotFoundError: The run's cache is gone.
        """
        self.noted(stage)
        return str((read_json(self.cache / f"{stage}.json") or {})["key"])

    def forget(self, stage: str) -> None:
        """Whatever a stage noted before."""
        (self.cache / f"{stage}.json").unlink(missing_ok=True)

    def finish(self, stage: str, key: str, facts: Mapping[str, Any]) -> None:
        """Note that a stage's artifacts are all on disk."""
        write_json(self.cache / f"{stage}.json", {"stage": stage, "key": key, "facts": dict(facts)})

    @contextmanager
    def at_work(self, goes_on: Callable[[BaseException], bool] | None = None) -> Iterator[None]:
        """While a merge or a training works in the folder, nobody else does; if nothing is finished, nothing is left.

        Args:
            goes_on: Whether the same command can go on from what is there, after this error; by itself where a stage
                has finished.

        Raises:
            RunBusyError: Another process is at work in it.
        """
        with locked(self.cache, self.folder):
            try:
                yield
            except BaseException as error:
                self.abandon(None if goes_on is None else goes_on(error))
                raise

    @property
    def published(self) -> bool:
        """Whether it holds a checkpoint or an adapter, whole."""
        return any((self.folder / name).exists() for name in ("config.json", "adapter_config.json"))

    def abandon(self, goes_on: bool | None = None) -> None:
        """Leave nothing behind: remove the folder if nothing is published, and nothing there to go on from.

        Args:
            goes_on: Whether there is; None asks whether a stage has finished.
        """
        if not self.cache.is_dir():
            return
        if goes_on is None:
            goes_on = any("key" in (read_json(path) or {}) for path in self.cache.glob("*.json"))
        if not goes_on and not self.published:
            # Not through a link, which would go in the folder's place.
            shutil.rmtree(self.work if self.folder.is_symlink() else self.folder, ignore_errors=True)
            for path in self._made:
                if path.is_dir() and not any(path.iterdir()):
                    path.rmdir()

    def report(self) -> Report:
        """report.json, validated.

        Raises:
            RunNotFoundError: There is none: not a run, or not a finished one.
            ReportError: There is one that is damaged or of another schema.
        """
        # A report is made of what the stages note, and some of those lie in runs: it cannot be imported before them.
        from tmerge.report import read_report

        path = self.work / "report.json"
        if not path.is_file():
            if self.cache.is_dir():
                raise RunNotFoundError(f"{self.folder} is not finished; continue it with the command that began it")
            raise RunNotFoundError(
                f"{self.folder} is not a run of tmerge (no tmerge/report.json); name the folder that --out named"
            )
        return read_report(path)

    def recipe(self) -> Recipe:
        """The resolved recipe."""
        path = self.work / "recipe.yaml"
        if not path.is_file():
            raise RunNotFoundError(f"{self.folder} is not a finished run of tmerge (no tmerge/recipe.yaml)")
        return load_recipe(str(path))


def _deciding(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """A recipe's keys, but for those that decide nothing of what is measured."""
    return {key: value for key, value in recipe.items() if key not in DECIDE_NOTHING | DECIDE_WRITING}


def _as_written_now(asked: Mapping[str, Any]) -> Mapping[str, Any]:
    """A run's request, which an earlier version may have written with other keys."""
    try:
        return Recipe.from_mapping(asked).model_dump(mode="json")
    except RecipeError:
        return asked


def differences(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> list[str]:
    """``key: old there, new here`` for every value that differs."""
    found = []
    for key in sorted(set(old) | set(new)):
        there, here = old.get(key), new.get(key)
        if isinstance(there, dict) and isinstance(here, dict):
            found += differences(there, here, f"{prefix}{key}.")
        elif there != here:
            found.append(f"{prefix}{key}: {there} there, {here} here")
    return found
