"""How large a batch may be, as far as one that did not fit has told, and batches that are run within it.

What does not fit is run by halves, and what follows in batches no larger than these. Of a model that is read by blocks,
all of whose batches are under way together, all are begun anew; the longest come first, so this is soon known.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

from tmerge.models import LoadedModel, give_back_memory
from tmerge.models.blocks import PassDoesNotFitError, run_passes
from tmerge.models.device import is_out_of_memory

__all__ = ["Note", "Room", "padded_tokens", "run_batches"]

Result = TypeVar("Result")
Note = Callable[[str], None]
"""Told what a reader should know."""


@dataclass
class Room:
    """Remembered for as long as about as much memory is free, so that the next batch is not tried in vain.

    Attributes:
        tokens: Of a batch at most, padding included; None while all have fitted.
    """

    tokens: int | None = None

    def has(self, batch: Sequence[int], lengths: Sequence[int]) -> bool:
        """Whether a batch is worth trying; a single text always is.

        Args:
            batch: Its texts.
            lengths: Tokens of each text that there is.
        """
        return len(batch) == 1 or self.tokens is None or padded_tokens(batch, lengths) <= self.tokens

    def lacked(self, batch: Sequence[int], lengths: Sequence[int], loaded: LoadedModel, note: Note | None) -> None:
        """There was none for a batch, whose error is gone: give back what it left, and say so, the first time.

        Args:
            batch: Its texts, at least two; the larger half is tried next.
            lengths: As `has`.
            loaded: Which did not find it.
            note: What a reader should know.
        """
        give_back_memory()
        if note is not None and self.tokens is None:
            note(f"{loaded.device} has no room for a batch of {len(batch)} texts: read by halves")
        half = max(padded_tokens(part, lengths) for part in _halves(batch))
        self.tokens = half if self.tokens is None else min(self.tokens, half)

    def cut(self, batches: Sequence[list[int]], lengths: Sequence[int]) -> list[list[int]]:
        """The batches, in halves of halves where there is no room for more."""
        waiting, fitting = deque(batches), []
        while waiting:
            batch = waiting.popleft()
            if self.has(batch, lengths):
                fitting.append(batch)
            else:
                waiting.extendleft(reversed(_halves(batch)))
        return fitting

    def fitting(
        self,
        batches: Sequence[list[int]],
        lengths: Sequence[int],
        run: Callable[[list[int]], Result],
        loaded: LoadedModel,
        note: Note | None,
    ) -> Iterator[tuple[list[int], Result]]:
        """Run a batch after the other; one that does not fit by its halves.

        Args:
            batches: Texts of each.
            lengths: As `has`.
            run: Runs a batch; of one that broke off nothing may remain but what the next run takes the place of.
            loaded: What it runs.
            note: Told that a batch did not fit.

        Yields:
            A batch that has been run, and what that gave.

        Raises:
            MemoryError, RuntimeError: A single text did not fit (`is_out_of_memory`).
        """
        waiting = deque(batches)
        while waiting:
            batch = waiting.popleft()
            if self.has(batch, lengths):
                try:
                    result = run(batch)
                except (MemoryError, RuntimeError) as error:
                    if len(batch) == 1 or not is_out_of_memory(error):
                        raise
                else:
                    yield batch, result
                    continue
                # Here the error no longer keeps the batch's tensors alive.
                self.lacked(batch, lengths, loaded, note)
            waiting.extendleft(reversed(_halves(batch)))


def run_batches(
    loaded: LoadedModel,
    batches: Sequence[list[int]],
    lengths: Sequence[int],
    run: Callable[[list[int]], None],
    room: Room,
    *,
    note: Note | None = None,
    after: Callable[[list[int]], None] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Run a model over batches: one after the other, or, where it is read by blocks, all of them block by block.

    Args:
        loaded: The model.
        batches: Texts of each.
        lengths: Tokens of each text that there is.
        run: Makes one pass over a batch, without gradient, and keeps what it gives by its texts: of a model that is
            read by blocks, a text may be run again.
        room: What is known of it from before, and is remembered of it for afterwards.
        note: Told that a batch did not fit.
        after: Called with each batch that has been run by itself.
        progress: Called with (blocks done, all) of a model that is read by blocks.

    Raises:
        MemoryError, RuntimeError: A single text did not fit, or a block's weights (`is_out_of_memory`).
    """
    if loaded.block_weights is None:
        for batch, _ in room.fitting(batches, lengths, run, loaded, note):
            if after is not None:
                after(batch)
        return
    while True:
        cut = room.cut(batches, lengths)
        works = [partial(run, batch) for batch in cut]
        try:
            return run_passes(loaded, works, [padded_tokens(batch, lengths) for batch in cut], progress=progress)
        except PassDoesNotFitError as error:
            batch = cut[error.number]
            if len(batch) == 1:
                raise
        room.lacked(batch, lengths, loaded, note)


def padded_tokens(batch: Sequence[int], lengths: Sequence[int]) -> int:
    """Of a batch, padding included; arguments as `Room.has`."""
    return len(batch) * max(lengths[text] for text in batch)


def _halves(batch: Sequence[int]) -> tuple[list[int], list[int]]:
    """Of a batch of at least two."""
    return list(batch[: len(batch) // 2]), list(batch[len(batch) // 2 :])
