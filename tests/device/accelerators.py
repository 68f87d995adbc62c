"""Which accelerator is tested, and float64 on the CPU, which it is held against."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn

import tmerge.fusion.projection
import tmerge.models.loading
import tmerge.models.model
import tmerge.models.weights
import tmerge.transport.plans
from tmerge.fusion.merge import transport_neurons
from tmerge.fusion.ridge import Regression

__all__ = ["LACKING", "VARIABLE", "float64_here", "in_its_own_dtype", "accelerator_here"]

VARIABLE = "TMERGE_TESTED_DEVICE"
LACKING = f"there is no accelerator here; {VARIABLE}=cpu runs these tests without one"


def accelerator_here() -> torch.device | None:
    """The accelerator that is here, or that `VARIABLE` names."""
    if named := os.environ.get(VARIABLE):
        return torch.device(named)
    for kind, backend in (("cuda", torch.cuda), ("mps", torch.backends.mps)):
        if backend.is_available():
            return torch.device(kind)
    return None


@contextmanager
def float64_here() -> Iterator[None]:
    """Within it models compute in float64, plans are iterated in it, weights carried and regressions summed.

    What is kept on the way is as elsewhere: features, plans once they are solved, and what is written are float32.
    """
    plans = sys.modules["tmerge.transport.plans"]
    with (
        patch.object(tmerge.models.loading, "pick_dtype", _float64),
        patch.object(tmerge.models.model, "pick_dtype", _float64),
        patch.object(tmerge.models.weights, "pick_dtype", _float64),
        patch.object(plans, "working_dtype", _float64),
        patch.object(plans, "kernel_dtype", _float64),
        patch.object(tmerge.fusion.projection, "transport_neurons", _carried),
        patch.object(Regression, "add", _add),
    ):
        yield


def in_its_own_dtype(model: nn.Module) -> None:
    """Have a model train in the dtype that it has; else it would in float32."""
    dtype = next(model.parameters()).dtype
    vars(model)["float"] = lambda: model.to(dtype)


def _float64(*_: Any) -> torch.dtype:
    return torch.float64


def _carried(*given: Any) -> tuple[Tensor, Tensor | None]:
    wide = [value.double() if isinstance(value, Tensor) and value.is_floating_point() else value for value in given]
    weight, bias = transport_neurons(*wide)
    return weight.float(), None if bias is None else bias.float()


def _add(self: Regression, inputs: Tensor, wanted: Sequence[Tensor], weights: Tensor | None = None) -> None:
    inputs = inputs.double()
    if self._has_bias:
        inputs = torch.cat([inputs, inputs.new_ones(len(inputs), 1)], 1)
    by = inputs.new_ones(len(inputs), 1) if weights is None else weights.double()[:, None]
    inputs = inputs * by
    self._gram = self._gram + inputs.T @ inputs
    for index, goal in enumerate(wanted):
        goal = goal.double() * by
        self._crosses[index] = self._crosses[index] + inputs.T @ goal
        self._squares[index] += goal.square().sum()
    self.rows += len(inputs)
