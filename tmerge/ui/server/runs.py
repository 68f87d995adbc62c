"""The runs of the app's visitors: one at a time, the others waiting in order, each known by its link alone.

An id cannot be guessed and is never listed, so who has a run's link has the run, and nobody else. All of a run is in a
temporary folder that goes when the run has not been looked at for a while, or when its room is needed. The work is done
in a process of its own, which is ended to stop it; what it had finished is in the folder, so that a run that was
cancelled can be continued.
"""

from __future__ import annotations

import contextlib
import contextvars
import logging
import secrets
import shutil
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from tmerge.child import Child, ChildFaultError, ChildLostError, Told
from tmerge.errors import Cancelled, RunNotFoundError, TmergeError
from tmerge.recipe import Recipe
from tmerge.report import Relatedness, Report
from tmerge.stages.merge import merge
from tmerge.stages.relatedness import measure_relatedness
from tmerge.ui.server.downloads import link_or_copy
from tmerge.ui.server.faults import fault_line
from tmerge.ui.server.further import go_further, refuse_for_memory, refuse_further
from tmerge.ui.server.limits import AppSettings, BusyError, TooManyRunsError
from tmerge.ui.server.overall import seconds_left
from tmerge.ui.server.room import goes_now, to_go
from tmerge.ui.server.run_process import NAME, lost, prepared_child
from tmerge.ui.server.uploads import hide_upload, with_upload, without_paths
from tmerge.ui.server.visitor_run import Further, State, VisitorRun, Way

__all__ = ["RunStore"]

_log = logging.getLogger(__name__)

# Removed runs that are remembered, for who comes back.
_MOST_GONE = 1000


