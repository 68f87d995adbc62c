"""Texts to token ids, token ids to batches of like length, and a batch through the base model."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedConfig

from tmerge.calibration.room import Note, Room
from tmerge.errors import NotEnoughMemoryError
from tmerge.models import LoadedModel, refuse_without_rows
from tmerge.models.blocks import PassDoesNotFitError, base_pass, in_groups, stepped
from tmerge.models.device import out_of_memory_as, wait_for
from tmerge.processes import ALONE, Processes

__all__ = [
    "EncodedTexts",
    "ReadStep",
    "batch_limit",
    "encode",
    "length_batches",
    "padded",
    "read_batches",
    "token_limit",
]

# Texts this much shorter than the longest of a batch (one part in) may join it; the rest would be padding.
_SLACK = 8
# No token is known to stand for more characters, so what lies behind them would be cut anyway.
_CHARACTERS_PER_TOKEN = 128
_TEXTS_AT_ONCE = 512
# Padded tokens of a batch on a processor.
_ON_A_PROCESSOR = 512


@dataclass(frozen=True)
class EncodedTexts:
    """Token ids of all texts, in the texts' order.

    Attributes:
        ids: Per text, with the special tokens that the model's tokenizer adds by itself, and none else.
        truncated: Texts that were cut.
        limit: Where: the recipe's ``max_tokens``, or the model's own longest sequence.
    """

    ids: list[list[int]]
    truncated: int
    limit: int

    @property
    def lengths(self) -> list[int]:
        """Tokens of each text."""
        return [len(ids) for ids in self.ids]

    def padded_tokens(self, texts: Sequence[int]) -> int:
        """Of a batch of these texts."""
        return len(texts) * max(len(self.ids[text]) for text in texts)


@dataclass(frozen=True)
class ReadStep:
    """A batch that went through a model, or through one of its blocks.

    Attributes:
        texts: Of the batch.
        seconds: That it took.
        block: Which block; None where it was the whole model.
        done: Steps so far: texts, or blocks.
        of: Of so many.
    """

    texts: list[int]
    seconds: float
    block: int | None
    done: int
    of: int


def encode(loaded: LoadedModel, texts: Sequence[str], max_tokens: int) -> EncodedTexts:
    """Tokenise all texts for a model.

    Longer texts are cut at the end. They are cut here and not by the tokenizer, which would remember the limit and
    be saved with it.

    Args:
        loaded: The model and its tokenizer.
        texts: T texts.
        max_tokens: Most tokens of a text.

    Raises:
        TokenizerError: A text gives a token that the model has no row for.
    """
    refuse_without_rows(loaded.reference.text, loaded.tokenizer, loaded.embedding_rows, texts)
    limit = token_limit(loaded.model.config, max_tokens)
    characters = limit * _CHARACTERS_PER_TOKEN
    ids: list[list[int]] = []
    truncated = 0
    for start in range(0, len(texts), _TEXTS_AT_ONCE):
        chunk = [text[:characters] for text in texts[start : start + _TEXTS_AT_ONCE]]
        # Not verbose: it would warn of texts longer than the model reads, which are cut in the next line.
        for tokens in loaded.tokenizer(chunk, truncation=False, padding=False, verbose=False)["input_ids"]:
            truncated += len(tokens) > limit
            ids.append(list(tokens[:limit]))
    return EncodedTexts(ids, truncated, limit)


def token_limit(config: PreTrainedConfig, max_tokens: int) -> int:
    """Most tokens of a text: models with learned positions cannot read further than their table."""
    positions = getattr(config, "max_position_embeddings", None)
    return min(max_tokens, positions) if isinstance(positions, int) and positions > 0 else max_tokens


def batch_limit(device: torch.device, batch_tokens: int) -> int:
    """Most padded tokens of a batch: on a processor, where larger ones are no faster, few enough to be shared out.

    Args:
        device: Where it is read.
        batch_tokens: The recipe's.
    """
    return min(batch_tokens, _ON_A_PROCESSOR) if device.type == "cpu" else batch_tokens


def length_batches(lengths: Sequence[int], limit: int) -> list[list[int]]:
    """Batches of texts of like length, shortest first.

    Args:
        lengths: Tokens of each text.
        limit: Most padded tokens of a batch; a longer text goes alone.

    Returns:
        Indices into `lengths`, each once; within a batch the lengths ascend. The same lengths always give the same
        batches.
    """
    batches: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda text: (lengths[text], text)):
        length = lengths[index]
        batch = batches[-1] if batches else None
        if batch and length * (len(batch) + 1) <= limit and length - lengths[batch[0]] <= length // _SLACK:
            batch.append(index)
        else:
            batches.append([index])
    return batches


def read_batches(
    loaded: LoadedModel,
    encoded: EncodedTexts,
    batch_tokens: int,
    before: Callable[[list[int]], None] | None = None,
    anew: Callable[[], None] | None = None,
    note: Note | None = None,
    processes: Processes = ALONE,
    room: Room | None = None,
) -> Iterator[ReadStep]:
    """Run the base model, without its head and without a cache, over all texts that have tokens.

    The longest come first, so that what does not fit in memory shows at once. A model that is read by blocks takes all
    batches through one block before the next; of very many texts, some of them through all blocks before the others.

    Args:
        loaded: The model.
        encoded: Its token ids.
        batch_tokens: Most padded tokens of a forward pass.
        before: Called with the texts of a batch just before its forward pass, or its pass through a block.
        anew: Called where a batch did not fit in a model that is read by blocks: all that was yielded is read again, in
            smaller batches.
        note: Told that a batch did not fit and is read by halves.
        processes: Among whom the batches are shared out; each reads its own.
        room: What is known of it from before, and is remembered of it for afterwards.

    Yields:
        What was just read.

    Raises:
        NotEnoughMemoryError: A text did not fit, or, of a model that is read by blocks, a block's weights.
    """
    filled = [text for text, ids in enumerate(encoded.ids) if ids]
    base, was_training = loaded.base, loaded.base.training
    base.eval()
    limit = batch_limit(loaded.device, batch_tokens)
    batches = [
        [filled[index] for index in batch]
        for batch in reversed(length_batches([len(encoded.ids[text]) for text in filled], limit))
    ]
    mine = processes.mine(batches, [encoded.padded_tokens(batch) for batch in batches])
    reading = _Reading(
        loaded, encoded, mine, before or (lambda texts: None), anew or (lambda: None), note, room or Room()
    )
    try:
        with out_of_memory_as(
            lambda: NotEnoughMemoryError(
                f"{loaded.reference}: out of memory on {loaded.device}; lower calibration.batch_tokens (now "
                f"{batch_tokens}) or use --device cpu"
            )
        ):
            yield from reading.whole() if loaded.block_weights is None else reading.by_blocks()
    finally:
        base.train(was_training)


@dataclass(frozen=True)
class _Reading:
    """What `read_batches` was asked for, the texts in batches."""

    loaded: LoadedModel
    encoded: EncodedTexts
    batches: list[list[int]]
    before: Callable[[list[int]], None]
    anew: Callable[[], None]
    note: Note | None
    room: Room

    def whole(self) -> Iterator[ReadStep]:
        """A batch after the other; one that does not fit in two halves, and those after it no larger than these."""
        done, of = 0, sum(map(len, self.batches))

        def run(texts: list[int]) -> float:
            run = self._pass(texts)
            began = self._begin(texts)
            with self._running():
                run()
            return time.perf_counter() - began

        for texts, seconds in self.room.fitting(self.batches, self.encoded.lengths, run, self.loaded, self.note):
            done += len(texts)
            yield ReadStep(texts, seconds, None, done, of)

    def by_blocks(self) -> Iterator[ReadStep]:
        """All batches block by block; where one does not fit, its halves and all others anew."""
        lengths = self.encoded.lengths
        while True:
            batches = self.room.cut(self.batches, lengths)
            try:
                yield from self._through_blocks(batches)
                return
            except PassDoesNotFitError as error:
                lacking = batches[error.number]
                if len(lacking) == 1:
                    raise
            self.room.lacked(lacking, lengths, self.loaded, self.note)
            self.anew()

    def _through_blocks(self, batches: list[list[int]]) -> Iterator[ReadStep]:
        """All batches of a group through a block, then through the next."""
        groups = in_groups(self.loaded, [self.encoded.padded_tokens(texts) for texts in batches])
        for number, group in enumerate(groups):
            try:
                yield from self._group(batches[group], number, len(groups))
            except PassDoesNotFitError as error:
                raise PassDoesNotFitError(group.start + error.number) from None

    def _group(self, batches: list[list[int]], number: int, groups: int) -> Iterator[ReadStep]:
        with stepped(self.loaded, [self._pass(texts) for texts in batches]) as steps:
            for block in range(len(steps)):
                before_weights = time.perf_counter()
                calls = steps.calls(block)
                reading_weights = time.perf_counter() - before_weights
                for batch, texts in enumerate(batches):
                    began = self._begin(texts)
                    with self._running():
                        steps.go_through(batch, calls.pop(0))
                    # Reading the block's weights is part of the first batch's time.
                    seconds = time.perf_counter() - began + (0.0 if batch else reading_weights)
                    done = number * len(steps) + block + (batch + 1 == len(batches))
                    yield ReadStep(texts, seconds, block, done, groups * len(steps))

    def _pass(self, texts: list[int]) -> Callable[[], Any]:
        return base_pass(self.loaded, padded([self.encoded.ids[text] for text in texts], self.loaded.pad_id))

    def _begin(self, texts: list[int]) -> float:
        self.before(texts)
        return time.perf_counter()

    @contextmanager
    def _running(self) -> Iterator[None]:
        with torch.inference_mode():
            yield
            wait_for(self.loaded.device)


def padded(sequences: Sequence[Sequence[int]], pad_id: int) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Ids ``(B, S)`` padded on the right, and their mask ``(B, S)``; None where there is no padding."""
    longest = max(map(len, sequences))
    ids = torch.tensor([[*tokens] + [pad_id] * (longest - len(tokens)) for tokens in sequences])
    if all(len(tokens) == longest for tokens in sequences):
        # Nothing to mask, and attention takes its quicker causal path.
        return ids, None
    lengths = torch.tensor([len(tokens) for tokens in sequences])
    return ids, (torch.arange(longest) < lengths[:, None]).long()
