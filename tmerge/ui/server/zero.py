"""The forward passes on ZeroGPU, where a Space has a GPU only within calls that are lent one.

A run is taken in turns: texts in the run's own process, the two models' reading in a call that is lent a GPU, transport
and fusion in the run's process, the scoring in a second such call, and the rest in the run's process again. A lent call
is made by the app, and runs in a process of its own too (a fork of the app's); what passes between any two is small and
can be pickled, and the run's folder on the disk is all they share.
What a call is counted on is the quota of the visitor who started the run.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import multiprocessing
import os
import queue
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

import tmerge.errors
from tmerge.child import Told
from tmerge.errors import Cancelled, DeviceError, TmergeError
from tmerge.models import give_back_memory
from tmerge.models.device import DEVICE_VARIABLE
from tmerge.preflight.check import TOKENS_PER_TEXT, Check
from tmerge.recipe import Recipe
from tmerge.stages.fetch import fetch_weights_of
from tmerge.stages.merge import advance
from tmerge.stages.step import Step, fusing_stage
from tmerge.ui.server.limits import AppSettings
from tmerge.ui.server.visitor_run import VisitorRun

__all__ = ["GPU_TURNS", "GpuLimitError", "as_on_zero", "forward_passes", "gpu_seconds", "in_turns", "lent"]

GPU_TURNS = ("source", "evaluate")
"""The stages that the two lent calls end with."""

# How long a call is lent its GPU for has to be said before it, and is an upper bound: what is not used is not counted.
# It is made of what `check` counts, of the three figures below, which are set low on purpose, and of texts that are
# all as long as the recipe lets them be. It is no measurement, and the page does not show it as one.
_OPERATIONS_A_SECOND = 5e12  # small batches of small models get a tenth of such a GPU, or less
_BYTES_A_SECOND = 3e8  # of weights, from the disk's cache to the GPU
_START_SECONDS = 20.0  # the process, the models' configs, the GPU's first steps

# The generator of a lent call says so often that it is there, so that a cancelled one is let go within seconds.
_PULSE = 0.3
_PATIENCE = 5.0
_FAULT = "ZeroGPU worker error"
_ABORTED = "GPU task aborted"


class GpuLimitError(TmergeError):
    """ZeroGPU lends no GPU for this, or took it back: a quota that is used up, a time that ran out."""


def gpu_seconds(found: Check, recipe: Recipe) -> dict[str, float]:
    """Most seconds that each of the `GPU_TURNS` takes, as its GPU is asked for."""
    longest = recipe.calibration.max_tokens / min(recipe.calibration.max_tokens, TOKENS_PER_TEXT)
    estimate, target, source = found.estimate, found.target.weight_bytes, found.source.weight_bytes

    def most(operations: float, weights: int) -> float:
        return math.ceil(_START_SECONDS + longest * operations / _OPERATIONS_A_SECOND + weights / _BYTES_A_SECOND)

    return {
        "source": most(estimate.read_operations, target + source),
        "evaluate": most(estimate.score_operations, target),
    }


def as_on_zero(found: Check, recipe: Recipe, settings: AppSettings) -> tuple[Check, dict[str, float]]:
    """What `check` found, with the forward passes on ZeroGPU, and the seconds that its GPUs are asked for.

    Raises:
        GpuLimitError: More than a visitor is lent.
    """
    seconds = gpu_seconds(found, recipe)
    total = sum(seconds.values())
    if total > settings.max_gpu_seconds:
        raise GpuLimitError(
            f"this run asks for up to {total:.0f} s of a GPU, where this app asks for {settings.max_gpu_seconds:.0f} s "
            "at most; lower calibration.texts, choose smaller models, or run it as a job on your own account"
        )
    estimate = dataclasses.replace(
        found.estimate,
        stages={"here": found.estimate.seconds - found.estimate.forward_seconds, "on ZeroGPU": total},
        # Forward passes have a limit of their own there: the seconds of a GPU.
        read_operations=0.0,
        score_operations=0.0,
        assumes=f"{found.estimate.assumes}; the models read on ZeroGPU, for up to {total:.0f} s, not measured; waiting "
        "for a GPU not counted",
    )
    return dataclasses.replace(found, estimate=estimate), seconds


def in_turns(
    run: VisitorRun, recipe: Recipe, call: Callable[[Callable[..., Any]], Any], hear: Callable[[Told], None]
) -> None:
    """Take a run up to its scoring: the forward passes in calls that are lent a GPU, the rest in the run's process.

    Args:
        run: With the seconds of GPU and the request's context that it asks with.
        recipe: That is run.
        call: Calls a function with a listener, in the run's process.
        hear: Hears every step of the lent calls; may raise.

    Raises:
        GpuLimitError: No GPU was lent, or for too short a time.
        TmergeError: As `tmerge.stages.merge.merge`.
    """
    for before, until in zip(("texts", fusing_stage(recipe)), GPU_TURNS, strict=True):
        call(functools.partial(advance, recipe, run.folder, until=before))
        call(functools.partial(fetch_weights_of, recipe))
        _on_gpu(run, recipe, until, hear)


def _on_gpu(run: VisitorRun, recipe: Recipe, until: str, hear: Callable[[Told], None]) -> None:
    """Take it up to a stage in a lent call, which this process makes: ZeroGPU knows a visitor by the request."""
    assert run.gpu is not None and run.context is not None
    seconds, context = run.gpu[until], run.context
    run.say(f"asking ZeroGPU for a GPU, for up to {seconds:.0f} s")
    import gradio as gr

    settings = recipe.model_dump(mode="json")
    call = lent()(settings, str(run.folder), until, seconds)
    try:
        while True:
            # The package reads the request, and all else that it knows of the visitor, from the context of each step.
            said = context.run(next, call, ("ended",))
            run.stop_if_cancelled()
            if said is None:
                continue
            kind, *words = said
            if kind == "step":
                hear(Told(*words))
            elif kind == "done":
                return
            elif kind == "error":
                raise _error(*words)
            else:
                raise Cancelled("stopped by its visitor")
    except gr.Error as error:
        title, message = str(getattr(error, "title", "")), str(error.message).rstrip(". ")
        if title == _FAULT and message != _ABORTED:
            raise RuntimeError(f"the call that was lent a GPU failed: {message}") from error
        if title == _FAULT:
            message = f"the GPU was taken back, perhaps after the {seconds:.0f} s that it was asked for"
        raise GpuLimitError(
            f"ZeroGPU: {message}; lower calibration.texts, try again later, or run it as a job on your own account"
        ) from None
    finally:
        context.run(call.close)


def forward_passes(
    recipe: Mapping[str, Any], folder: str, until: str, seconds: float
) -> Iterator[tuple[Any, ...] | None]:
    """In the process that is lent a GPU: the steps of a run up to a stage, and None where there is none for a while.

    Args:
        recipe: As JSON.
        folder: The run's.
        until: The stage to end with.
        seconds: As the GPU was asked for.

    Yields:
        ``("step", ...)`` with the fields of a `Step` but for its row; and at last ``("done",)``, ``("cancelled",)`` or
        ``("error", class, message)``: an exception would arrive as no more than its class.
    """
    if multiprocessing.parent_process() is not None:
        # What the app says of itself is not so here: torch is as it was, and sees the GPU.
        os.environ.pop(DEVICE_VARIABLE, None)
    said: queue.SimpleQueue[tuple[Any, ...] | BaseException] = queue.SimpleQueue()
    stop = threading.Event()

    def listen(step: Step) -> None:
        if stop.is_set():
            raise Cancelled("stopped by its visitor")
        said.put(("step", step.stage, step.what, step.done, step.total, step.unit))

    def work() -> None:
        try:
            with _watched_modules(stop):
                advance(Recipe.from_mapping(recipe), folder, until=until, listener=listen)
            said.put(("done",))
        except Cancelled:
            said.put(("cancelled",))
        except TmergeError as error:
            said.put(("error", type(error).__name__, str(error)))
        except BaseException as error:  # noqa: BLE001 - raised again where the package hears it
            said.put(error)

    # The run calls its listener, and the package wants a generator: a thread of each.
    worker = threading.Thread(target=work, name="tmerge-gpu", daemon=True)
    worker.start()
    try:
        while True:
            try:
                message = said.get(timeout=_PULSE)
            except queue.Empty:
                yield None
                continue
            if isinstance(message, BaseException):
                raise message
            yield message
            if message[0] != "step":
                return
    finally:
        stop.set()
        worker.join(_PATIENCE)
        if worker.is_alive() and multiprocessing.parent_process() is not None:
            # It does not come to its next step, within a large file perhaps; this process is of no other use.
            os._exit(1)
        give_back_memory()


@contextlib.contextmanager
def _watched_modules(stop: threading.Event) -> Iterator[None]:
    """Ask before each module's forward pass in this thread whether to stop: a batch may take longer than one waits.

    Raises:
        Cancelled: From within a forward pass, once the event is set.
    """
    thread = threading.get_ident()

    def ask(module: torch.nn.Module, inputs: Any) -> None:
        if stop.is_set() and threading.get_ident() == thread:
            raise Cancelled("stopped by its visitor")

    handle = torch.nn.modules.module.register_module_forward_pre_hook(ask)
    try:
        yield
    finally:
        handle.remove()


@functools.cache
def lent() -> Callable[..., Any]:
    """`forward_passes`, decorated: on ZeroGPU each call of it is lent a GPU, elsewhere it is the function itself.

    ZeroGPU looks for decorated functions when the app is launched, and stops an app with none.
    """
    import spaces

    # A folder of that name without __init__.py would be found where the package is not installed.
    if not hasattr(spaces, "GPU"):
        raise DeviceError("this app runs on ZeroGPU without its package; add spaces to requirements.txt")
    return spaces.GPU(duration=lambda recipe, folder, until, seconds: seconds)(forward_passes)


def _error(name: str, message: str) -> TmergeError:
    """An error of the lent call, again."""
    kind = getattr(tmerge.errors, name, None)
    kind = kind if isinstance(kind, type) and issubclass(kind, TmergeError) else TmergeError
    return kind(message)
