"""Bits per byte on held-out texts: a likelihood that models with different tokenizers can be compared by.

    bits per byte = -sum_t log2 p(token_t | tokens before it) / bytes of the text

Every token of a text is scored, the first one too, given the model's begin-of-text token (its end-of-text token
where it has no other), as lm-evaluation-harness's rolling log-likelihood does. A text that is longer than the model can
read goes through it in windows, each given the last token of the one before. All models score the same bytes.
"""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional

from tmerge.calibration import Room, batch_limit, length_batches, padded, token_limit
from tmerge.errors import DeviceError, NotEnoughMemoryError, TokenizerError
from tmerge.models import LoadedModel, give_back_memory, read_logits, refuse_without_rows
from tmerge.models.blocks import run_passes
from tmerge.models.device import is_out_of_memory
from tmerge.processes import ALONE, Processes

__all__ = ["Scores", "score_texts"]


@dataclass(frozen=True)
class Scores:
    """How a model did on N texts.

    Attributes:
        bits: (N,) float64, -log2 of each text's probability.
        bytes: (N,) float64, UTF-8 bytes of each text.
        tokens: Tokens scored.
        seconds: Wall time of the forward passes.
    """

    bits: Tensor
    bytes: Tensor
    tokens: int
    seconds: float

    @property
    def bits_per_byte(self) -> float:
        """Over all texts together: sum of bits over sum of bytes."""
        return float(self.bits.sum() / self.bytes.sum())

    def first(self, texts: int) -> Scores:
        """On the first of the texts alone; tokens and seconds stay those of all."""
        return replace(self, bits=self.bits[:texts], bytes=self.bytes[:texts])

    def followed_by(self, following: Scores) -> Scores:
        """The same model on these texts and then on others."""
        return Scores(
            torch.cat([self.bits, following.bits]),
            torch.cat([self.bytes, following.bytes]),
            self.tokens + following.tokens,
            self.seconds + following.seconds,
        )


@torch.inference_mode()
def score_texts(
    loaded: LoadedModel,
    texts: Sequence[str],
    *,
    batch_tokens: int = 2048,
    finite: bool = True,
    processes: Processes = ALONE,
    progress: Callable[[int, int], None] | None = None,
    note: Callable[[str], None] | None = None,
    room: Room | None = None,
) -> Scores:
    """Score every text under a causal model.

    Args:
        loaded: Model and tokenizer.
        texts: N texts, not empty.
        batch_tokens: Most padded tokens of one forward pass.
        finite: Whether a score that is not finite is refused; a candidate that overflows may simply lose.
        processes: Among whom the batches are shared out; each calls this and is given all scores.
        progress: Called with (texts done, all that this process scores), or, of a model that is read by blocks, with
            (blocks done, all of them); may raise to stop.
        note: Told that a batch did not fit and was scored by halves.
        room: What is known of it from before, and is remembered of it for afterwards.

    Raises:
        TokenizerError: The tokenizer has neither a begin- nor an end-of-text token to start from, or a text gives a
            token that the model has no row for.
        NotEnoughMemoryError: A text did not fit, or, of a model that is read by blocks, a batch.
        DeviceError: With `finite`, a score that is not finite in the dtype that the model computes in.
    """
    model, tokenizer = loaded.model, loaded.tokenizer
    start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    if start is None:
        raise TokenizerError(
            f"{loaded.reference}: the tokenizer has neither a BOS nor an EOS token, so the first token of a text "
            "cannot be scored; set one of them in its tokenizer_config.json"
        )
    refuse_without_rows(loaded.reference.text, tokenizer, loaded.embedding_rows, texts)
    reach = token_limit(model.config.get_text_config(), sys.maxsize)
    encoded, owners = [], []
    for owner, ids in enumerate(tokenizer(list(texts), add_special_tokens=False)["input_ids"]):
        windows = list(_windows([start, *ids], reach))
        encoded += windows
        owners += [owner] * len(windows)
    of_text = torch.tensor(owners)
    bits = torch.zeros(len(texts), dtype=torch.float64)
    began = time.perf_counter()
    was_training = model.training
    model.eval()
    try:
        limit = batch_limit(loaded.device, batch_tokens)
        of_all = length_batches([len(ids) for ids in encoded], limit)
        batches = processes.mine(of_all, [len(batch) * len(encoded[batch[-1]]) for batch in of_all])
        windows_left = Counter(owners[index] for batch in batches for index in batch)
        scored_here = len(windows_left)

        batch_bits: list[Tensor] = []
        fitting = room or Room()

        def score(batch: list[int]) -> None:
            batch_bits.append(bits_of(batch))

        def bits_of(batch: list[int]) -> Tensor:
            longest = max(len(encoded[index]) for index in batch)
            if loaded.block_weights is None and not fitting.has(len(batch), longest):
                return torch.cat([bits_of(half) for half in _halves(batch)])
            try:
                return _bits_of(model, [encoded[index] for index in batch], loaded.device)
            except (MemoryError, RuntimeError) as error:
                if len(batch) == 1 or loaded.block_weights is not None or not is_out_of_memory(error):
                    raise
            # Here the error no longer keeps the batch's tensors alive.
            give_back_memory()
            if note is not None and fitting.tokens is None:
                note(f"{loaded.device} has no room for a batch of {len(batch)} texts: scored by halves")
            fitting.lacked(len(batch), longest)
            return torch.cat([bits_of(half) for half in _halves(batch)])

        def after(number: int) -> None:
            windows_left.subtract(owners[index] for index in batches[number])
            if progress is not None:
                progress(sum(not windows for windows in windows_left.values()), scored_here)

        works = [partial(score, batch) for batch in batches]
        read = [len(batch) * len(encoded[batch[-1]]) for batch in batches]
        run_passes(loaded, works, read, after=after, progress=progress)
        for batch, of_batch in zip(batches, batch_bits, strict=True):
            bits.index_add_(0, of_text[batch], of_batch)
        bits = torch.stack(processes.gathered(bits)).sum(0)
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise NotEnoughMemoryError(
            f"{loaded.reference}: out of memory on {loaded.device} while scoring; lower calibration.batch_tokens "
            f"(now {batch_tokens}) or use --device cpu"
        ) from None
    finally:
        model.train(was_training)
    if finite:
        _check_finite(loaded, bits)
    sizes = torch.tensor([len(text.encode()) for text in texts], dtype=torch.float64)
    return Scores(bits, sizes, sum(map(len, encoded)) - len(encoded), time.perf_counter() - began)


