"""Layers that no candidate changes are computed once a batch, and not again for every candidate.

Below the first layer that is fused, the target, the merge at every alpha and every control compute the same. What
leaves the last of these layers is kept for each batch and given back when the batch comes again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from tmerge.fusion import TransportedNeurons
from tmerge.models import STREAM, find_block_list, group_of

__all__ = ["unchanged_layers", "without_unchanged_layers"]

# Bytes of hidden states that are kept; batches beyond them are computed as ever.
_MOST = 1 << 28


def unchanged_layers(transported: Sequence[TransportedNeurons]) -> int:
    """How many layers, from the first on, stay as they are whatever the alphas are.

    Args:
        transported: Everything that may be fused. Embeddings and norms (a task vector's) leave no layer as it is.
    """
    if not transported or any(group_of(item.projection) == STREAM for item in transported):
        return 0
    return min(item.layer for item in transported)


@contextmanager
def without_unchanged_layers(model: PreTrainedModel, layers: int) -> Iterator[None]:
    """Within it, a forward pass over a batch that was seen before begins behind the first `layers` layers.

    Same numbers, to the bit. Layers that hand each other more than their outputs (keys and values that a later layer
    shares) are run every time.

    Args:
        model: A causal LM, called with ``input_ids`` and ``attention_mask`` by name, without gradients.
        layers: From `unchanged_layers`.
    """
    if layers == 0:
        yield
        return
    blocks = list(find_block_list(model)[1])[:layers]
    kept = _Kept()
    entering = model.register_forward_pre_hook(kept.enter, with_kwargs=True)
    for block in blocks:
        # An instance attribute hides the class's method, and is gone when it is deleted.
        block.forward = kept.around(block.forward, last=block is blocks[-1])  # type: ignore[method-assign]
    try:
        yield
    finally:
        entering.remove()
        for block in blocks:
            del block.forward


class _Kept:
    """The hidden states of the batches seen so far, and which batch the model is at."""

    def __init__(self) -> None:
        self.outputs: dict[tuple[Any, ...], Any] = {}
        self.batch: tuple[Any, ...] = ()
        self.bytes = 0

    def enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        ids, mask = kwargs["input_ids"], kwargs.get("attention_mask")
        self.batch = (tuple(ids.shape), _bytes(ids), None if mask is None else _bytes(mask))

    def around(self, forward: Callable[..., Any], *, last: bool) -> Callable[..., Any]:
        def shared(*args: Any, **kwargs: Any) -> Any:
            if self.batch in self.outputs:
                # The layers before the last of them pass it on as well: only the last one's output is read.
                return _copied(self.outputs[self.batch])
            output = forward(*args, **kwargs)
            size = _size(output)
            if last and self.bytes + size <= _MOST and all(map(_is_plain, (*args, *kwargs.values()))):
                self.outputs[self.batch] = _copied(output)
                self.bytes += size
            return output

        return shared


def _bytes(tensor: Tensor) -> bytes:
    return tensor.cpu().numpy().tobytes()


def _is_plain(value: Any) -> bool:
    """Whether a value cannot be written to by one layer and read by another: no cache, list or dictionary."""
    if isinstance(value, tuple):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, (Tensor, bool, int, float, str, torch.dtype, torch.device))


def _copied(output: Any) -> Any:
    """A copy, which the layer behind may write into."""
    if isinstance(output, tuple):
        return tuple(map(_copied, output))
    return output.clone() if isinstance(output, Tensor) else output


def _size(output: Any) -> int:
    if isinstance(output, tuple):
        return sum(map(_size, output))
    return output.nbytes if isinstance(output, Tensor) else 0
