"""One run of a visitor: how far it is, what it said, and how it ended."""

from __future__ import annotations

import contextlib
import contextvars
import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from tmerge.child import Told
from tmerge.errors import Cancelled, RunNotFoundError
from tmerge.recipe import Recipe
from tmerge.report import Relatedness, Report
from tmerge.stages.step import NOTE

if TYPE_CHECKING:
    from tmerge.ui.server.examples import Example
    from tmerge.ui.server.pushes import PushUnderWay

__all__ = ["GONE", "Asks", "CouplingRow", "Further", "StageProgress", "State", "VisitorRun", "Way"]

State = Literal["waiting", "running", "done", "failed", "cancelled"]
Way = Literal["sft", "distill", "compare"]
Asks = Literal["merge", "training", "comparison", "relatedness"]

GONE = "this run is gone or not finished; start it again, or open its link"

_LOG_LINES = 500


@dataclass
class StageProgress:
    """How far one stage of a run is; or all of it, by what is counted in it: a training's steps, a comparison's rows.

    Attributes:
        began: When the stage began, `time.time`.
        what: In words: what is being done.
        done: Units done of this piece of work.
        total: Units in all.
        unit: ``texts``, ``layers``, ...
        piece_began: When this piece of its work was first heard of.
        ended: When the next stage began; None while it is the current one.
        first: Units of this piece that were done then: where it was continued, those before say nothing of its pace.
        heard: When the last of it was heard.
    """

    began: float
    what: str = ""
    done: int = 0
    total: int = 1
    unit: str = ""
    piece_began: float = 0.0
    ended: float | None = None
    first: int = 0
    heard: float = 0.0

    @property
    def rate(self) -> float | None:
        """Units a second, measured over this piece of work; None before there is something to measure."""
        made, seconds = self.done - self.first, self.heard - self.piece_began
        return made / seconds if made and seconds > 0.2 else None

    def remaining(self, now: float) -> float | None:
        """Seconds that this piece of work still takes at that rate; None where it has none, and when all is done."""
        left = self.total - self.done
        return max(0.0, left / self.rate - (now - self.heard)) if left and self.rate is not None else None

    def hear(self, step: Told, now: float) -> None:
        """Take in a step of it."""
        if self.what != step.what:
            self.piece_began, self.first = now, step.done
        self.what, self.done, self.total, self.unit, self.heard = step.what, step.done, step.total, step.unit, now


@dataclass(frozen=True)
class CouplingRow:
    """One target layer's transport costs to all source layers, as it was solved.

    Attributes:
        key: Feature, such as ``q.post``.
        layer: Of the target.
        costs: One for each source layer that has the feature.
    """

    key: str
    layer: int
    costs: tuple[float, ...]


@dataclass(frozen=True)
class Further:
    """What is done with a finished merge, in place of a merge.

    Attributes:
        merged: The merge's folder with its cache, this run's own.
        steps: Of the optimiser, in every training.
        way: Trained on top as `adaptation.objective` says, or compared with trainings.
    """

    merged: Path
    steps: int
    way: Way

    @property
    def counted(self) -> str:
        """The unit that says how far all of it is."""
        return "rows" if self.way == "compare" else "steps"


