"""Small questions, answered in processes beside the app: what two configs say of a merge, what a dataset holds.

``transformers`` sets torch's default dtype, which all threads share, while it lays a model out, and what hangs on the
network can be ended with its process. There are several of them, and a slow question is ended where others wait for its
process. Asking waits for nothing: who asks is told that there is no answer yet, and asks again, or waits `patiently`.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, TypeVar

from tmerge.child import Child, ChildFaultError, ChildLostError
from tmerge.errors import TmergeError
from tmerge.ui.server.changes import SupersededError, always
from tmerge.ui.server.faults import FaultError, fault_line

__all__ = ["TURN_SECONDS", "Aside", "StillAskingError", "TooSlowError", "patiently"]

TURN_SECONDS = 4.0
"""That a page waits for an answer before it is told so."""

_NAME = "tmerge-aside"
# Seconds that a question that nobody wants any more may still take before its process is ended: a new one has to
# import everything.
_GRACE = 3.0
# Seconds after which a process that has nothing to do is ended, if it is not the first one.
_IDLE = 60.0
# Seconds in which most questions are answered: a new process would not be there sooner.
_SOON = 1.0
# Seconds between two looks at whether there is an answer, and whether it is still wanted.
_LOOK = 0.1
# Seconds that a question may take where others wait for a process.
_SHARE = 20.0
# Seconds for which an answer is kept, and an error, which whoever asked may have mended.
_KEPT_SECONDS = 120.0
_ERROR_SECONDS = 10.0
_MOST_KEPT = 100
_MOST_UNANSWERED = 50

_TOO_MANY = "too many questions wait for their answers here; try again in a minute"
_CLOSING = "the app is being closed; try again"

Answer = TypeVar("Answer")


class TooSlowError(TmergeError):
    """An answer took longer than a visitor would wait."""


class StillAskingError(Exception):
    """There is no answer yet; who asks the same again gets it when it is there. Nobody's mistake."""

    def __init__(self, asked: Asked) -> None:
        super().__init__("still asking, others are too or the Hub is slow; try again soon")
        self.asked = asked


@dataclass(eq=False)
class Asked:
    """A question and its answer, for all who ask it: it is wanted as long as one of them wants it.

    Attributes:
        question: The function.
        words: What it is called with.
        wanted: Of each who asked, whether it is wanted still.
        answer: Once it is there.
        began: When it was first asked, `time.monotonic`.
        until: When the answer is to be asked for anew.
    """

    question: Callable[..., Any]
    words: tuple[object, ...]
    wanted: set[Callable[[], bool]] = field(default_factory=set)
    answer: Future[Any] = field(default_factory=Future)
    began: float = field(default_factory=time.monotonic)
    until: float = float("inf")

    def is_wanted(self) -> bool:
        """Whether anybody wants it."""
        return any(wanted() for wanted in tuple(self.wanted))

    def fail(self, error: Exception) -> None:
        """Answer with an error."""
        # To who asked before it does not matter any more that nobody wanted it; to the next one it may.
        self.until = 0.0 if isinstance(error, SupersededError) else time.monotonic() + _ERROR_SECONDS
        self.answer.set_exception(error)


async def patiently(
    ask: Callable[[], Answer], wanted: Callable[[], bool] = always, seconds: float = TURN_SECONDS
) -> Answer:
    """Ask, and wait for the answer without a thread.

    Args:
        ask: Called again when the answer that it raised `StillAskingError` for is there.
        wanted: Whether it is wanted still.
        seconds: To wait, from when it was first asked.

    Raises:
        StillAskingError: It is not there by then.
        SupersededError: It is not wanted any more.
        Exception: As `ask`.
    """
    while True:
        try:
            return ask()
        except StillAskingError as still:
            while not still.asked.answer.done():
                if not wanted():
                    raise SupersededError from None
                if time.monotonic() - still.asked.began > seconds:
                    raise
                await asyncio.sleep(_LOOK)


