"""A process beside this one that calls functions for it, one at a time, and can be ended at any moment.

What it uses is gone with it: its memory, torch's default dtype, whatever hangs. It is an interpreter of its own that
imports what it is asked to call, so nothing here imports more than it must.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import multiprocessing
import os
import pickle
import signal
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, runtime_checkable

from tmerge.errors import Cancelled, TmergeError

if TYPE_CHECKING:
    from tmerge.stages.step import Step

__all__ = ["Child", "ChildFaultError", "ChildLostError", "Message", "Told"]

# Seconds between two looks at whether the answer is still wanted, and between two messages of progress.
_LOOK = 0.1
# Seconds that it has to end when it is told to.
_GRACE = 1.0
# What is sent to one that is to stop what it does.
_STOP = b""

_START = multiprocessing.get_context("spawn")

# Libraries are to say nothing of their own: what matters comes back as an answer or an error.
_QUIET = {
    "TRANSFORMERS_VERBOSITY": "error",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
}


class ChildLostError(Exception):
    """The process has ended before it answered.

    Attributes:
        status: Its exit code; negative: the signal that ended it.
    """

    def __init__(self, status: int | None) -> None:
        super().__init__(f"the process ended with status {status}")
        self.status = status


class ChildFaultError(Exception):
    """The function raised what no user can mend; the text is its traceback."""


@runtime_checkable
class Message(Protocol):
    """What a function may tell its listener, beside steps: it can be pickled, and holds no tensors."""

    def replaces(self, earlier: Any) -> bool:
        """Whether who hears this one has no need of the one before it."""


class Told(NamedTuple):
    """A `tmerge.stages.step.Step` on its way here, without tensors: they would be shared, and not copied."""

    stage: str
    what: str
    done: int
    total: int
    unit: str
    row: tuple[str, int, tuple[float, ...]] | None = None

    @classmethod
    def of(cls, step: Step) -> Told:
        """The step's."""
        row = None if step.row is None else (step.row[0], step.row[1], tuple(step.row[2].tolist()))
        return cls(step.stage, step.what, step.done, step.total, step.unit, row)

    def replaces(self, earlier: Told) -> bool:
        """Whether who hears this one has no need of the one before it."""
        return earlier.row is None and (earlier.stage, earlier.what) == (self.stage, self.what)


class Child:
    """The process; it starts at once, and ends with this one or at `end`.

    Args:
        name: As a list of processes shows it.
        prepare: Modules to import before it is asked anything.
    """

    def __init__(self, name: str, prepare: Sequence[str] = ()) -> None:
        self._ours, of_child = _START.Pipe()
        self._process = _START.Process(target=_serve, args=(of_child, tuple(prepare)), name=name, daemon=True)
        self._process.start()
        of_child.close()

    @property
    def pid(self) -> int | None:
        """Its number."""
        return self._process.pid

    @property
    def alive(self) -> bool:
        """Whether it can be asked."""
        return not self._ours.closed and self._process.is_alive()

    def call(
        self,
        function: Callable[..., Any],
        *words: Any,
        hear: Callable[[Any], None] | None = None,
        pulse: Callable[[], None] = lambda: None,
    ) -> Any:
        """Call a function of a module there.

        Args:
            function: It takes `words`, and the keyword ``listener`` where `hear` is given.
            words: Sent there.
            hear: Hears here what the function tells its listener, a moment later, of quick ones the last; may raise.
                A step arrives as `Told`, a `Message` as it is.
            pulse: Called several times a second; may raise. Whatever the two raise ends the process.

        Raises:
            TmergeError: As the function raised it.
            ChildFaultError: It raised anything else.
            ChildLostError: The process has ended.
        """
        try:
            self._exchange(lambda: self._send((function, words, hear is not None)))
            while True:
                pulse()
                if not self._exchange(lambda: self._ours.poll(_LOOK)):
                    continue
                kind, said = pickle.loads(self._exchange(self._ours.recv_bytes))
                if kind != "told":
                    break
                for told in said:
                    if hear is not None:
                        hear(told)
        except BaseException:
            self.end()
            raise
        if kind == "answer":
            return said
        if kind == "error":
            error, message = said
            raise error(message)
        raise ChildFaultError(said)

    def stop(self) -> None:
        """Within a call's `pulse`: have the function raise `Cancelled` when it next tells its listener anything."""
        self._exchange(lambda: self._ours.send_bytes(_STOP))

    def _exchange(self, step: Callable[[], Any]) -> Any:
        """One step of the talk with it, in which it may be found to be gone."""
        try:
            return step()
        except (EOFError, OSError):
            # Its own exit code is to be known, and not that of being ended here.
            self._process.join(_GRACE)
            raise ChildLostError(self._process.exitcode) from None

    def end(self) -> None:
        """End it: asked first, then by force."""
        self._ours.close()
        for stop in (self._process.terminate, self._process.kill):
            if self._process.is_alive():
                stop()
                self._process.join(_GRACE)

    def _send(self, message: Any) -> None:
        self._ours.send_bytes(pickle.dumps(message))


# -- in the process ------------------------------------------------------------------------------------------------


def _serve(connection: Connection, prepare: tuple[str, ...]) -> None:
    """Answer until the other side is gone."""
    # An interrupt on the terminal is the parent's to act on.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ.update(_QUIET)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    for module in prepare:
        importlib.import_module(module)
    gc.freeze()  # libraries are no garbage: whoever looks for some need not look through them
    with contextlib.suppress(EOFError, OSError):
        while True:
            asked = connection.recv_bytes()
            # What was to stop may have ended meanwhile.
            if asked != _STOP:
                connection.send_bytes(_answer(asked, connection))


def _answer(asked: bytes, connection: Connection) -> bytes:
    try:
        function, words, heard = pickle.loads(asked)
        if not heard:
            return pickle.dumps(("answer", function(*words)))
        with _Telling(connection) as listener:
            return pickle.dumps(("answer", function(*words, listener=listener)))
    except TmergeError as error:
        return pickle.dumps(("error", (type(error), str(error))))
    except Exception:  # noqa: BLE001 - the parent decides what becomes of it
        return pickle.dumps(("fault", traceback.format_exc()))


def _end_with_parent() -> None:
    """Whatever this process is within, it does not outlive the one that asks."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


class _Telling:
    """A listener that sends what it hears from a thread of its own: the work never waits for the pipe."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._told: list[Message] = []
        self._some = threading.Event()
        self._lock = threading.Lock()
        self._over = False
        self._sender = threading.Thread(target=self._send, daemon=True)

    def __call__(self, step: Step | Message) -> None:
        if self._connection.poll():
            self._connection.recv_bytes()
            raise Cancelled("stopped by who asked")
        told: Message = step if isinstance(step, Message) else Told.of(step)
        with self._lock:
            if self._told and told.replaces(self._told[-1]):
                self._told.pop()
            self._told.append(told)
        self._some.set()

    def __enter__(self) -> _Telling:
        self._sender.start()
        return self

    def __exit__(self, *raised: object) -> None:
        self._over = True
        self._some.set()
        self._sender.join()

    def _send(self) -> None:
        with contextlib.suppress(OSError):
            while not (self._over and not self._told):
                self._some.wait()
                self._some.clear()
                with self._lock:
                    told, self._told = self._told, []
                if told:
                    self._connection.send_bytes(pickle.dumps(("told", told)))
                if not self._over:
                    time.sleep(_LOOK)
