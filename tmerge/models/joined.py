"""A base and an adapter joined as the base is read: in memory, part by part, or tensor by tensor from the files."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from tmerge.models.adapter_changes import AdapterChanges
from tmerge.models.block_weights import StoredParts

if TYPE_CHECKING:
    from tmerge.models.weights import MappedWeights

__all__ = ["AdapterWeights", "JoinedWeights", "NoWeights", "join_model", "join_parts"]


def join_model(model: PreTrainedModel, changes: AdapterChanges) -> None:
    """Put W' in the place of W in a loaded base, one parameter at a time; what is tied stays so."""
    for name in changes.parameters:
        parameter = model.get_parameter(name)
        # In memory of its own, as when it is read by blocks: kernels may round by where a matrix begins.
        parameter.data = changes.joined(name, parameter)


def join_parts(parts: StoredParts, changes: AdapterChanges) -> StoredParts:
    """Parts of a base that are joined whenever they are read."""

    def load(model: PreTrainedModel, tensors: Mapping[str, Any]) -> None:
        away = [name for name in changes.parameters if model.get_parameter(name).device.type == "meta"]
        parts.load(model, tensors)
        for name in away:
            read = model.get_parameter(name)
            if read.device.type != "meta":
                read.data = changes.joined(name, read)

    return replace(parts, load=load)


class JoinedWeights(Mapping[str, Tensor]):
    """A base's weights by name, each joined when it is asked for.

    Args:
        base: Its weights.
        changes: What the adapter makes of them.
    """

    def __init__(self, base: MappedWeights, changes: AdapterChanges) -> None:
        self._base, self._changes = base, changes

    def __getitem__(self, name: str) -> Tensor:
        return self._changes.joined(name, self._base[name])

    def rows(self, name: str, index: Tensor) -> Tensor:
        """As `MappedWeights.rows`, but of what the adapter changes, which is joined whole."""
        return self[name][index] if name in self._changes else self._base.rows(name, index)

    def __iter__(self) -> Iterator[str]:
        return iter(self._base)

    def __len__(self) -> int:
        return len(self._base)

    def __contains__(self, name: object) -> bool:
        return name in self._base  # Mapping's own would read it


class AdapterWeights(Mapping[str, Tensor]):
    """What an adapter adds to each of its base's weights, W' - W in float32, made when it is asked for.

    The difference itself, and not that of two weights that were rounded: what is smaller than a bfloat16 weight's last
    digit is not lost.

    Args:
        base: The base's modules, on the meta device.
        weights: The base's weights; read only of those of `AdapterChanges.reads_base`.
        changes: The adapter's.
    """

    def __init__(self, base: PreTrainedModel, weights: Mapping[str, Tensor], changes: AdapterChanges) -> None:
        self._shapes = {name: each.shape for name, each in base.named_parameters(remove_duplicate=False)}
        self._weights, self._changes = weights, changes

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._changes:
            return torch.zeros(()).expand(self._shapes[name])
        return self._changes.change(name, lambda: self._weights[name])

    def rows(self, name: str, index: Tensor) -> Tensor:
        """As `MappedWeights.rows`; what is unchanged takes no memory."""
        return self[name][index] if name in self._changes else _nothing(self._shapes[name], index)

    def __iter__(self) -> Iterator[str]:
        return iter(self._shapes)

    def __len__(self) -> int:
        return len(self._shapes)

    def __contains__(self, name: object) -> bool:
        return name in self._shapes


class NoWeights(Mapping[str, Tensor]):
    """Zeros of a model's shapes, which take no memory: what differences are differences to."""

    def __init__(self, base: PreTrainedModel) -> None:
        self._shapes = {name: each.shape for name, each in base.named_parameters(remove_duplicate=False)}

    def __getitem__(self, name: str) -> Tensor:
        return torch.zeros(()).expand(self._shapes[name])

    def rows(self, name: str, index: Tensor) -> Tensor:
        """As `MappedWeights.rows`."""
        return _nothing(self._shapes[name], index)

    def __iter__(self) -> Iterator[str]:
        return iter(self._shapes)

    def __len__(self) -> int:
        return len(self._shapes)


def _nothing(shape: torch.Size, index: Tensor) -> Tensor:
    """(len(index), ...) zeros, one of which is in memory."""
    return torch.zeros(()).expand(len(index), *shape[1:])
