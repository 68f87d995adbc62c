"""Logits of the positions that are asked for, some at a time, behind a body that runs on the whole batch.

At a vocabulary of 128k or 262k the logits of a batch are larger than all else in it. To cut batches by them leaves the
body with a few texts at a time, and the head is run at positions that nobody asks for.

What a causal LM does between its last hidden states and its logits differs (a soft cap, a scale, a bias, a projection),
so the model's own ``forward`` does it here too, without code per architecture. It runs once on the batch; but what its
body returns is handed on as one text of the first rows that are asked for. For the rows after these it runs again,
and its body, in the place of running, returns them. The body is the outermost module around the blocks that ``forward``
calls.

A ``forward`` whose logits are not those of the rows that its body is made to return gives the whole batch's, and the
rows are taken from these. Of what ``transformers`` has, none is known that does.

A gradient goes the same way back: each stretch's ends at the rows that the body handed on, where they add up, and then
goes through the body once.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from tmerge.errors import UnsupportedModelError
from tmerge.models.device import is_out_of_memory
from tmerge.models.discovery import unwrap

__all__ = ["LOGITS_AT_ONCE", "read_logits", "rows_at_once"]

LOGITS_AT_ONCE = 1 << 25
"""Logits that are in memory at once: rows x vocabulary."""


def rows_at_once(vocabulary: int) -> int:
    """Positions whose logits are made together."""
    return max(1, LOGITS_AT_ONCE // vocabulary)


def read_logits(
    model: nn.Module,
    ids: Tensor,
    mask: Tensor | None,
    texts: Tensor,
    positions: Tensor,
    use: Callable[[slice, Tensor], None],
    *,
    backward: bool = False,
) -> None:
    """Run a batch through a model without a cache, and hand on the logits that are asked for.

    Args:
        model: A causal LM. One that is read by blocks is run by `tmerge.models.blocks.run_passes`, this in its works.
        ids: (B, S) token ids, on the model's device.
        mask: (B, S); None where nothing is padded.
        texts: (R,) which of the batch's texts, on the model's device.
        positions: (R,) which of their positions.
        use: Called with a stretch of the rows and their logits (r, V), in the rows' order, until all have been. What
            it keeps of the logits beyond its return stays in memory.
        backward: Whether `use` calls ``backward`` on what it makes of them. The gradients of the parameters that ask
            for one are there when this returns. Not for a model that is read by blocks.

    Raises:
        UnsupportedModelError: A model that is read by blocks does not make its logits row by row.
    """
    at_once = rows_at_once(unwrap(model).get_output_embeddings().weight.shape[0])
    stretches = [slice(start, start + at_once) for start in range(0, len(texts), at_once)]
    named = {"input_ids": ids, "attention_mask": mask, "use_cache": False}
    if not stretches:
        # A model that is read by blocks waits for every batch at each of them.
        texts, positions = (torch.zeros(1, dtype=torch.int64, device=ids.device) for _ in range(2))
    modules = _around_blocks(unwrap(model))
    body = _Body(ids, texts, positions, slice(0, at_once), backward)
    logits = _first_logits(model, modules, body, named)
    if not body.is_handed_on:
        # A gradient has the size of them all, and each stretch's would.
        for stretch in [slice(0, len(texts))] if backward else stretches:
            use(stretch, logits[texts[stretch], positions[stretch]])
        return
    for stretch in stretches[:1]:
        use(stretch, logits[0])
    del logits
    for stretch in stretches[1:]:
        body.stretch = stretch
        with _in_place(modules, body):
            # The method itself: hooks of the model have seen the batch.
            handed = model.forward(**named).logits[0]
        use(stretch, handed)
        del handed
    body.backward()


def _first_logits(model: nn.Module, modules: Sequence[nn.Module], body: _Body, named: dict[str, Any]) -> Tensor:
    """(1, r, V) of the first rows, or (B, S, V) of a model whose body is not handed on."""
    logits = None
    try:
        with _in_place(modules, body):
            logits = model(**named).logits
    except (IndexError, RuntimeError, ValueError) as error:
        # What fails behind the body may do so for the shape that it has been given.
        if not body.is_handed_on or is_out_of_memory(error):
            raise
    if logits is not None and (not body.is_handed_on or body.is_read_once_as(logits)):
        return logits
    if any(parameter.device.type == "meta" for parameter in model.parameters()):
        # Its blocks' weights have come and gone.
        raise UnsupportedModelError(
            f"{type(model).__name__} does not make its logits of its last hidden states one "
            "by one, so it cannot be read block by block; set memory: resident"
        )
    body.let_go()
    return model(**named).logits


class _Body:
    """What a model's body gives for one batch, and what is handed on of it.

    Args:
        ids: (B, S) of the batch.
        texts: (R,) as `read_logits`.
        positions: (R,).
        stretch: Of the rows, that is handed on next.
        is_cut: Whether a gradient waits at the rows until all have been handed on.
    """

    def __init__(self, ids: Tensor, texts: Tensor, positions: Tensor, stretch: slice, is_cut: bool) -> None:
        self._shape, self._texts, self._positions = ids.shape, texts, positions
        self._is_cut = is_cut
        self._whole: Tensor | None = None
        self.stretch = stretch
        self._rows: Tensor | None = None
        self._output: Any = None
        self._is_running = False
        self._calls = 0

    @property
    def is_handed_on(self) -> bool:
        """Whether the body has been called, and gave hidden states (B, S, n)."""
        return self._rows is not None

    def is_read_once_as(self, logits: Tensor) -> bool:
        """Whether logits have the shape of those of the first rows, and the body was called for nothing else."""
        return self._calls == 1 and logits.shape[:2] == (1, len(self._texts[self.stretch]))

    def let_go(self) -> None:
        """Of what was kept: the model is run as it is."""
        self._rows = self._output = self._whole = None

    def backward(self) -> None:
        """Let the gradient that waits go on."""
        if self._whole is not None and self._rows is not None and self._rows.grad is not None:
            self._whole.backward(self._rows.grad)

    def give(self, run: Callable[[], Any]) -> Any:
        """In the place of what the body's forward returns, which `run` calls."""
        if self._is_running:
            # A module inside the body, which is around the blocks as well.
            return run()
        self._calls += 1
        if self._rows is None:
            self._is_running = True
            try:
                output = run()
            finally:
                self._is_running = False
            hidden = output if isinstance(output, Tensor) else output[0]
            if not isinstance(hidden, Tensor) or hidden.dim() != 3 or hidden.shape[:2] != self._shape:
                return output
            self._rows = hidden[self._texts, self._positions]
            if self._is_cut and self._rows.requires_grad:
                self._whole, self._rows = self._rows, self._rows.detach().requires_grad_()
            # The hidden states themselves are let go.
            self._output = _with_hidden(output, self._rows)
        return _with_hidden(self._output, self._rows[self.stretch].unsqueeze(0))


