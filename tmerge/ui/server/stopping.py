"""Stopping work between two modules of a model: one batch of a large one takes longer than a visitor waits."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Any

import torch

from tmerge.errors import Cancelled

__all__ = ["watched_modules"]


@contextlib.contextmanager
def watched_modules(stop: threading.Event) -> Iterator[None]:
    """Ask before every module's forward pass in this thread whether to stop.

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
