"""Running a stage: skipped where it is finished, timed, and written down when it is.

A stage is finished when the run's cache holds a note of it under its key: the hash of all that decides its result.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from typing import Any, Generic, Protocol, TypeVar, runtime_checkable

from pydantic import ValidationError

from tmerge.errors import ProcessesError
from tmerge.models import give_back_memory
from tmerge.processes import ALONE, Processes
from tmerge.report import library_versions, peak_memory
from tmerge.run import Run, differences, stage_key
from tmerge.stages.notes import Note
from tmerge.stages.step import Listener, Progress

__all__ = ["Finished", "Runner", "Stage"]

N_co = TypeVar("N_co", bound=Note, covariant=True)


class Stage(Protocol[N_co]):
    """One stage of a run, made with what it works on."""

    @property
    def name(self) -> str:
        """As it is shown, and as its note's file is named."""
        ...

    @property
    def note(self) -> type[N_co]:
        """The class of its note."""
        ...

    @property
    def together(self) -> bool:
        """Whether all processes of the run do it, each its share; else the first does all of it."""
        ...

    def inputs(self) -> dict[str, Any]:
        """What decides its result, beside the libraries' versions: JSON values."""
        ...

    def do(self, key: str, progress: Progress) -> N_co:
        """Do the work, leave its files in the run's cache under the key, and note what was measured."""
        ...


@dataclass(frozen=True)
class Finished(Generic[N_co]):
    """A stage that has been done, in this process or in an earlier one.

    Attributes:
        name: The stage's.
        key: What decided its result, hashed.
        note: What it noted.
        seconds: It took.
        peak_rss_bytes: Of the process that did it, when it was done.
        device: Where its models ran.
    """

    name: str
    key: str
    note: N_co
    seconds: float
    peak_rss_bytes: int
    device: str

    def facts(self) -> dict[str, Any]:
        """As the run's cache holds it."""
        cost = {"seconds": self.seconds, "peak_rss_bytes": self.peak_rss_bytes, "device": self.device}
        return self.note.model_dump(mode="json") | cost


class Runner:
    """Runs the stages of one run in order.

    Attributes:
        finished: Those that are done, in their order.
    """

    def __init__(self, run: Run, listener: Listener, device: str, processes: Processes = ALONE) -> None:
        self.run, self.listener, self.device, self.processes = run, listener, device, processes
        self.finished: list[Finished[Any]] = []

    def __call__(self, stage: Stage[N_co]) -> Finished[N_co]:
        """Do a stage, unless it was done under the same key before."""
        decides = {"versions": library_versions(), **stage.inputs()}
        self._refuse_others(stage.name, decides)
        key = stage_key(stage.name, **decides)
        done = self.processes.from_first(lambda: self._begun(stage, key))
        if done is None:
            if stage.together:
                worked = self._done(stage, key, self.processes)
                peak = max(self.processes.gathered(worked.peak_rss_bytes))
                done = self.processes.from_first(lambda: self._kept(replace(worked, peak_rss_bytes=peak)))
            else:
                ahead = stage.ahead if isinstance(stage, WorksAhead) else None
                done = self.processes.from_first(lambda: self._kept(self._done(stage, key, ALONE)), ahead)
        self.finished.append(done)
        return done

    def _refuse_others(self, name: str, decides: dict[str, Any]) -> None:
        """Refuse a stage that one of several processes would do by something else than the first.

        Raises:
            ProcessesError: What it is, there and here.
        """
        of_all = self.processes.gathered(decides)
        for rank, other in enumerate(of_all):
            if told := differences(of_all[0], other):
                raise ProcessesError(
                    f"process {rank} of {len(of_all)} would do {name} by something else than the first ({told[0]}); "
                    "give all of them the same packages and the same files"
                )

    def _begun(self, stage: Stage[N_co], key: str) -> Finished[N_co] | None:
        """What was done under this key before; else what another key noted is void: its files are written over."""
        done = self._before(stage, key)
        if done is None:
            self.run.forget(stage.name)
        return done

    def _done(self, stage: Stage[N_co], key: str, processes: Processes) -> Finished[N_co]:
        began = time.perf_counter()
        note = stage.do(key, Progress(stage.name, self.listener, processes))
        give_back_memory()  # between small things that stay the C library keeps what large ones held
        return Finished(stage.name, key, note, time.perf_counter() - began, peak_memory(), self.device)

    def _kept(self, done: Finished[N_co]) -> Finished[N_co]:
        self.run.finish(done.name, done.key, done.facts())
        return done

    def _before(self, stage: Stage[N_co], key: str) -> Finished[N_co] | None:
        """What was done under this key before; None where nothing was, or its note or its files are damaged."""
        facts = self.run.finished(stage.name, key)
        if facts is None:
            return None
        try:
            cost = {name: facts.pop(name) for name in ("seconds", "peak_rss_bytes", "device")}
            note = stage.note.model_validate(facts)
        except (KeyError, ValidationError):
            return None
        if isinstance(stage, KeepsFiles) and not stage.has_files(note):
            return None
        return Finished(stage.name, key, note, **cost)


@runtime_checkable
class WorksAhead(Protocol):
    """A stage of the first process, the time of which the others have a use for."""

    def ahead(self) -> None:
        """Get ready what this process needs in the stages to come, and the first makes in this one."""
        ...


@runtime_checkable
class KeepsFiles(Protocol):
    """A stage whose files others may have touched: they lie in the run's folder, and not in its cache."""

    def has_files(self, note: Any) -> bool:
        """Whether they are all there, as its note has them."""
        ...
