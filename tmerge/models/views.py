"""Views on a causal LM's projections, whatever module stores them.

A *projection* is one linear sublayer of a block, ``y = W x + b`` with ``W`` in ``(out, in)`` order. A model may
store it as a ``Linear``, transposed (``Conv1D``), or as some rows of a larger fused module. A `Projection` reads
and writes it all the same, and a `Tap` catches its features where the stored module runs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

__all__ = ["PROJECTIONS", "SIDES", "Projection", "Rows", "Tap", "feature_key"]

PROJECTIONS = ("q", "k", "v", "o", "gate", "up", "down")
"""Attention's query, key, value and output, and the MLP's three; an un-gated MLP has ``up`` and ``down`` only."""

SIDES = ("pre", "post")
"""``pre``: a projection's input x; ``post``: its output y, before any q/k norm, RoPE or activation."""

_PRE_KEYS = {
    "q": "qkv.pre",
    "k": "qkv.pre",
    "v": "qkv.pre",
    "o": "o.pre",
    "gate": "mlp.pre",
    "up": "mlp.pre",
    "down": "down.pre",
}


def feature_key(projection: str, side: str) -> str:
    """Name of the feature a projection has on a side; projections that read the same input share the name.

    Args:
        projection: One of `PROJECTIONS`.
        side: One of `SIDES`.

    Returns:
        ``"qkv.pre"``, ``"o.pre"``, ``"mlp.pre"``, ``"down.pre"``, or ``"<projection>.post"``.

    Raises:
        ValueError: The projection or the side is none of these.
    """
    if projection not in PROJECTIONS:
        raise ValueError(f"{projection!r} is not a projection; choose from {', '.join(PROJECTIONS)}")
    if side not in SIDES:
        raise ValueError(f"{side!r} is not a side; choose from {', '.join(SIDES)}")
    return _PRE_KEYS[projection] if side == "pre" else f"{projection}.post"


@dataclass(frozen=True)
class Rows:
    """Which outputs of a stored module belong to a projection, and in which order.

    The module's outputs are seen as ``groups`` groups of ``stride``; of each group ``start:stop`` is taken. One
    group is a plain slice (q, k, v one after the other); one group per kv head is the interleaved kind.

    Attributes:
        groups: Number of groups.
        stride: Outputs of the module per group.
        start: First output taken of each group.
        stop: One past the last output taken of each group.
    """

    groups: int
    stride: int
    start: int
    stop: int

    @property
    def width(self) -> int:
        """Outputs taken of each group."""
        return self.stop - self.start

    @property
    def count(self) -> int:
        """Outputs taken in all."""
        return self.groups * self.width

    @property
    def stored(self) -> int:
        """Outputs of the stored module."""
        return self.groups * self.stride

    def grouped(self, tensor: Tensor, dim: int) -> Tensor:
        """A view of the taken outputs, with `dim` split in two: ``(groups, width)``."""
        dim = dim % tensor.dim()
        return tensor.unflatten(dim, (self.groups, self.stride)).narrow(dim + 1, self.start, self.width)

    def select(self, tensor: Tensor, dim: int) -> Tensor:
        """The taken outputs along `dim`, in the projection's order; a copy only where groups interleave."""
        dim = dim % tensor.dim()
        return self.grouped(tensor, dim).flatten(dim, dim + 1)


@runtime_checkable
class ReadsRows(Protocol):
    """Weights by name of which some rows can be read alone."""

    def rows(self, name: str, index: Tensor) -> Tensor:
        """Rows of a tensor, in the order of the index."""
        ...


