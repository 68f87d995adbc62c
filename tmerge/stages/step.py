"""Progress: what the stages of a run tell whoever listens."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

from torch import Tensor

from tmerge.calibration import Room
from tmerge.processes import ALONE, Processes
from tmerge.recipe import Recipe, Reconstruction

__all__ = ["NOTE", "STAGES", "Listener", "Progress", "Step", "fusing_stage", "stage_names", "stages_until"]

STAGES = ("texts", "target", "source", "transport", "fuse", "evaluate", "save")
"""Of a merge that carries weights at a given alpha; `stage_names` has those of any recipe."""
NOTE = "note"
"""The stage of a `Step` that only says something, before the work begins."""


@dataclass(frozen=True)
class Step:
    """One step of progress.

    Attributes:
        stage: One of `stage_names`; or `NOTE`.
        what: In words: what is being done.
        done: Units done.
        total: Units in all.
        unit: ``texts``, ``layers``, ...
        row: For the transport stage, (feature key, target layer, its (M,) transport costs).
    """

    stage: str
    what: str
    done: int
    total: int
    unit: str
    row: tuple[str, int, Tensor] | None = None


def fusing_stage(recipe: Recipe) -> str:
    """The stage that works out what is written into the target."""
    return "reconstruct" if isinstance(recipe.fusion, Reconstruction) else "fuse"


def stage_names(recipe: Recipe) -> list[str]:
    """A recipe's stages, in their order."""
    names = [fusing_stage(recipe) if name == "fuse" else name for name in STAGES]
    if recipe.fusion.alpha == "auto":
        names.insert(names.index("evaluate"), "choose")
    return names


def stages_until(recipe: Recipe, last: str) -> list[str]:
    """A recipe's stages until one of them, in their order."""
    names = stage_names(recipe)
    return names[: names.index(last) + 1]


Listener = Callable[[Step], None]
"""Hears every `Step`; may raise `Cancelled`, which stops between two steps and keeps what is finished."""


@dataclass(frozen=True)
class Progress:
    """What one stage says, to one listener; and who does it.

    Attributes:
        stage: Its name.
        listener: Hears of it.
        processes: Those that do the stage together.
        room: What batches fit, as the stage finds out.
    """

    stage: str
    listener: Listener
    processes: Processes = ALONE
    room: Room = field(default_factory=Room)
    _said: set[str] = field(default_factory=set)

    @property
    def alone(self) -> Progress:
        """The same, of what one of the processes does while the others wait."""
        return replace(self, processes=ALONE)

    def step(self, what: str, done: int, total: int, unit: str, row: tuple[str, int, Tensor] | None = None) -> None:
        """Tell of a step; see `Step`."""
        self.listener(Step(self.stage, what, done, total, unit, row))

    def counting(self, what: str, unit: str) -> Callable[[int, int], None]:
        """What a long computation calls with (units done, units in all)."""
        return lambda done, total: self.step(what, done, total, unit)

    def note(self, words: str) -> None:
        """Say something that is no step, once in a stage."""
        if words in self._said:
            return
        self._said.add(words)
        self.listener(Step(NOTE, words, 1, 1, "notes"))
