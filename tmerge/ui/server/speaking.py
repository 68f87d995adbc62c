"""The target, the fused model and the source answer a prompt, one after the other, heard while they speak.

They speak in a process beside the app, which has the models of one run and keeps them for its next question. It is
ended when it has had nothing to say for a while, when another run's models are asked, and before a merge begins: the
two are never in memory together (`RunStore.alone`). The thread that asks it holds the locks, not the page that listens,
and stops by itself when nobody listens any more. No model holds the others up without end: it has so long to be loaded,
to its first token and to its last, and its process is ended where it takes longer.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

from tmerge.answers import SPEAKING_SECONDS, Question, Said, answer
from tmerge.child import Child, ChildFaultError, ChildLostError
from tmerge.errors import Cancelled, TmergeError
from tmerge.recipe import Recipe
from tmerge.ui.server.aside import TooSlowError
from tmerge.ui.server.faults import fault_line
from tmerge.ui.server.limits import BusyError
from tmerge.ui.server.runs import RunStore

__all__ = ["ROLES", "Speaker"]

ROLES = ("target", "fused", "source")

_NAME = "tmerge-speaker"
# Seconds that a speaker goes on though nobody listens, and to wait for another speaker.
_UNHEARD = 15.0
_PATIENCE = 30.0
# Seconds that a model which is to stop has until its process is ended: it may be within the loading of a large one.
_GRACE = 2.0
# Seconds that a model may take to be loaded, from there to its first token, and from there to its end, which comes by
# itself but for what hangs within one token.
_LOADING = 900.0
_FIRST_TOKEN = 300.0
_TO_THE_END = SPEAKING_SECONDS + 30.0
# Seconds after which a process that has nothing to say is ended.
_IDLE = 120.0
# Seconds between two looks of the page at what was said.
_PAUSE = 0.1

_log = logging.getLogger(__name__)


@dataclass
class _Talk:
    """One question on its way through the three models."""

    recipe: Recipe
    folder: Path
    question: Question
    said: dict[str, Said] = field(default_factory=lambda: {role: Said() for role in ROLES})
    stop: threading.Event = field(default_factory=threading.Event)
    over: threading.Event = field(default_factory=threading.Event)
    heard: float = field(default_factory=time.monotonic)

    def tell(self, role: str, said: Said) -> None:
        self.said = {**self.said, role: said}

    @property
    def unwanted(self) -> bool:
        return self.stop.is_set() or time.monotonic() - self.heard > _UNHEARD

    def fail(self, role: str, why: str) -> None:
        self.tell(role, replace(self.said[role], state="failed", note=why.replace(str(self.folder), "the fused model")))

    @property
    def unended(self) -> dict[str, Said]:
        """Of the models that have not spoken to their end."""
        return {role: said for role, said in self.said.items() if said.state in ("waiting", "loading", "speaking")}

    def fail_all(self, why: str) -> None:
        for role in self.unended:
            self.fail(role, why)

    def end(self) -> None:
        for role, said in self.unended.items():
            note = "stopped" if said.state == "waiting" else f"{said.note}, stopped"
            self.tell(role, replace(said, state="stopped", note=note))


class _Patience:
    """How long one model may still take; a hostile one, whose chat template is a program, would take for ever."""

    def __init__(self) -> None:
        self._far, self._began = 0, time.monotonic()

    def hear(self, said: Said) -> None:
        """Take in how far it is: not loaded, not begun, or speaking."""
        far = 2 if said.tokens else 1 if said.state == "speaking" else self._far
        if far != self._far:
            self._far, self._began = far, time.monotonic()

    def check(self) -> None:
        """Raise `TooSlowError` where it has taken too long."""
        seconds, why = (
            (_LOADING, ": it was not loaded by then; try again later"),
            (_FIRST_TOKEN, " of being loaded; try a shorter prompt, or without its chat template"),
            (_TO_THE_END, " of its first token; ask for fewer tokens"),
        )[self._far]
        if time.monotonic() - self._began > seconds:
            raise TooSlowError(f"no answer within {seconds:.0f} s{why}")


class Speaker:
    """Has models answer, one at a time.

    Args:
        store: The app's runs, whose merges it waits for, and makes room for.
    """

    def __init__(self, store: RunStore) -> None:
        self._store = store
        self._talks: dict[str, _Talk] = {}
        # Held by who speaks; the process, the run's folder whose models it has, and when it was last used, are theirs.
        self._one = threading.Lock()
        self._child: Child | None = None
        self._folder: Path | None = None
        self._used = 0.0
        store.asks_for_room(self.let_go)

    def ask(self, visitor: str, recipe: Recipe, folder: Path, question: Question) -> Iterator[dict[str, Said]]:
        """Put a question to the three models of a run.

        Args:
            visitor: Who may `stop` it.
            recipe: The run's, resolved.
            folder: The run's, which holds the fused model.
            question: What is asked.

        Yields:
            Role -> its answer so far, whenever there is more of it.

        Raises:
            PromptError: The question cannot be put.
        """
        talk = _Talk(recipe, folder, question.checked())
        self.stop(visitor)
        self._talks[visitor] = talk
        seen = None
        try:
            threading.Thread(target=self._work, args=(talk,), name=_NAME, daemon=True).start()
            while True:
                talk.heard = time.monotonic()
                over, said = talk.over.is_set(), talk.said
                if said is not seen:
                    seen = said
                    yield said
                if over:
                    return
                talk.over.wait(_PAUSE)
        finally:
            talk.stop.set()
            if self._talks.get(visitor) is talk:
                del self._talks[visitor]

    def stop(self, visitor: str) -> None:
        """End what a visitor has asked: between two tokens, or with its process where that takes long."""
        talk = self._talks.get(visitor)
        if talk is not None:
            talk.stop.set()

    def let_go(self) -> None:
        """End the process, unless it speaks."""
        if self._one.acquire(timeout=_GRACE):
            self._end_process()
            self._one.release()

    # -- the thread that asks ------------------------------------------------------------------------------------

    def _work(self, talk: _Talk) -> None:
        try:
            if not self._turn(talk):
                return
            try:
                with self._store.alone(patience=1):
                    for role in ROLES:
                        if talk.unwanted:
                            return
                        self._speak(talk, role)
            finally:
                self._used = time.monotonic()
                self._one.release()
                idle = threading.Timer(_IDLE, self._end_idle)
                idle.daemon = True
                idle.start()
        except TmergeError as error:
            talk.fail_all(str(error))
        except Exception:  # noqa: BLE001 - the log has it, the visitor its number; the page is not to say "stopped"
            talk.fail_all(fault_line("a model could not answer"))
        finally:
            talk.end()
            talk.over.set()

    def _turn(self, talk: _Talk) -> bool:
        """Wait for those who speak now."""
        until = time.monotonic() + _PATIENCE
        while not self._one.acquire(timeout=_PAUSE):
            if talk.unwanted:
                return False
            if time.monotonic() > until:
                raise BusyError("the models are answering someone else; try again in a minute")
        return True

    def _speak(self, talk: _Talk, role: str) -> None:
        """Have one model answer."""
        talk.tell(role, Said("loading", "", "loading the model"))
        recipe = talk.recipe
        reference = str(talk.folder) if role == "fused" else getattr(recipe, role)
        patience = _Patience()
        stopping: float | None = None

        def hear(said: Said) -> None:
            patience.hear(said)
            talk.tell(role, said)

        def pulse() -> None:
            nonlocal stopping
            if talk.unwanted and stopping is None:
                stopping = time.monotonic()
                child.stop()
            elif stopping is not None and time.monotonic() - stopping > _GRACE:
                raise Cancelled("stopped by its visitor")
            elif stopping is None:
                patience.check()

        try:
            # The system may have neither memory nor a number for it.
            child = self._process(talk.folder)
            said = child.call(answer, reference, recipe.dtype, recipe.device, talk.question, hear=hear, pulse=pulse)
            talk.tell(role, said)
        except Cancelled:
            return
        except TmergeError as error:
            talk.fail(role, str(error))
        except ChildLostError as error:
            _log.error("the process of a model that was to answer was lost: %s", error)
            talk.fail(role, "the system ended this model, as it does where memory runs out; try again later")
        except (ChildFaultError, OSError) as error:
            details = str(error) if isinstance(error, ChildFaultError) else None
            talk.fail(role, fault_line("a model could not answer", details))

    # -- the process ---------------------------------------------------------------------------------------------

    def _process(self, folder: Path) -> Child:
        """The one that has this run's models, or a new one."""
        if self._child is not None and self._child.alive and self._folder == folder:
            return self._child
        self._end_process()
        self._child, self._folder = Child(_NAME), folder
        return self._child

    def _end_process(self) -> None:
        if self._child is not None:
            self._child.end()
            self._child = None

    def _end_idle(self) -> None:
        if self._one.acquire(blocking=False):
            if time.monotonic() - self._used >= _IDLE:
                self._end_process()
            self._one.release()