@dataclass(frozen=True, eq=False)
class Projection:
    """A view on one projection of one layer.

    Attributes:
        name: One of `PROJECTIONS`, or of what else a task vector changes (`tmerge.models.stream`).
        layer: Index of the block, from 0.
        out_features: Rows of the weight.
        in_features: Columns of the weight.
        has_bias: Whether there is a bias to read and write.
        module: The module that stores it, maybe with others.
        module_name: Its qualified name, such as ``model.layers.3.self_attn.qkv_proj``.
        rows: Which outputs of the module are this projection's.
        rounded_to: Dtype that written values are rounded to first; None for the module's own. For a model that is
            held in more digits than it is saved in.
        stored: The model's weights by name, where the module has none itself; each is read when it is asked for.
    """

    name: str
    layer: int
    out_features: int
    in_features: int
    has_bias: bool
    module: nn.Module
    module_name: str
    rows: Rows
    rounded_to: torch.dtype | None = None
    stored: Mapping[str, Tensor] | None = None

    @property
    def is_fused(self) -> bool:
        """Whether the module stores other outputs too."""
        return self.rows.count != self.rows.stored

    @property
    def parameters(self) -> list[str]:
        """Names of the model's parameters that it is read from: the weight's, and the bias's where there is one."""
        return [f"{self.module_name}.{name}" for name in ("weight", "bias")[: 1 + self.has_bias]]

    def _parameter(self, name: str) -> Tensor:
        if self.stored is not None:
            return self.stored[f"{self.module_name}.{name}"]
        return self.module.get_parameter(name).detach()

    def _stored_weight(self) -> Tensor:
        weight = self._parameter("weight")
        if weight.dim() == 1:
            return weight.unsqueeze(1)  # a norm's, as a matrix of one column
        # The class says which way round it is stored; a square weight's shape could not.
        return weight.T if isinstance(self.module, Conv1D) else weight

    def _stored_bias(self) -> Tensor:
        return self._parameter("bias")

    def weight(self) -> Tensor:
        """The weight ``(out, in)``, in the stored dtype and on its device; not to be written to: it may be a copy."""
        return self.rows.select(self._stored_weight(), 0)

    def weight_rows(self, index: Tensor) -> Tensor:
        """Some rows of the weight ``(len(index), in)``; where it is in a file, no others are read, as far as can be."""
        if not isinstance(self.stored, ReadsRows) or isinstance(self.module, Conv1D):
            return self.weight()[index]
        rows = self.rows
        stored = index // rows.width * rows.stride + rows.start + index % rows.width
        read = self.stored.rows(f"{self.module_name}.weight", stored)
        return read.unsqueeze(1) if read.dim() == 1 else read

    def gradient(self) -> Tensor | None:
        """The gradient of the weight ``(out, in)`` that the last backward passes left; None where they left none."""
        gradient = self.module.get_parameter("weight").grad
        if gradient is None:
            return None
        if gradient.dim() == 1:
            return gradient.unsqueeze(1)
        return self.rows.select(gradient.T if isinstance(self.module, Conv1D) else gradient, 0)

    def bias(self) -> Tensor | None:
        """The bias ``(out,)``, or None where there is none; not to be written to: it may be a copy."""
        return self.rows.select(self._stored_bias(), 0) if self.has_bias else None

    @torch.no_grad()
    def write(
        self,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        rows: Tensor | None = None,
        columns: Tensor | None = None,
    ) -> None:
        """Write in place, in the stored dtype; what is not named keeps every byte.

        Args:
            weight: ``(out, in)``, or ``(len(rows), in)``, ``(out, len(columns))``, ``(len(rows), len(columns))``.
            bias: ``(out,)``, or ``(len(rows),)``; `columns` does not concern it.
            rows: Indices of the outputs to write, each once, or a mask ``(out,)``; all of them when None.
            columns: Indices of the inputs to write, each once, or a mask ``(in,)``; all of them when None.

        Raises:
            ValueError: A shape or an index does not fit, there is no bias to write, or the weights are in a file.
        """
        if self.stored is not None:
            raise ValueError(f"{self} is read from a file; load the model to write to it")
        row_index = _as_index(rows, self.out_features, f"rows of {self}")
        column_index = _as_index(columns, self.in_features, f"columns of {self}")
        out_count = self.out_features if row_index is None else len(row_index)
        in_count = self.in_features if column_index is None else len(column_index)
        # Everything is checked before anything is written: a failed call must leave the model as it was.
        if weight is not None and tuple(weight.shape) != (out_count, in_count):
            raise ValueError(f"weight of {self} has shape {tuple(weight.shape)}, expected {(out_count, in_count)}")
        if bias is not None and not self.has_bias:
            raise ValueError(f"{self} has no bias to write")
        if bias is not None and tuple(bias.shape) != (out_count,):
            raise ValueError(f"bias of {self} has shape {tuple(bias.shape)}, expected {(out_count,)}")
        if self.rounded_to is not None:
            weight = None if weight is None else weight.to(self.rounded_to)
            bias = None if bias is None else bias.to(self.rounded_to)
        if weight is not None:
            _write(self.rows, self._stored_weight(), weight, row_index, column_index)
        if bias is not None:
            # As one column, so that both go the same way.
            _write(self.rows, self._stored_bias().unsqueeze(1), bias.unsqueeze(1), row_index, None)

    def __str__(self) -> str:
        return f"{self.name} of layer {self.layer} ({self.module_name})"


