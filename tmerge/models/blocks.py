"""A model's forward passes over many batches, block by block: all of them wait before a block while it is worked on.

Every batch runs the model's own ``forward`` in a thread of its own, and at each block's door hands over what it was
about to give it. So there is no code per architecture: masks, positions and whatever else travels between the blocks is
what the model's own loop makes, and between two blocks nothing of a batch is in memory but what that loop keeps. One
thread runs at a time; the others wait. So a model need not be in memory either: where it is read by blocks
(`tmerge.models.block_weights`), each block's weights are read once for all batches.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from tmerge.errors import UnsupportedModelError
from tmerge.models.device import out_of_memory_as
from tmerge.models.discovery import find_block_list, unwrap
from tmerge.models.loading import LoadedModel

__all__ = [
    "STREAM_BYTES",
    "BlockCall",
    "PassDoesNotFitError",
    "Steps",
    "base_pass",
    "hidden_of",
    "in_groups",
    "run_passes",
    "stepped",
]

# Passes that wait together, at most: each is a thread, and has threads of its own where it computes.
_PASSES = 64
STREAM_BYTES = 1 << 30
"""Of streams that are in memory together where a model is read by blocks; each further group reads it once more."""

Batch = tuple[Tensor, Tensor | None]
"""Token ids (B, S), and their mask or None where nothing is padded."""


class PassDoesNotFitError(MemoryError):
    """There was no room for one of several passes.

    Attributes:
        number: Which.
    """

    def __init__(self, number: int) -> None:
        super().__init__(f"out of memory in pass {number}")
        self.number = number


class _Left(BaseException):
    """Ends the threads of passes that are not run to their end."""


@dataclass
class BlockCall:
    """One batch at one block's door.

    Attributes:
        block: The module.
        arguments: What the model was about to call it with.
        named: Likewise, by name.
    """

    block: nn.Module
    arguments: tuple[Any, ...]
    named: dict[str, Any]
    _forward: Callable[..., Any]

    @property
    def hidden(self) -> Tensor:
        """(B, S, n) the residual stream as it enters the block."""
        stream = self.arguments[0] if self.arguments else self.named["hidden_states"]
        assert isinstance(stream, Tensor)
        return stream

    def run(self) -> Any:
        """What the block makes of it, with its weights as they are now."""
        return self._forward(*self.arguments, **self.named)


def hidden_of(result: Any) -> Tensor:
    """(B, S, n) the residual stream as it leaves a block, from what the block returned."""
    stream = result if isinstance(result, Tensor) else result[0]
    assert isinstance(stream, Tensor)
    return stream


@dataclass
class _Pass:
    """One batch's forward pass: `turn` is released for it to go on, `waits` when it has come to a door or its end."""

    turn: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))
    waits: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))
    block: int = -1
    call: BlockCall | None = None
    result: Any = None
    error: BaseException | None = None
    ended: bool = False
    left: bool = False

    def raise_error(self) -> None:
        """What it broke off with, if it did."""
        if self.error is not None:
            raise self.error


class Steps:
    """The passes, at the same block's door each; from `stepped`."""

    def __init__(self, blocks: Sequence[nn.Module], passes: Sequence[_Pass], loaded: LoadedModel) -> None:
        self._blocks, self._passes, self._name = blocks, passes, str(loaded.reference)
        self._weights = loaded.block_weights

    def __len__(self) -> int:
        return len(self._blocks)

    def calls(self, block: int) -> list[BlockCall]:
        """What each batch gives to a block, in the batches' order; blocks are asked for in order, each once.

        Of a model that is read by blocks, this one's weights are in memory from here on, and those of the one before
        no longer.

        Raises:
            UnsupportedModelError: The model does not run its blocks one after the other, each once.
        """
        if self._weights is not None:
            if block:
                self._weights.leave_block(block - 1)
            self._weights.enter_block(block)
        calls = []
        for waiting in self._passes:
            waiting.raise_error()
            if waiting.call is None or waiting.block != block:
                remedy = "choose another model" if self._weights is None else "set memory: resident"
                raise UnsupportedModelError(
                    f"{self._name} does not run its blocks in order, each once, so it cannot be read block by block; "
                    f"{remedy}"
                )
            calls.append(waiting.call)
        return calls

    def go_through(self, batch: int, call: BlockCall) -> None:
        """Run what a batch gave to the block as it is, and `go_on` with what that makes.

        Raises:
            PassDoesNotFitError: There was no room for it.
        """
        with out_of_memory_as(lambda: PassDoesNotFitError(batch)):
            result = call.run()
        # What it was given goes with it, as it has been through.
        del call
        self.go_on(batch, result)

    def go_on(self, batch: int, result: Any) -> None:
        """Give a batch's pass what the block made, and let it come to the next door, or to its end.

        Raises:
            PassDoesNotFitError: There was no room for what lies between.
        """
        waiting = self._passes[batch]
        waiting.call, waiting.result = None, result
        waiting.turn.release()
        waiting.waits.acquire()
        waiting.result = None
        with out_of_memory_as(lambda: PassDoesNotFitError(batch)):
            waiting.raise_error()


