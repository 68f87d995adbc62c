"""Small questions, answered in processes beside the app: what two configs say of a merge, what a dataset holds.

``transformers`` sets torch's default dtype, which all threads share, while it lays a model out, and what hangs on the
network can be ended with its process. There are several of them, and a slow question is ended where others wait for its
process. No page waits for a slow answer: it is told so, and asks again.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future
from concurrent.futures import TimeoutError as NotYetError
from dataclasses import dataclass, field
from typing import Any, TypeVar

from tmerge.child import Child, ChildFaultError, ChildLostError
from tmerge.errors import TmergeError
from tmerge.ui.server.changes import SupersededError, always

__all__ = ["AGAIN_SECONDS", "TURN_SECONDS", "Aside", "StillAskingError", "TooSlowError"]

AGAIN_SECONDS = 1.0
"""A page that was told that its answer takes longer asks again so long after."""

TURN_SECONDS = 4.0
"""That a page waits for an answer before it is told so."""

_log = logging.getLogger(__name__)

_NAME = "tmerge-aside"
# Seconds that a question that nobody wants any more may still take before its process is ended: a new one has to
# import everything.
_GRACE = 3.0
# Seconds after which a process that has nothing to do is ended, if it is not the last one.
_IDLE = 60.0
# Seconds in which most questions are answered: a new process would not be there sooner.
_SOON = 1.0
# Seconds between two looks at whether a question that waits is still wanted.
_LOOK = 0.1
# Seconds that a question may take where others wait for a process.
_SHARE = 20.0
# Seconds for which an answer is kept, and an error, which whoever asked may have mended.
_KEPT_SECONDS = 120.0
_ERROR_SECONDS = 10.0
_MOST_KEPT = 100
# Each question that is not answered yet has a thread that waits for a process.
_MOST_UNANSWERED = 50

_TOO_MANY = "too many questions wait for their answers here; try again in a minute"

Answer = TypeVar("Answer")


class TooSlowError(TmergeError):
    """An answer took longer than a visitor would wait."""


class StillAskingError(Exception):
    """There is no answer yet; who asks the same again gets it when it is there. Nobody's mistake."""


@dataclass
class _Asked:
    """A question and its answer, for all who ask it: it is wanted as long as one of them wants it."""

    wanted: set[Callable[[], bool]] = field(default_factory=set)
    answer: Future[Any] = field(default_factory=Future)
    began: float = field(default_factory=time.monotonic)
    until: float = float("inf")

    def is_wanted(self) -> bool:
        return any(wanted() for wanted in tuple(self.wanted))


