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

import torch
from torch import Tensor
from torch.nn import functional

from tmerge.calibration import Room, batch_limit, length_batches, padded, padded_tokens, run_batches, token_limit
from tmerge.errors import DeviceError, NotEnoughMemoryError, TokenizerError
from tmerge.models import LoadedModel, read_logits, refuse_without_rows
from tmerge.models.device import out_of_memory_as
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
        note: Told that a batch did not fit and is read by halves.
        room: What is known of it from before, and is remembered of it for afterwards.

    Raises:
        TokenizerError: The tokenizer has neither a begin- nor an end-of-text token to start from, or a text gives a
            token that the model has no row for.
        NotEnoughMemoryError: A text did not fit, or, of a model that is read by blocks, a block's weights.
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
    began = time.perf_counter()
    was_training = model.training
    model.eval()
    try:
        lengths = [len(ids) for ids in encoded]
        of_all = length_batches(lengths, batch_limit(loaded.device, batch_tokens))
        batches = processes.mine(of_all, [padded_tokens(batch, lengths) for batch in of_all])
        windows_left = Counter(owners[index] for batch in batches for index in batch)
        scored_here = len(windows_left)
        window_bits = [0.0] * len(encoded)

        def score(batch: list[int]) -> None:
            scored = _bits_of(model, [encoded[index] for index in batch], loaded.device)
            for index, of_window in zip(batch, scored.tolist(), strict=True):
                window_bits[index] = of_window

        def after(batch: list[int]) -> None:
            windows_left.subtract(owners[index] for index in batch)
            if progress is not None:
                progress(sum(not windows for windows in windows_left.values()), scored_here)

        fitting = room or Room()
        with out_of_memory_as(
            lambda: NotEnoughMemoryError(
                f"{loaded.reference}: out of memory on {loaded.device} while scoring; lower calibration.batch_tokens "
                f"(now {batch_tokens}) or use --device cpu"
            )
        ):
            run_batches(loaded, batches, lengths, score, fitting, note=note, after=after, progress=progress)
        of_windows = torch.tensor(processes.gathered(window_bits), dtype=torch.float64).sum(0)
        bits = torch.zeros(len(texts), dtype=torch.float64).index_add_(0, of_text, of_windows)
    finally:
        model.train(was_training)
    if finite:
        _check_finite(loaded, bits)
    sizes = torch.tensor([len(text.encode()) for text in texts], dtype=torch.float64)
    return Scores(bits, sizes, sum(map(len, encoded)) - len(encoded), time.perf_counter() - began)


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