def base_pass(loaded: LoadedModel, batch: Batch) -> Callable[[], Any]:
    """A pass of the base model, without head and cache, over a batch that is on any device."""

    def run() -> Any:
        ids, mask = batch
        mask = None if mask is None else mask.to(loaded.device)
        return loaded.base(input_ids=ids.to(loaded.device), attention_mask=mask, use_cache=False)

    return run


@contextmanager
def stepped(loaded: LoadedModel, works: Sequence[Callable[[], Any]]) -> Iterator[Steps]:
    """Bring a model's forward passes to the door of its first block.

    Args:
        loaded: The model, in memory or read by blocks.
        works: Each makes one pass of it (`base_pass`), without gradient.

    Yields:
        The passes. Those that have not come to their end when the ``with`` is left are let go.
    """
    name, blocks = find_block_list(unwrap(loaded.model))
    listed = list(blocks)
    passes = [_Pass() for _ in works]
    current = threading.local()
    originals = [block.forward for block in listed]
    had_own = ["forward" in vars(block) for block in listed]

    def door(block: int) -> Callable[..., Any]:
        def wait(*arguments: Any, **named: Any) -> Any:
            waiting: _Pass = current.waiting
            waiting.block = block
            waiting.call = BlockCall(listed[block], arguments, named, originals[block])
            # What the pass itself holds of it goes: between two doors the call is all there is.
            del arguments, named
            waiting.waits.release()
            waiting.turn.acquire()
            if waiting.left:
                raise _Left
            result, waiting.result = waiting.result, None
            return result

        return wait

    def passing(waiting: _Pass, work: Callable[[], Any]) -> None:
        current.waiting = waiting
        waiting.turn.acquire()
        try:
            if waiting.left:
                return
            with torch.no_grad():
                work()
        except _Left:
            pass
        except BaseException as error:  # noqa: BLE001 - raised again by who waits for the pass
            waiting.error = error
        finally:
            waiting.ended = True
            waiting.waits.release()

    threads = [
        threading.Thread(target=passing, args=pair, daemon=True, name="tmerge-pass")
        for pair in zip(passes, works, strict=True)
    ]
    was_training = loaded.base.training
    loaded.base.eval()
    for number, module in enumerate(listed):
        module.forward = door(number)
    begun: list[threading.Thread] = []
    try:
        if loaded.block_weights is not None:
            loaded.block_weights.enter_embeddings()
        for thread in threads:
            thread.start()
            begun.append(thread)
        for number, waiting in enumerate(passes):
            waiting.turn.release()
            waiting.waits.acquire()
            with out_of_memory_as(partial(PassDoesNotFitError, number)):
                waiting.raise_error()
        if loaded.block_weights is not None:
            loaded.block_weights.leave_ends()
        yield Steps(listed, passes, loaded)
    finally:
        for waiting in passes:
            waiting.left, waiting.call, waiting.result = True, None, None
            waiting.turn.release()
        for thread in begun:
            thread.join()
        for block, original, own in zip(listed, originals, had_own, strict=True):
            if own:
                block.forward = original
            else:
                del block.forward
        loaded.base.train(was_training)
        if loaded.block_weights is not None:
            loaded.block_weights.close()


def run_passes(
    loaded: LoadedModel,
    works: Sequence[Callable[[], None]],
    tokens: Sequence[int],
    *,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Run passes to their end: one after the other, or, where a model is read by blocks, all of them block by block.

    Args:
        loaded: The model.
        works: As for `stepped`; each does with what its pass gives whatever is to be done.
        tokens: Of each pass, padding included.
        progress: Called with (blocks done, all) of a model that is read by blocks.

    Raises:
        PassDoesNotFitError: Of a model that is read by blocks, there was no room for a pass.
    """
    if loaded.block_weights is None:
        for work in works:
            work()
        return
    groups = in_groups(loaded, tokens)
    for number, group in enumerate(groups):
        try:
            with stepped(loaded, works[group]) as steps, torch.no_grad():
                for block in range(len(steps)):
                    calls = steps.calls(block)
                    for batch in range(len(calls)):
                        steps.go_through(batch, calls.pop(0))
                    if progress is not None:
                        progress(number * len(steps) + block + 1, len(groups) * len(steps))
        except PassDoesNotFitError as error:
            raise PassDoesNotFitError(group.start + error.number) from None


def in_groups(loaded: LoadedModel, tokens: Sequence[int]) -> list[slice]:
    """Passes whose streams are in memory together, when all of them wait at a block's door.

    Args:
        loaded: The model.
        tokens: Of each pass, padding included.

    Returns:
        Stretches of the passes, in their order.
    """
    # The stream as it entered the first block, which models keep, and as it stands.
    token_bytes = 2 * 4 * loaded.model.config.get_text_config().hidden_size
    groups, start, held = [], 0, 0
    for number, count in enumerate(tokens):
        full = number - start == _PASSES or held + count * token_bytes > STREAM_BYTES
        if number > start and full:
            groups.append(slice(start, number))
            start, held = number, 0
        held += count * token_bytes
    return [*groups, slice(start, len(tokens))] if tokens else []