def _as_index(index: Tensor | None, size: int, what: str) -> Tensor | None:
    if index is None:
        return None
    index = torch.as_tensor(index)
    if index.dtype == torch.bool:
        if tuple(index.shape) != (size,):
            raise ValueError(f"{what}: the mask has shape {tuple(index.shape)}, expected {(size,)}")
        return index.nonzero().flatten()
    if index.dim() != 1 or index.is_floating_point():
        raise ValueError(f"{what}: expected a list of indices, got shape {tuple(index.shape)} of {index.dtype}")
    if len(index) and not 0 <= int(index.min()) <= int(index.max()) < size:
        raise ValueError(f"{what}: indices {int(index.min())}..{int(index.max())} are not all in 0..{size - 1}")
    if len(index.unique()) != len(index):
        raise ValueError(f"{what}: an index is given twice, so what it shall become is not defined")
    return index.long()


def _write(rows: Rows, stored: Tensor, value: Tensor, row_index: Tensor | None, column_index: Tensor | None) -> None:
    """Write `value` ``(out, in)`` through the view `rows` of `stored` ``(module outputs, in)``."""
    target = rows.grouped(stored, 0)  # (groups, width, in): a view, so writing to it writes to the module
    value = value.to(device=stored.device, dtype=stored.dtype)
    column_index = None if column_index is None else column_index.to(stored.device)
    if row_index is None:
        value = value.unflatten(0, (rows.groups, rows.width))
        if column_index is None:
            target.copy_(value)
        else:
            target[:, :, column_index] = value
        return
    row_index = row_index.to(stored.device)
    group, inside = row_index // rows.width, row_index % rows.width
    if column_index is None:
        target[group, inside] = value
    else:
        target[group[:, None], inside[:, None], column_index[None, :]] = value


@dataclass(frozen=True, eq=False)
class Tap:
    """Where one feature of one layer is caught: register ``module.register_forward_hook`` and call `read` in it.

    The hook itself must return None: a hook that returns a tensor replaces the layer's output.

    Attributes:
        key: The feature's name, see `feature_key`.
        layer: Index of the block, from 0.
        module: The module to hook; several taps may share one (a fused module has one per projection).
        side: ``pre`` or ``post``.
        features: Width of the feature.
        rows: For ``post``: which outputs of the module are the feature.
    """

    key: str
    layer: int
    module: nn.Module
    side: str
    features: int
    rows: Rows

    def read(self, inputs: tuple[Any, ...], output: Tensor, batch: int | None = None) -> Tensor:
        """The feature, from the arguments of a forward hook.

        Args:
            inputs: The module's positional arguments.
            output: What the module returned.
            batch: Number of sequences in the batch. Only needed where a model flattens its tokens before the
                module runs (OPT does before its MLP).

        Returns:
            ``(batch, seq, features)``, in the projection's row order; may share memory with the model's own
            tensors, so it is to be read, not written.

        Raises:
            ValueError: The tokens are flattened and `batch` is not given.
        """
        feature = inputs[0] if self.side == "pre" else output
        if feature.dim() == 2:
            if batch is None:
                raise ValueError(
                    f"{self.key} of layer {self.layer} comes flattened {tuple(feature.shape)}: give `batch`"
                )
            feature = feature.unflatten(0, (batch, -1))
        return feature if self.side == "pre" else self.rows.select(feature, -1)