def _with_hidden(output: Any, hidden: Tensor) -> Any:
    """A body's output with other hidden states, which come first in it."""
    if isinstance(output, Tensor):
        return hidden
    if isinstance(output, tuple):
        return (hidden, *output[1:])
    output = copy.copy(output)
    output[next(iter(output.keys()))] = hidden
    return output


class _Door:
    """A module's forward while a batch is read: each thread's body is asked, as passes by blocks wait inside of it."""

    def __init__(self, module: nn.Module) -> None:
        # An attribute of the instance hides the class's method; there may be one already, of a library's hooks.
        self._own, self._forward = vars(module).get("forward"), module.forward
        self._users = 0

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        body: _Body | None = getattr(_CURRENT, "body", None)
        run = partial(self._forward, *arguments, **named)
        return run() if body is None else body.give(run)

    @classmethod
    def open(cls, module: nn.Module) -> None:
        """For one more that reads a batch."""
        door = vars(module).get("forward")
        if not isinstance(door, cls):
            door = cls(module)
            module.forward = door  # type: ignore[method-assign]
        door._users += 1

    @staticmethod
    def close(module: nn.Module) -> None:
        """For one of them; the last takes the door away."""
        door = vars(module)["forward"]
        door._users -= 1
        if door._users:
            return
        del module.forward
        if door._own is not None:
            module.forward = door._own  # type: ignore[method-assign]


def _around_blocks(model: nn.Module) -> list[nn.Module]:
    """The modules around the longest list of modules, the outermost first, without the model itself.

    Any causal LM's logits may be asked for, so it is not looked for what `describe` needs to know of blocks.
    """
    found: list[tuple[int, list[nn.Module]]] = [(0, [])]

    def look(module: nn.Module, around: list[nn.Module]) -> None:
        for child in module.children():
            if isinstance(child, nn.ModuleList):
                found.append((len(child), around))
            else:
                look(child, [*around, child])

    look(model, [])
    return max(found, key=lambda pair: pair[0])[1]


_CURRENT, _DOORS = threading.local(), threading.Lock()


@contextmanager
def _in_place(modules: Sequence[nn.Module], body: _Body) -> Iterator[None]:
    """Within it, the first of `modules` that this thread calls gives what `body` does."""
    with _DOORS:
        for module in modules:
            _Door.open(module)
    _CURRENT.body = body
    try:
        yield
    finally:
        _CURRENT.body = None
        with _DOORS:
            for module in modules:
                _Door.close(module)