class Aside:
    """A few processes that answer one question each at a time; they start when they are needed, or with `warm`.

    Args:
        patience: Seconds that an answer may take, and to wait for a process that is free.
        most: Processes.
    """

    def __init__(self, patience: float = 90, most: int = 3) -> None:
        self.patience = patience
        self.most = most
        self._changed = threading.Condition()
        # The last one was used last.
        self._free: list[tuple[Child, float]] = []
        self._busy = 0
        self._waiting = 0
        self._closed = False
        self._idle: threading.Timer | None = None
        self._asked: OrderedDict[str, _Asked] = OrderedDict()
        self._asking = threading.Lock()

    def warm(self) -> None:
        """Start a process now, so that the first question does not wait for it."""
        with self._changed:
            if not self._free and not self._busy:
                self._free.append((Child(_NAME, prepare=("tmerge.ui", "datasets")), time.monotonic()))

    def ask(
        self,
        question: Callable[..., Answer],
        *words: object,
        wanted: Callable[[], bool] = always,
        seconds: float = TURN_SECONDS,
    ) -> Answer:
        """As `call`, for a page: an answer is kept for a while, for all who ask the same, and no slow one waited for.

        Args:
            question: The function.
            words: What it is called with; what they look like as text is all that they are.
            wanted: Whether the answer is wanted still; called several times a second.
            seconds: To wait for it, from when it was first asked.

        Raises:
            StillAskingError: It is not there yet.
            TooSlowError: So many others are not answered yet that this one is not asked.
            TmergeError, SupersededError, RuntimeError: As `call`.
        """
        asked = self._the_same(question, words, wanted)
        while True:
            try:
                answer: Answer = asked.answer.result(_LOOK)
                return answer
            except NotYetError:
                if not wanted():
                    raise SupersededError from None
                if time.monotonic() - asked.began > seconds:
                    raise StillAskingError("still asking, others are too or the Hub is slow; try again soon") from None
            except SupersededError:
                # To who asked before it does not matter any more; to this one it may.
                if not wanted():
                    raise
                asked = self._the_same(question, words, wanted)

    def _the_same(self, question: Callable[..., Any], words: tuple[object, ...], wanted: Callable[[], bool]) -> _Asked:
        """The question as others have asked it, or as it is asked now."""
        key = f"{question.__module__}.{question.__qualname__}{words!r}"
        with self._asking:
            asked = self._asked.get(key)
            if asked is None or time.monotonic() > asked.until:
                if sum(not each.answer.done() for each in self._asked.values()) >= _MOST_UNANSWERED:
                    raise TooSlowError(_TOO_MANY)
                asked = _Asked({wanted})
                try:
                    threading.Thread(target=self._answer, args=(asked, question, words), daemon=True).start()
                except RuntimeError:
                    # The system has no thread for it, and who asks the same later is not to wait for its answer.
                    raise TooSlowError(_TOO_MANY) from None
                self._asked[key] = asked
            self._asked.move_to_end(key)
            asked.wanted.add(wanted)
            over = [name for name, each in self._asked.items() if each.answer.done()]
            for name in over[: max(0, len(self._asked) - _MOST_KEPT)]:
                del self._asked[name]
        return asked

    def _answer(self, asked: _Asked, question: Callable[..., Any], words: tuple[object, ...]) -> None:
        try:
            answer = self.call(question, *words, wanted=asked.is_wanted)
        except BaseException as error:  # noqa: BLE001 - raised again where it is asked
            asked.until = time.monotonic() + (0 if isinstance(error, SupersededError) else _ERROR_SECONDS)
            asked.answer.set_exception(error)
        else:
            asked.until = time.monotonic() + _KEPT_SECONDS
            asked.answer.set_result(answer)

    def call(self, question: Callable[..., Answer], *words: object, wanted: Callable[[], bool] = always) -> Answer:
        """Call a function of a module there.

        Args:
            question: The function.
            words: What it is called with.
            wanted: Whether the answer is wanted still; called several times a second.

        Raises:
            TmergeError: As the function raised it; `TooSlowError` where it did not answer in time.
            SupersededError: It is not wanted any more.
            RuntimeError: It raised anything else, which is in the log.
        """
        child = self._take(wanted)
        try:
            answer: Answer = child.call(question, *words, pulse=self._pulse(wanted))
        except (TmergeError, ChildLostError, ChildFaultError) as error:
            if not wanted():
                raise SupersededError from None
            raise _to_say(error) from None
        finally:
            self._give_back(child)
        return answer

    def close(self) -> None:
        """End the processes."""
        with self._changed:
            self._closed = True
            if self._idle is not None:
                self._idle.cancel()
            self._changed.notify_all()
            self._changed.wait_for(lambda: not self._busy, 5)
            for child, _ in self._free:
                child.end()
            self._free.clear()

    # -- the processes -------------------------------------------------------------------------------------------

    def _take(self, wanted: Callable[[], bool]) -> Child:
        """A process that is free, or a new one where there may be more."""
        until, soon = (time.monotonic() + seconds for seconds in (self.patience, _SOON))
        with self._changed:
            self._waiting += 1
            try:
                while True:
                    if self._closed:
                        raise TooSlowError("the app is being closed; try again")
                    if not wanted():
                        raise SupersededError
                    while self._free:
                        child, _ = self._free.pop()
                        if child.alive:
                            self._busy += 1
                            return child
                    if not self._busy or (self._busy < self.most and time.monotonic() > soon):
                        child = Child(_NAME)
                        self._busy += 1
                        return child
                    self._changed.wait(_LOOK)
                    if time.monotonic() > until:
                        raise TooSlowError("others are asking too; try again in a minute")
            finally:
                self._waiting -= 1

    def _give_back(self, child: Child) -> None:
        with self._changed:
            self._busy -= 1
            if child.alive:
                self._free.append((child, time.monotonic()))
            self._end_later()
            self._changed.notify_all()

    def _end_later(self) -> None:
        """Look again when the first of those that are too many has been idle for long enough: one timer for all."""
        if len(self._free) > 1 and self._idle is None and not self._closed:
            left = self._free[0][1] + _IDLE - time.monotonic()
            self._idle = threading.Timer(max(left, 0.0), self._end_idle)
            self._idle.daemon = True
            self._idle.start()

    def _end_idle(self) -> None:
        with self._changed:
            self._idle = None
            # The last one stays.
            idle = [each for each in self._free[:-1] if time.monotonic() - each[1] >= _IDLE]
            self._free = [each for each in self._free if each not in idle]
            self._end_later()
        for child, _ in idle:
            child.end()

    def _pulse(self, wanted: Callable[[], bool]) -> Callable[[], None]:
        """Raises where a question's process is to be ended."""
        began = time.monotonic()
        unwanted_until: float | None = None

        def pulse() -> None:
            nonlocal unwanted_until
            now = time.monotonic()
            patience = min(self.patience, _SHARE) if self._waiting and self._busy >= self.most else self.patience
            if now - began > patience:
                raise TooSlowError(f"no answer within {patience:.0f} s; the Hub may be slow: try again")
            if self._closed:
                raise TooSlowError("the app is being closed; try again")
            if not wanted():
                unwanted_until = unwanted_until or now + _GRACE
                if now > unwanted_until:
                    raise SupersededError

        return pulse


def _to_say(error: Exception) -> Exception:
    """What the asker hears of an error on the way to its answer."""
    if isinstance(error, ChildLostError):
        return TooSlowError("the answer was lost, perhaps for lack of memory; try again")
    if isinstance(error, ChildFaultError):
        _log.error("a question to the side process failed: %s", error)
        return RuntimeError("a question to the side process failed; its traceback is in the log")
    return error
