"""Small questions, answered in a process beside the app: what two configs say of a merge, what a dataset holds.

``transformers`` sets torch's default dtype, which all threads share, while it lays a model out; a check beside a merge
could change the merge's numbers. Another process cannot, and one that hangs on the network can be ended.
"""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import threading
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any, TypeVar

from tmerge.errors import TmergeError

__all__ = ["Aside", "TooSlowError"]

_log = logging.getLogger(__name__)

Answer = TypeVar("Answer")


class TooSlowError(TmergeError):
    """An answer took longer than a visitor would wait."""


class Aside:
    """One process that answers one question at a time; it starts with the first one, or with `warm`.

    Args:
        patience: Seconds that an answer may take.
    """

    def __init__(self, patience: float = 90) -> None:
        self.patience = patience
        self._one = threading.Lock()
        self._process: multiprocessing.process.BaseProcess | None = None
        self._ours: Connection | None = None

    def warm(self) -> None:
        """Start the process now, so that the first question does not wait for it."""
        threading.Thread(target=self._warm, daemon=True).start()

    def ask(self, question: Callable[..., Answer], *words: Any) -> Answer:
        """Call a function of a module there.

        Raises:
            TmergeError: As the function raised it; `TooSlowError` where it did not answer in time.
            RuntimeError: It raised anything else, which is in the log.
        """
        with self._one:
            connection = self._connection()
            try:
                connection.send((question, words))
                if not connection.poll(self.patience):
                    self._end()
                    raise TooSlowError(f"no answer within {self.patience:.0f} s; the Hub may be slow: try again")
                good, answer = connection.recv()
            except (EOFError, OSError):
                self._end()
                raise TooSlowError("the answer was lost, perhaps for lack of memory; try again") from None
        if good:
            return answer
        if isinstance(answer, TmergeError):
            raise answer
        _log.error("a question to the side process failed: %s", answer)
        raise RuntimeError("a question to the side process failed; its traceback is in the log")

    def close(self) -> None:
        """End the process."""
        with self._one:
            self._end()

    def _warm(self) -> None:
        with self._one:
            self._connection()

    def _connection(self) -> Connection:
        if self._ours is None or self._process is None or not self._process.is_alive():
            self._end()
            context = multiprocessing.get_context("spawn")
            self._ours, of_child = context.Pipe()
            process = context.Process(target=_answer, args=(of_child,), name="tmerge-aside", daemon=True)
            process.start()
            self._process = process
            of_child.close()
        return self._ours

    def _end(self) -> None:
        if self._ours is not None:
            self._ours.close()
        if self._process is not None:
            self._process.kill()
            self._process.join(5)
        self._process = self._ours = None


def _answer(connection: Connection) -> None:
    """The process: questions in, (True, answer) or (False, why not) out, until the app is gone."""
    import signal
    import traceback

    import datasets
    import transformers

    import tmerge.preflight.check  # noqa: F401 - so that it is there when the first question comes

    # An interrupt on the terminal is the app's to act on.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    with contextlib.suppress(EOFError, OSError):
        while True:
            question, words = connection.recv()
            answer: tuple[bool, Any]
            try:
                answer = True, question(*words)
            except TmergeError as error:
                answer = False, error
            except Exception:  # noqa: BLE001 - the app logs it
                answer = False, traceback.format_exc()
            connection.send(answer)