class RunStore:
    """All runs of one app, and the one thread that works on them.

    Args:
        settings: How many runs there may be, and how long they are kept.
    """

    def __init__(self, settings: AppSettings) -> None:
        self.settings = settings
        self.root = Path(tempfile.mkdtemp(prefix="tmerge-app-"))
        self._runs: dict[str, VisitorRun] = {}
        # Those that were removed: id -> why.
        self._gone: dict[str, str] = {}
        self._queue: deque[str] = deque()
        self._changed = threading.Condition()
        self._closed = False
        self._current: str | None = None
        # The next run's process, once one is to be ready; the worker's to take.
        self._next: Child | None = None
        self._keeps_next = False
        # Held while a merge runs: see `alone`.
        self._heavy = threading.Lock()
        self._let_go: list[Callable[[], None]] = []
        self._worker = threading.Thread(target=self._work, name="tmerge-runs", daemon=True)
        self._worker.start()

    def warm(self) -> None:
        """From now on have the next run's process started before there is a run: it takes seconds to import all."""
        with self._changed:
            self._keeps_next = True
            self._next = self._next or prepared_child()

    def start(
        self,
        recipe: Recipe,
        visitor: str,
        upload: Path | None = None,
        gpu: dict[str, float] | None = None,
        expected: Mapping[str, float] | None = None,
        *,
        relates: bool = False,
    ) -> str:
        """Queue a run.

        Args:
            recipe: A vetted one (`tmerge.ui.server.limits.vetted`).
            visitor: Whom the limits count it for.
            upload: The calibration file, where the recipe's dataset is ``upload:NAME``; it is copied.
            gpu: On ZeroGPU, as `tmerge.ui.server.zero.gpu_seconds`; the GPU is then asked for in the caller's context.
            expected: Stage -> seconds, as `check` found; None where it was not asked.
            relates: Whether no more is asked than whether the two models are related.

        Returns:
            The run's id.

        Raises:
            TooManyRunsError: The visitor, or the app, has as many as it may have.
        """
        self.sweep()
        with self._changed:
            self._refuse_too_many(visitor)
            # The folder's name is not the id, which is the key to the run.
            home = Path(tempfile.mkdtemp(dir=self.root))
            run = VisitorRun(secrets.token_urlsafe(18), recipe, home / "fused", visitor)
            run.read, run.expected, run.relates = with_upload(recipe, home, upload), expected or {}, relates
            if gpu is not None:
                run.gpu, run.context = gpu, contextvars.copy_context()
            self._enqueue(run)
        return run.id

    def go_on(self, run_id: str, steps: int, way: Way, visitor: str) -> str:
        """Queue what is to be done with a finished merge, as a run of its own; the merge stays as it is.

        Args:
            run_id: Of the merge.
            steps: Of the optimiser, in every training.
            way: What is to be done.
            visitor: Whom the limits count it for.

        Returns:
            The new run's id.

        Raises:
            NotEnoughMemoryError, RecipeError: It takes more than there is, or longer than the app allows.
            RunNotFoundError: No merge of that id is done, or it is gone.
            TooManyRunsError: As for `start`.
        """
        self.sweep()
        with self._changed:
            merged = self.get(run_id)
            if merged is None or merged.report is None or merged.asks != "merge" or merged.state != "done":
                raise RunNotFoundError("there is no finished merge to go on from; start it again")
            self._refuse_too_many(visitor)
        # Nobody's models are let go for what is refused whatever is free.
        refuse_further(merged.report, merged.recipe, steps, way, self.settings)
        self._make_room()
        refuse_for_memory(merged.report, merged.recipe, merged.folder, way)
        home = Path(tempfile.mkdtemp(dir=self.root))
        compares = way == "compare"
        run = VisitorRun(secrets.token_urlsafe(18), merged.recipe, home / ("merge" if compares else "adapted"), visitor)
        run.further, run.read = Further(home / "merge", steps, way), merged.read
        try:
            # Its own, so that the merge may go meanwhile; the files are the same ones, and take no room twice.
            shutil.copytree(merged.folder, run.further.merged, copy_function=link_or_copy)
            with self._changed:
                self._refuse_too_many(visitor)
                self._enqueue(run)
        except OSError as error:
            shutil.rmtree(home, ignore_errors=True)
            raise RunNotFoundError(f"the merge's files cannot be copied ({error.strerror}); start it again") from None
        except TmergeError:
            shutil.rmtree(home, ignore_errors=True)
            raise
        return run.id

    def _enqueue(self, run: VisitorRun) -> None:
        self._runs[run.id] = run
        self._queue.append(run.id)
        self._changed.notify_all()

    def get(self, run_id: str, *, looks: bool = True) -> VisitorRun | None:
        """The run of an id; None where there is none, or it is gone.

        Args:
            run_id: Its id.
            looks: Whether it is looked at, and kept for it.
        """
        run = self._runs.get(run_id)
        if run is not None and looks:
            run.looked_at = time.time()
        return run

    def position(self, run_id: str) -> int:
        """How many runs are before this one: 0 for one that runs, is over, or is not there."""
        with self._changed:
            if run_id not in self._queue:
                return 0
            return self._queue.index(run_id) + (self._current is not None)

    def wait_seconds(self, run_id: str) -> float | None:
        """How long those take that are before a waiting run; None where one of them is not known."""
        with self._changed:
            if run_id not in self._queue:
                return None
            before = [self._current, *list(self._queue)[: self._queue.index(run_id)]]
            left = [seconds_left(self._runs[each]) for each in before if each is not None]
        return None if None in left else sum(seconds for seconds in left if seconds is not None)

    def cancel(self, run_id: str) -> None:
        """Have a run stop: at once where it waits, within a second where it runs. It can be continued."""
        with self._changed:
            run = self._runs.get(run_id)
            if run is None or run.over:
                return
            run.cancelling.set()
            if run_id in self._queue:
                self._queue.remove(run_id)
                self._end(run, "cancelled", "cancelled before it began")
                return
        run.say("stopping")

    def resume(self, run_id: str) -> None:
        """Queue a cancelled run again: it goes on after the last stage that it had finished.

        Raises:
            RunNotFoundError: There is no such run that was cancelled.
            TooManyRunsError: As for `start`.
        """
        with self._changed:
            run = self._runs.get(run_id)
            if run is None or run.state != "cancelled":
                raise RunNotFoundError("this run was not cancelled, or is not here any more; start it again")
            self._refuse_too_many(run.visitor)
            if run.gpu is not None:
                run.context = contextvars.copy_context()
            run.wait_again()
            self._enqueue(run)

    def asks_for_room(self, let_go: Callable[[], None]) -> None:
        """Have a function called before a merge or a training begins, and at the end: it lets go of kept memory."""
        self._let_go.append(let_go)

    def _make_room(self) -> None:
        for let_go in self._let_go:
            let_go()

    @contextlib.contextmanager
    def alone(self, patience: float = 0) -> Iterator[None]:
        """For other heavy work, which was told to fit into free memory: not beside a merge, nor a merge beside it.

        Args:
            patience: Seconds to wait for a merge to end.

        Raises:
            BusyError: A merge runs.
        """
        if not self._heavy.acquire(timeout=patience):
            raise BusyError(
                "a merge is running, and this app does one heavy thing at a time; try again when it is done"
            )
        try:
            yield
        finally:
            self._heavy.release()

    def sweep(self) -> None:
        """Remove runs that are over, as `tmerge.ui.server.room.to_go` says."""
        gone = to_go(list(self._runs.values()), self.settings, self.root)
        with self._changed:
            # One that was cancelled may have been continued meanwhile, or a push of it begun.
            known = [run for each in gone if (run := self._runs.get(each)) is not None]
            removed = [self._runs.pop(run.id) for run in known if goes_now(run)]
            self._gone |= {run.id: gone[run.id] for run in removed}
            self._gone = dict(list(self._gone.items())[-_MOST_GONE:])
        for run in removed:
            shutil.rmtree(run.folder.parent, ignore_errors=True)

    def why_gone(self, run_id: str) -> str:
        """What to say of a run that was removed; empty where none of that id was."""
        return self._gone.get(run_id, "")

    def close(self) -> None:
        """Stop the run that runs, forget the others, and remove all folders."""
        with self._changed:
            self._closed = True
            self._queue.clear()
            running = [run for run in self._runs.values() if run.state == "running"]
            self._changed.notify_all()
        for run in running:
            self.cancel(run.id)
        self._worker.join(30)
        self._make_room()
        with self._changed:
            if self._next is not None:
                self._next.end()
        shutil.rmtree(self.root, ignore_errors=True)

    def _refuse_too_many(self, visitor: str) -> None:
        open_runs = [run for run in self._runs.values() if not run.over]
        has = sum(run.visitor == visitor for run in open_runs)
        if has >= self.settings.runs_per_visitor:
            raise TooManyRunsError(
                f"you have {has} run{'s' if has > 1 else ''} waiting or running, as many as this app gives one "
                "visitor; cancel it, or wait for its end"
            )
        if len(open_runs) >= self.settings.total_runs:
            raise TooManyRunsError(f"{len(open_runs)} runs are waiting, as many as this app takes; try again later")

    # -- the worker --------------------------------------------------------------------------------------------

    def _work(self) -> None:
        while True:
            with self._changed:
                if not self._queue and not self._closed:
                    self._changed.wait(60)
                if self._closed:
                    return
                idle = not self._queue
            try:
                self.sweep()
            except OSError as error:
                # Room that is not made now is made the next time; the queue goes on.
                _log.warning("ended runs could not be looked through: %s", error)
            if idle:
                continue
            with self._heavy:
                with self._changed:
                    # It may have been cancelled while other heavy work was waited for.
                    run = self._runs[self._queue.popleft()] if self._queue else None
                    if run is not None:
                        self._current, run.state, run.started = run.id, "running", time.time()
                if run is not None:
                    run.say("started")
                    self._make_room()
                    self._run(run)
                    self._current = None

    def _run(self, run: VisitorRun) -> None:
        try:
            found = self._found(run)
            if isinstance(found, Relatedness):
                run.relatedness = found
                shutil.rmtree(run.folder.parent, ignore_errors=True)
            else:
                hide_upload(run)
                run.report = found
            self._end(run, "done", "done")
        except Cancelled:
            self._end(run, "cancelled", "cancelled")
        except TmergeError as error:
            run.error = without_paths(str(error), self.root)
            self._end(run, "failed", run.error)
        except Exception as error:  # noqa: BLE001 - a fault of ours: the log has it, the visitor its number
            run.error = fault_line("a run failed", str(error) if isinstance(error, ChildFaultError) else None)
            run.fault = True
            self._end(run, "failed", run.error)

    def _take_child(self) -> Child:
        """The process that is ready, or one that is started now; the next one is made ready meanwhile."""
        with self._changed:
            ready, self._next = self._next, prepared_child() if self._keeps_next and not self._closed else None
        if ready is not None and ready.alive:
            return ready
        if ready is not None:
            ready.end()
        return Child(NAME)

    def _found(self, run: VisitorRun) -> Report | Relatedness:
        """In a process of its own, which is gone when this returns or raises."""
        recipe, child = run.read or run.recipe, self._take_child()

        def hear(told: Told) -> None:
            run.hear(told._replace(what=without_paths(told.what, self.root)))

        def call(function: Callable[..., Any]) -> Any:
            return child.call(function, hear=hear, pulse=run.stop_if_cancelled)

        try:
            if run.further is not None:
                return go_further(run.further, recipe, run.folder, call)
            if run.relates:
                related: Relatedness = call(partial(measure_relatedness, recipe, run.folder))
                return related
            if run.gpu is not None and run.context is not None:
                from tmerge.ui.server import zero

                zero.in_turns(run, recipe, call, hear)
            report: Report = call(partial(merge, recipe, run.folder))
            return report
        except ChildLostError as error:
            _log.error("a run's process was lost: %s", error)
            raise lost(error.status) from None
        finally:
            child.end()

    def _end(self, run: VisitorRun, state: State, line: str) -> None:
        run.ended = time.time()
        for stage in run.stages.values():
            stage.ended = stage.ended or run.ended
        if state == "failed":
            shutil.rmtree(run.folder.parent, ignore_errors=True)
        run.say(line)
        run.state = state
        run.version += 1