class Aside:
    """A few processes that answer one question each at a time, each with a thread here that hands it the next one.

    Args:
        patience: Seconds that an answer may take, and to wait for a process that is free.
        most: Processes.
    """

    def __init__(self, patience: float = 90, most: int = 3) -> None:
        self.patience = patience
        self.most = most
        self._changed = threading.Condition()
        self._asked: OrderedDict[str, Asked] = OrderedDict()
        self._waiting: deque[Asked] = deque()
        # The processes' numbers, and those of the free ones.
        self._living: set[int] = set()
        self._free: set[int] = set()
        self._closed = False

    def warm(self) -> None:
        """Start a process now, so that the first question does not wait for it."""
        with self._changed:
            if not self._living:
                self._begin(("tmerge.ui", "datasets"))

    def ask(self, question: Callable[..., Answer], *words: object, wanted: Callable[[], bool] = always) -> Answer:
        """Call a function of a module there; its answer is kept for a while, for all who ask the same.

        Args:
            question: The function.
            words: What it is called with; what they look like as text is all that they are.
            wanted: Whether the answer is wanted still; called several times a second.

        Raises:
            StillAskingError: It is not there yet.
            TmergeError: As the function raised it; `TooSlowError` where it did not answer in time, or so many others
                are not answered yet that this one is not asked.
            SupersededError: It was not wanted any more.
            FaultError: It raised anything else, which is in the log.
        """
        key = f"{question.__module__}.{question.__qualname__}{words!r}"
        with self._changed:
            asked = self._asked.get(key)
            if asked is None or time.monotonic() >= asked.until:
                self._refuse_too_many()
                asked = self._asked[key] = Asked(question, words)
                self._waiting.append(asked)
                self._changed.notify_all()
            asked.wanted.add(wanted)
            self._asked.move_to_end(key)
            over = [name for name, each in self._asked.items() if each.answer.done()]
            for name in over[: max(0, len(self._asked) - _MOST_KEPT)]:
                del self._asked[name]
        if not asked.answer.done():
            raise StillAskingError(asked)
        answer: Answer = asked.answer.result()
        return answer

    def _refuse_too_many(self) -> None:
        """Have a process, and room for one more question: one that nobody wants any more takes none."""
        unwanted = [each for each in self._waiting if not each.is_wanted()]
        for each in unwanted:
            self._waiting.remove(each)
            each.fail(SupersededError())
        try:
            if self._closed or sum(not each.answer.done() for each in self._asked.values()) >= _MOST_UNANSWERED:
                raise TooSlowError(_TOO_MANY)
            if not self._living:
                self._begin()
        except RuntimeError:
            # The system has no thread for it.
            raise TooSlowError(_TOO_MANY) from None

    def close(self) -> None:
        """End the processes."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
            self._changed.wait_for(lambda: not self._living, 5)
            while self._waiting:
                self._waiting.popleft().fail(TooSlowError(_CLOSING))

    # -- the processes -------------------------------------------------------------------------------------------

    def _begin(self, prepare: Sequence[str] = ()) -> None:
        number = min(set(range(len(self._living) + 1)) - self._living)
        threading.Thread(target=self._serve, args=(number, prepare), name=_NAME, daemon=True).start()
        self._living.add(number)

    def _serve(self, number: int, prepare: Sequence[str]) -> None:
        """In a thread of its own: a process and all that it answers, until it has had nothing to do for too long."""
        child = None
        try:
            child = Child(_NAME, prepare) if prepare else None
            while (asked := self._next(number)) is not None:
                child = self._answer(asked, child)
        finally:
            if child is not None:
                child.end()
            with self._changed:
                self._living.discard(number)
                self._changed.notify_all()

    def _next(self, number: int) -> Asked | None:
        """What is to be answered now; of free processes the first one is asked, so that the others may end."""
        with self._changed:
            self._free.add(number)
            there = self._changed.wait_for(
                lambda: self._closed or (self._waiting and number == min(self._free)), _IDLE if number else None
            )
            self._free.discard(number)
            self._changed.notify_all()
            return self._waiting.popleft() if there and not self._closed else None

    def _answer(self, asked: Asked, child: Child | None) -> Child | None:
        """Have a process answer; gives the one that did, which may be another."""
        try:
            if time.monotonic() - asked.began > self.patience:
                raise TooSlowError("others are asking too; try again in a minute")
            if not asked.is_wanted():
                raise SupersededError
            child = child if child is not None and child.alive else Child(_NAME)
            answer = child.call(asked.question, *asked.words, pulse=self._pulse(asked))
        except Exception as error:  # noqa: BLE001 - raised again where it is asked
            asked.fail(_to_say(error) if asked.is_wanted() else SupersededError())
        else:
            asked.until = time.monotonic() + _KEPT_SECONDS
            asked.answer.set_result(answer)
        return child

    def _pulse(self, asked: Asked) -> Callable[[], None]:
        """Raises where a question's process is to be ended, and has another one begin where others wait for it."""
        began = time.monotonic()
        unwanted_until: float | None = None

        def pulse() -> None:
            nonlocal unwanted_until
            now, patience = time.monotonic(), self.patience
            with self._changed:
                if self._waiting and len(self._living) >= self.most:
                    patience = min(patience, _SHARE)
                elif self._waiting and now - self._waiting[0].began > _SOON:
                    with contextlib.suppress(RuntimeError):
                        self._begin()
            if now - began > patience:
                raise TooSlowError(f"no answer within {patience:.0f} s; the Hub may be slow: try again")
            if self._closed:
                raise TooSlowError(_CLOSING)
            if not asked.is_wanted():
                unwanted_until = unwanted_until or now + _GRACE
                if now > unwanted_until:
                    raise SupersededError

        return pulse


def _to_say(error: Exception) -> Exception:
    """What the asker hears of an error on the way to its answer."""
    if isinstance(error, ChildLostError):
        return TooSlowError("the answer was lost, perhaps for lack of memory; try again")
    if isinstance(error, ChildFaultError):
        return FaultError(fault_line("a question to the side process failed", str(error)))
    # The system may have neither memory nor a number for a process.
    return TooSlowError(_TOO_MANY) if isinstance(error, OSError) else error