def _halves(batch: list[int]) -> tuple[list[int], list[int]]:
    """Of a batch of at least two."""
    return batch[: len(batch) // 2], batch[len(batch) // 2 :]


def _check_finite(loaded: LoadedModel, bits: Tensor) -> None:
    """Say which text's score is not finite, rather than let one make every mean NaN."""
    if bool(torch.isfinite(bits).all()):
        return
    spoilt = (~torch.isfinite(bits)).nonzero().flatten().tolist()
    computed = str(loaded.computed_dtype).removeprefix("torch.")
    remedy = "lower fusion.alpha, or use another model" if computed == "float32" else "set dtype: float32"
    raise DeviceError(
        f"{loaded.reference}: the score of text {spoilt[0]} ({len(spoilt)} of {len(bits)}) is not finite, in "
        f"{computed}; {remedy}"
    )


def _windows(ids: list[int], reach: int) -> Iterator[list[int]]:
    """Pieces of at most `reach` tokens, each beginning with the last token of the one before, which is scored there."""
    for first in range(0, max(1, len(ids) - 1), reach - 1):
        yield ids[first : first + reach]


def _bits_of(model: torch.nn.Module, sequences: list[list[int]], device: torch.device) -> Tensor:
    """-log2 probability of each sequence given its first token: (B,) float64 on the CPU."""
    # Padding is on the right and causal attention never looks there, so what it holds does not matter.
    ids, attention = padded(sequences, 0)
    # Listed here: how many of a mask's entries are set a device would have to be waited for.
    scored = [(row, position) for row, sequence in enumerate(sequences) for position in range(len(sequence) - 1)]
    rows, positions = torch.tensor(scored, dtype=torch.int64).reshape(-1, 2).T.contiguous().to(device)
    ids, attention = ids.to(device), None if attention is None else attention.to(device)
    total = torch.zeros(len(sequences), dtype=torch.float64, device=device if device.type != "mps" else "cpu")

    def add(stretch: slice, logits: Tensor) -> None:
        row, position = rows[stretch], positions[stretch]
        loss = functional.cross_entropy(logits.float(), ids[row, position + 1], reduction="none")
        total.index_add_(0, row.to(total.device), loss.to(total.device).to(torch.float64))

    read_logits(model, ids, attention, rows, positions, add)
    return total.cpu() / torch.log(torch.tensor(2.0, dtype=torch.float64))
