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

from tmerge.fusion import TransportedNeurons, places_of
from tmerge.models import STREAM, find_block_list, group_of

__all__ = ["MOST_KEPT_BYTES", "unchanged_layers", "without_unchanged_layers"]

MOST_KEPT_BYTES = 1 << 28
"""Of hidden states; batches beyond them are computed every time."""


def unchanged_layers(transported: Sequence[TransportedNeurons]) -> int:
    """How many layers, from the first on, stay as they are whatever the alphas are.

    Args:
        transported: Everything that may be fused. Embeddings and norms (a task vector's) leave no layer as it is.
    """
    places = places_of(transported)
    if not places or any(group_of(projection) == STREAM for _, projection in places):
        return 0
    return min(layer for layer, _ in places)


@contextmanager
def without_unchanged_layers(model: PreTrainedModel, layers: int) -> Iterator[None]:
    """Within it, a forward pass over a batch that was seen before begins behind the first `layers` layers.

    Same numbers, to the bit. Layers that hand each other more than their outputs (keys and values that a later layer
    shares), or that run more than once in a forward pass, are run every time.

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
    # An attribute of the instance hides the class's method; there may be one already, of a library's hooks.
    own_forwards = [vars(block).get("forward") for block in blocks]
    for block in blocks:
        block.forward = kept.around(block.forward, last=block is blocks[-1])  # type: ignore[method-assign]
    try:
        yield
    finally:
        entering.remove()
        for block, forward in zip(blocks, own_forwards, strict=True):
            del block.forward
            if forward is not None:
                block.forward = forward  # type: ignore[method-assign]


class _Kept:
    """The hidden states of the batches seen so far, and which batch the model is at."""

    def __init__(self) -> None:
        self.outputs: dict[tuple[Any, ...], Any] = {}
        self.batch: tuple[Any, ...] = ()
        self.bytes = 0
        self.called: set[int] = set()
        self.given_back = self.looped = False

    def enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        ids, mask = kwargs["input_ids"], kwargs.get("attention_mask")
        self.batch = (tuple(ids.shape), _bytes(ids), None if mask is None else _bytes(mask))
        self.called.clear()
        self.given_back = self.batch in self.outputs

    def around(self, forward: Callable[..., Any], *, last: bool) -> Callable[..., Any]:
        def shared(*args: Any, **kwargs: Any) -> Any:
            if self.given_back:
                # The layers before the last of them pass it on as well: only the last one's output is read.
                return _copied(self.outputs[self.batch])
            if id(shared) in self.called:
                # What it gives the second time depends on layers behind it.
                self.looped = True
                self.outputs.clear()
            self.called.add(id(shared))
            output = forward(*args, **kwargs)
            size = _size(output)
            if (
                last
                and not self.looped
                and size
                and self.bytes + size <= MOST_KEPT_BYTES
                and _is_plain((args, *kwargs.values()))
            ):
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
    return tuple(map(_copied, output)) if isinstance(output, tuple) else output if output is None else output.clone()


def _size(output: Any) -> int:
    """Bytes of a tensor or of a tuple of tensors; 0 of anything else, which is not kept."""
    parts = output if isinstance(output, tuple) else (output,)
    if not all(part is None or isinstance(part, Tensor) for part in parts):
        return 0
    return sum(part.nbytes for part in parts if part is not None)
