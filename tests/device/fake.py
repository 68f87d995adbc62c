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
from unittest.mock import patch

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from tests.pico import pico_model, pico_tokenizer
from tmerge.models import LoadedModel, ModelReference

DEVICE = torch.device("meta")


@dataclass
class Waits:
    """How often a value on the device was read, and how often tensors were moved from it."""

    reads: int = 0
    moves: int = 0

    @property
    def count(self) -> int:
        """Of both."""
        return self.reads + self.moves


class _Counting(TorchDispatchMode):
    def __init__(self, waits: Waits, answer: float) -> None:
        super().__init__()
        self._waits, self._answer = waits, answer

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            self._waits.reads += args[0].device.type != "cpu"
            return self._read(args[0].dtype)
        if func is torch.ops.aten.nonzero.default:
            return self._entries(args[0])
        if func is torch.ops.aten._unique2.default:
            # All are different; as many as there are, too, the processor has to wait for.
            self._waits.reads += args[0].device.type != "cpu"
            index = args[0].new_empty(args[0].numel(), dtype=torch.int64)
            return torch.empty_like(args[0]).flatten(), index, index.clone()
        if func is torch.ops.aten.index.Tensor:
            args = args[0], [part for index in args[1] for part in self._chosen(index)]
        out = func(*args, **(kwargs or {}))
        if func is torch.ops.aten._to_copy.default and args[0].device.type != "cpu" and out.device.type == "cpu":
            self._waits.moves += 1
        return out

    def _read(self, dtype: torch.dtype) -> bool | int | float:
        if dtype.is_floating_point:
            return self._answer
        return bool(self._answer) if dtype == torch.bool else 0

    def _entries(self, mask: Tensor) -> Tensor:
        """(N, dims) where a mask is true: how many there are the processor has to wait for. All, or none."""
        self._waits.reads += mask.device.type != "cpu"
        return torch.zeros(mask.numel() if self._answer else 0, mask.dim(), dtype=torch.int64, device=mask.device)

    def _chosen(self, index: Tensor | None) -> tuple[Tensor | None, ...]:
        is_mask = index is not None and index.dtype == torch.bool
        return tuple(self._entries(index).unbind(1)) if is_mask else (index,)


@contextmanager
def fake_device(answer: float = 1.0) -> Iterator[Waits]:
    """Within it tensors have no values, and `DEVICE` is there.

    Args:
        answer: What every number that is read is; of a truth value, whether it is true. A whole number is 0.
    """
    waits = Waits()
    # Memory that is not there has an address by which it is known.
    address = patch.object(FakeTensor, "data_ptr", lambda self: self.untyped_storage()._cdata)
    with FakeTensorMode(allow_non_fake_inputs=True), _Counting(waits, answer), address:
        yield waits


def fake_pico(family: str) -> LoadedModel:
    """A pico model on the fake device."""
    with DEVICE:
        model = pico_model(family)
    return LoadedModel(
        ModelReference.parse("user/pico"), "sha256:0", model, pico_tokenizer(), None, DEVICE, torch.float32
    )
