"""An accelerator that is not there: torch's fake tensors, which have shapes, dtypes and devices, and no values.

Tensors that meet on two devices raise, as they do on a card. What reads a value of one, for which the processor would
wait for the device, is counted and answered with what the test says. The device is ``meta``: torch built for processors
cannot index a tensor of any other that is not there.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

DEVICE = torch.device("meta")


@dataclass
class Waits:
    """How often a value on the device was read, and how often tensors were moved from it."""

    reads: int = 0
    moves: int = 0


class _Counting(TorchDispatchMode):
    def __init__(self, waits: Waits, answer: float) -> None:
        super().__init__()
        self._waits, self._answer = waits, answer

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            self._waits.reads += args[0].device.type != "cpu"
            return self._answer if args[0].dtype.is_floating_point else bool(self._answer)
        out = func(*args, **(kwargs or {}))
        if func is torch.ops.aten._to_copy.default and args[0].device.type != "cpu" and out.device.type == "cpu":
            self._waits.moves += 1
        return out


@contextmanager
def fake_device(answer: float = 1.0) -> Iterator[Waits]:
    """Within it tensors have no values, and `DEVICE` is there.

    Args:
        answer: What every value that is read is; of a truth value, whether it is true.
    """
    waits = Waits()
    with FakeTensorMode(allow_non_fake_inputs=True), _Counting(waits, answer):
        yield waits
