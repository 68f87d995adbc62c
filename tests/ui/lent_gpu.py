"""What the ZeroGPU package does around a decorated generator, on a machine without a GPU.

As its wrappers do (spaces 0.51.3): the call asks for a GPU with the request of its context and the seconds that its
``duration`` says; a process is forked for it; arguments, steps and results are pickled between the two; an exception
arrives as no more than its class; closing the generator sets an event that the process looks at after each of its
steps. In the app's process torch says that there is a GPU, in the forked one the truth is back.
"""

from __future__ import annotations

import contextvars
import multiprocessing
import os
import pickle
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import gradio as gr
import torch
from gradio.context import LocalContext

__all__ = ["LentGpu"]

_FORK = multiprocessing.get_context("fork")


@dataclass
class LentGpu:
    """Put it in the place of the module ``spaces``.

    Attributes:
        asked: (request, seconds) of every call.
        pids: Of the processes that had a GPU.
        refuse: What ZeroGPU answers to the next call, if it refuses it.
        take_back: Whether the next call's process is ended from outside.
    """

    asked: list[tuple[Any, float]] = field(default_factory=list)
    pids: list[int] = field(default_factory=list)
    refuse: str | None = None
    take_back: bool = False
    truth: Any = torch.cuda.is_available

    def GPU(self, *, duration: Any) -> Any:
        def decorate(task: Any) -> Any:
            def handler(*args: Any) -> Any:
                self.asked.append((LocalContext.request.get(None), duration(*args)))
                if self.refuse is not None:
                    raise gr.Error(self.refuse, title="ZeroGPU quota exceeded")
                results, stop = _FORK.SimpleQueue(), _FORK.Event()
                given = pickle.dumps(args)
                process = _FORK.Process(target=self._work, args=(task, given, results, stop), daemon=True)
                process.start()
                self.pids.append(process.pid)
                if self.take_back:
                    threading.Timer(0.5, process.kill).start()
                # So that the wait below ends when the process does.
                watch = threading.Thread(target=lambda: (process.join(), results.put(pickle.dumps(("gone", None)))))
                watch.start()
                try:
                    while True:
                        kind, value = pickle.loads(results.get())
                        if kind == "gone":
                            raise gr.Error("GPU task aborted", title="ZeroGPU worker error")
                        if kind == "raised":
                            raise gr.Error(value, title="ZeroGPU worker error")
                        if kind == "end":
                            return
                        try:
                            yield value
                        except GeneratorExit:
                            stop.set()
                            raise
                finally:
                    # As leaving the wrapper's pool of threads does: not before the process has let go.
                    # Only the watch may wait for the process: of two that do, one is told that it has no such child.
                    watch.join(30)
                    assert not watch.is_alive()

            return handler

        return decorate

    def _work(self, task: Any, given: bytes, results: Any, stop: Any) -> None:
        torch.cuda.is_available = self.truth

        def iterate() -> None:
            steps = task(*pickle.loads(given))
            while True:
                try:
                    step = next(steps)
                except StopIteration:
                    break
                except Exception as error:  # noqa: BLE001 - as the package does
                    results.put(pickle.dumps(("raised", type(error).__name__)))
                    return
                if stop.is_set():
                    steps.close()
                    break
                results.put(pickle.dumps(("step", step)))
            results.put(pickle.dumps(("end", None)))

        with ThreadPoolExecutor() as pool:
            pool.submit(contextvars.copy_context().run, iterate).result()
        os._exit(0)