@dataclass
class VisitorRun:
    """One run, as its visitor sees it.

    Attributes:
        id: Unguessable; the link's.
        recipe: As it was asked for, uploads under their own name.
        folder: The run's folder, as `tmerge.run.Run` reads it; complete once `state` is ``done``.
        visitor: Whose it is, for the limits; never shown.
        state: Where it is.
        stages: The stages so far, in order.
        log: Lines so far, the last `_LOG_LINES` of them.
        rows: Transport costs so far.
        error: Why it failed, in one line, with the remedy.
        fault: Whether that was a fault of ours and not something to be mended.
        report: report.json, once it is done.
        push: Its last push, under way or over.
        reading: One for each of those that read its files just now.
        removed: Whether its files are gone, or going.
        turn: Held by who begins to read them, and by who decides that they go.
        relates: Whether it asks no more than whether the two models are related.
        relatedness: What it found, where it asks that, once it is done.
        further: What it does with a finished merge; then `folder` is of what a training makes, or the merge compared.
        counted: How far that is, once it is heard.
        example: What is told of a recorded run, whose weights are not there; None of a visitor's own.
        created, started, ended, looked_at: `time.time`.
        version: Goes up with every change: a page that has seen it has nothing to draw.
        expected: Stage -> seconds that `check` expected it to take; empty where it is not known.
        cancelling: Set once its visitor wants it to stop.
        read: The recipe that is run, its dataset the copy of an upload; never shown.
        gpu: On ZeroGPU, seconds that a GPU is asked for, by the stage that its call ends with.
        context: Likewise, whose request asks.
    """

    id: str
    recipe: Recipe
    folder: Path
    visitor: str
    state: State = "waiting"
    stages: dict[str, StageProgress] = field(default_factory=dict)
    log: deque[str] = field(default_factory=lambda: deque(maxlen=_LOG_LINES))
    rows: list[CouplingRow] = field(default_factory=list)
    error: str | None = None
    fault: bool = False
    report: Report | None = None
    push: PushUnderWay | None = None
    reading: set[object] = field(default_factory=set)
    removed: bool = False
    turn: threading.Lock = field(default_factory=threading.Lock, repr=False, compare=False)
    relates: bool = False
    relatedness: Relatedness | None = None
    further: Further | None = None
    counted: StageProgress | None = None
    example: Example | None = None
    created: float = field(default_factory=time.time)
    started: float | None = None
    ended: float | None = None
    looked_at: float = field(default_factory=time.time)
    version: int = 0
    expected: Mapping[str, float] = field(default_factory=dict)
    cancelling: threading.Event = field(default_factory=threading.Event)
    read: Recipe | None = None
    gpu: dict[str, float] | None = None
    context: contextvars.Context | None = None

    @property
    def asks(self) -> Asks:
        """What it is."""
        if self.further is not None:
            return "comparison" if self.further.way == "compare" else "training"
        return "relatedness" if self.relates else "merge"

    @property
    def over(self) -> bool:
        """Whether nothing more will happen to it."""
        return self.state in ("done", "failed", "cancelled")

    @contextlib.contextmanager
    def being_read(self) -> Iterator[None]:
        """For who reads its files: it is not removed meanwhile.

        Raises:
            RunNotFoundError: It was removed before.
        """
        reader = object()
        with self.turn:
            if self.removed or not self.folder.is_dir():
                raise RunNotFoundError(GONE)
            self.reading.add(reader)
        try:
            yield
        finally:
            self.reading.remove(reader)

    def stop_if_cancelled(self) -> None:
        """Raise `Cancelled` if the visitor wants it to stop."""
        if self.cancelling.is_set():
            raise Cancelled("stopped by its visitor")

    def wait_again(self) -> None:
        """Be as it was before it ran, but for what it had finished."""
        finished = list(self.stages)[:-1]
        self.stages = {name: self.stages[name] for name in finished}
        if "transport" not in finished:
            self.rows = []
        self.cancelling.clear()
        self.started = self.ended = self.counted = None
        self.state = "waiting"
        self.say("continued")

    def hear(self, step: Told) -> None:
        """Take in one step of the pipeline; raises `Cancelled` if the visitor wants it to stop."""
        self.stop_if_cancelled()
        if step.stage == NOTE:
            # A run that is taken in turns says them in each.
            if not any(line.endswith(f"  note: {step.what}") for line in self.log):
                self.say(f"note: {step.what}")
            return
        now = time.time()
        stage = self.stages.get(step.stage)
        if stage is None:
            for earlier in self.stages.values():
                earlier.ended = earlier.ended or now
            stage = self.stages[step.stage] = StageProgress(now)
        if self.further is not None and step.unit == self.further.counted:
            self.counted = self.counted or StageProgress(now)
            self.counted.hear(step, now)
        # A comparison's rows are told of piece by piece as well.
        if step.unit != "rows":
            if stage.what != step.what:
                self.say(step.what)
            stage.hear(step, now)
        if step.row is not None:
            self.rows.append(CouplingRow(*step.row))
        self.version += 1

    def say(self, line: str) -> None:
        """Add a line to the log."""
        self.log.append(f"{time.strftime('%H:%M:%S')}  {line}")
        self.version += 1
