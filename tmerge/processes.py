"""The processes that work on one run together: which of them does what, and what they tell each other.

`torchrun` and `accelerate launch` begin them and say in the environment who is who; all of them run the same command.
Their work is divided by items (batches, layers), each item done by one process as a single process does it, and what
came of it is told to all; in a training each takes its part of every step. Only the first process writes what a run
keeps, and only it speaks. They meet over gloo, wherever they compute, so that who waits leaves his card alone.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

import psutil

from tmerge.errors import Cancelled, EndedElsewhereError, ProcessLostError, TmergeError

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["ALONE", "LackedElsewhereError", "Processes", "are_several", "joined", "on_this_machine", "rank_of_this"]

Item = TypeVar("Item")
Result = TypeVar("Result")

# The first process may work alone for long while the others wait; one that is lost breaks its connections at once.
_PATIENCE = timedelta(days=7)
# Seconds until a process that broke its connections is seen to have ended.
_ENDING = 3.0


@dataclass(frozen=True)
class _Member:
    """Where a process runs."""

    host: str
    process: int


@dataclass(frozen=True)
class _Told:
    """What a process brings to a meeting: a value, or an error in words, or that it has run out of memory."""

    value: Any = None
    error: str | None = None
    lacks: bool = False


class LackedElsewhereError(MemoryError):
    """Another of the processes ran out of memory, in what all of them are doing."""


@dataclass
class _Telling:
    """Whether an error of this process is still to be told to the others."""

    wanted: bool = True


@dataclass(frozen=True)
class Processes:
    """The processes of a run, as one of them sees them.

    Attributes:
        rank: Of this one, from 0.
        count: How many there are.
    """

    rank: int = 0
    count: int = 1
    _group: Any = None
    _members: tuple[_Member, ...] = ()
    _telling: _Telling = field(default_factory=_Telling)

    @property
    def is_first(self) -> bool:
        """Whether this one writes and speaks."""
        return self.rank == 0

    def mine(self, items: Sequence[Item], work: Sequence[int] | None = None) -> list[Item]:
        """This process's share of the items, in their order.

        Args:
            items: The same for all processes.
            work: Of each item, as a number. The largest are given out first, each to who has least; what comes of them
                is not for `of_all`. Without it they are dealt out there and back: of sorted ones each has as much.
        """
        if work is None:
            return [items[place] for place in self._places(self.rank, len(items))]
        given, loads = [], [0] * self.count
        for place in sorted(range(len(items)), key=lambda place: -work[place]):
            least = loads.index(min(loads))
            loads[least] += work[place]
            if least == self.rank:
                given.append(place)
        return [items[place] for place in sorted(given)]

    def of_all(self, mine: Sequence[Result]) -> list[Result]:
        """What came of all items, in their order, from what came of this process's (`mine`, without work)."""
        shares = self.gathered(list(mine))
        results: list[Any] = [None] * sum(map(len, shares))
        for rank, share in enumerate(shares):
            for place, result in zip(self._places(rank, len(results)), share, strict=True):
                results[place] = result
        return results

    def _places(self, rank: int, items: int) -> list[int]:
        """Of a process's share among so many items."""
        rounds = range(-(-items // self.count))
        places = [self.count * done + (self.count - 1 - rank if done % 2 else rank) for done in rounds]
        return [place for place in places if place < items]

    def gathered(self, value: Result) -> list[Result]:
        """What each process has, in the order of their ranks.

        Raises:
            EndedElsewhereError: One of them has told of an error in the place of that.
            LackedElsewhereError: One of them has run out of memory (`lack_together`).
            ProcessLostError: One of them has ended.
        """
        if self.count == 1:
            return [value]
        told: list[_Told] = self._exchanged(_Told(value))
        for rank, of_one in enumerate(told):
            if of_one.error is not None:
                raise EndedElsewhereError(f"process {rank} of {self.count}: {of_one.error}")
        for rank, of_one in enumerate(told):
            if of_one.lacks:
                raise LackedElsewhereError(f"process {rank} of {self.count} is out of memory")
        return [of_one.value for of_one in told]

    def from_first(self, make: Callable[[], Result], meanwhile: Callable[[], object] | None = None) -> Result:
        """What the first process makes; raises as `gathered`, and what `make` and `meanwhile` do.

        Args:
            make: Makes it.
            meanwhile: Done by the others before they wait for it.
        """
        if self.count == 1:
            return make()
        made: Any = None
        if self.is_first:
            made = make()
        elif meanwhile is not None:
            meanwhile()
        return self.gathered(made)[0]  # type: ignore[no-any-return]

    def after_first(self, make: Callable[[], Result]) -> Result:
        """What each process makes for itself, the others when the first has: they find what it kept of it."""
        if self.is_first:
            made = make()
            self.wait()
            return made
        self.wait()
        return make()

    def wait(self) -> None:
        """Go on when all have come here; raises as `gathered`."""
        self.gathered(None)

    def summed(self, *sums: Tensor) -> None:
        """Add to each of these what the other processes have in theirs, in place: all have the same bits then.

        Raises as `gathered`.
        """
        if self.count == 1:
            return
        # An error of another is heard here, in a meeting of the kind that it is told in; between here and the end none
        # can be met with.
        self.wait()
        for tensor in sums:
            self._added(tensor)

    def lack_together(self, error: BaseException) -> None:
        """Tell the others, which wait somewhere, that memory ran out, so that they break off what all of them do.

        Args:
            error: That of this process; one that it has heard of needs no telling.
        """
        if self.count > 1 and not isinstance(error, LackedElsewhereError):
            self._exchanged(_Told(lacks=True))

    @contextmanager
    def failing_together(self) -> Iterator[None]:
        """While open, an error of one process is told to the others, which wait for it somewhere, and ends them too.

        All of their meetings are of one kind, so that it does not matter where they wait. Within another of these it is
        the same.
        """
        try:
            yield
        except (EndedElsewhereError, ProcessLostError):
            raise
        except Exception as error:
            if self.count > 1 and self._telling.wanted:
                self._telling.wanted = False
                with suppress(ProcessLostError):
                    self._exchanged(_Told(error=str(error) or type(error).__name__))
            raise

    @contextmanager
    def meeting_elsewhere(self, what: str) -> Iterator[None]:
        """While open, the processes wait for each other in meetings of a library, where none of ours is heard.

        An error of one is not told there: it ends that process, whose connections break, and by that the others.

        Args:
            what: Is being done, in words.

        Raises:
            ProcessLostError: Another has ended; or this one, which is not the first and would not be heard, has met an
                error that a user can mend.
        """
        self._telling.wanted = False
        try:
            yield
        except Cancelled:
            raise
        except TmergeError as error:
            if not self.rank:
                raise
            raise ProcessLostError(f"process {self.rank} of {self.count} ended {what}: {error}") from None
        except RuntimeError as error:
            lost = self._lost() if self.count > 1 else None
            if lost is None:
                raise
            raise self._of_lost(lost, error) from None
        self._telling.wanted = True

    def _exchanged(self, told: _Told) -> list[Any]:
        import torch.distributed as distributed

        all_told: list[Any] = [None] * self.count
        try:
            distributed.all_gather_object(all_told, told, group=self._group)
        except RuntimeError as error:
            raise self._of_lost(self._lost(), error) from None
        return all_told

    def _added(self, tensor: Tensor) -> None:
        import torch.distributed as distributed

        there = tensor.cpu()
        try:
            distributed.all_reduce(there, group=self._group)
        except RuntimeError as error:
            raise self._of_lost(self._lost(), error) from None
        if there is not tensor:
            tensor.copy_(there)

    def _of_lost(self, lost: int | None, error: RuntimeError) -> ProcessLostError:
        elsewhere = [rank for rank, member in enumerate(self._members) if member.host != socket.gethostname()]
        if lost is None and len(elsewhere) == 1:
            lost = elsewhere[0]  # those of this machine have been looked at
        if lost is not None:
            named = f"process {lost} of {self.count} (rank {lost})"
        elif elsewhere:
            hosts = ", ".join(dict.fromkeys(self._members[rank].host for rank in elsewhere))
            named = f"a process on {hosts} (one of ranks {', '.join(map(str, elsewhere))})"
        else:
            named = "another process"
        said = str(error).splitlines()[0][:120]
        return ProcessLostError(f"{named} has ended before the run had ({said}); the same command goes on")

    def _lost(self) -> int | None:
        """The rank of a process on this machine that runs no more."""
        end = time.monotonic() + _ENDING
        while time.monotonic() < end:
            for rank, member in enumerate(self._members):
                if member.host == socket.gethostname() and not _runs(member.process):
                    return rank
            time.sleep(0.05)
        return None


ALONE = Processes()
"""One process, which does everything."""


def are_several() -> bool:
    """Whether this process was begun as one of several."""
    said = os.environ.get("WORLD_SIZE", "")
    return said.isdecimal() and int(said) > 1


def on_this_machine() -> int:
    """How many of a run's processes share this machine; 1 of a single one."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if are_several() else 1


def rank_of_this() -> int:
    """Of this process, before it has met the others."""
    return int(os.environ.get("RANK", "0")) if are_several() else 0


@contextmanager
def joined() -> Iterator[Processes]:
    """Meet the other processes, and be assigned a card where there are any.

    Raises:
        ProcessLostError: One of them ended before all had met.
    """
    if not are_several():
        yield ALONE
        return
    import torch.distributed as distributed
    from accelerate import PartialState
    from torch.cuda import is_available

    state = PartialState(cpu=not is_available(), timeout=_PATIENCE)
    group = distributed.new_group(backend="gloo", timeout=_PATIENCE)
    alone = Processes(state.process_index, state.num_processes, group)
    members = alone.gathered(_Member(socket.gethostname(), os.getpid()))
    yield Processes(alone.rank, alone.count, group, tuple(members))
    # Not where something went wrong: whoever is not there any more would be waited for.
    state.destroy_process_group()


def _runs(process: int) -> bool:
    """Whether a process of this machine is at work: not one that has ended and whose end nobody has heard of yet."""
    try:
        return psutil.Process(process).status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False
