"""Reading a model's features: hooks on its projections, means over each text's tokens (step 1 of the method).

For every text and every feature, the mean over its real tokens is taken in float32, whatever the model computes in.
Real tokens are those of the text and the special ones that the model's own tokenizer adds (a BOS token, for most that
have one), not padding. The base model runs without its head, which for a large vocabulary is the dearest layer. One
pre feature serves q, k and v, another gate and up.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import accumulate, groupby
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tmerge.calibration.batches import encode, read_batches
from tmerge.calibration.features import FeatureWriter
from tmerge.calibration.positions import token_positions
from tmerge.calibration.room import Room, padded_tokens
from tmerge.errors import Cancelled, CheckpointError, DeviceError, TmergeError, TokenizerError, UnsupportedModelError
from tmerge.models import LoadedModel
from tmerge.models.projections import Architecture, Tap
from tmerge.processes import ALONE, Processes

__all__ = ["CaptureReport", "bare_forward", "capture"]

# Pooled features that wait for the disk; a batch of many texts through a large model has more than fits in memory.
_PENDING_BYTES = 256 * 2**20
# Activations that the CPU sums at a time, per thread: a core's own cache holds about as much.
_SLICE_BYTES = 2**20


@dataclass(frozen=True)
class CaptureReport:
    """What was read.

    Attributes:
        texts: T.
        tokens: Real tokens, after truncation.
        truncated: Texts that were cut at `limit`.
        limit: Most tokens of a text: the recipe's, or the model's longest sequence where that is less.
        without_tokens: Texts that the tokenizer gives no token for; their features are the mean of all others.
        padded_tokens: Tokens of all batches, padding included.
        batches: Forward passes.
        forward_seconds: Wall time of the forward passes, pooling included; of several processes the longest.
        seconds: Wall time in all.
    """

    texts: int
    tokens: int
    truncated: int
    limit: int
    without_tokens: int
    padded_tokens: int
    batches: int
    forward_seconds: float
    seconds: float


def capture(
    loaded: LoadedModel,
    architecture: Architecture,
    texts: Sequence[str],
    projections: Sequence[str],
    folder: Path,
    *,
    max_tokens: int,
    batch_tokens: int,
    key: str,
    ends: Sequence[Sequence[int]] | None = None,
    processes: Processes = ALONE,
    progress: Callable[[int, int], None] | None = None,
    cancelled: Callable[[], bool] | None = None,
    note: Callable[[str], None] | None = None,
    room: Room | None = None,
) -> CaptureReport:
    """Read the pre and post features of some projections over all texts, into a `FeatureStore`.

    A row of the store is a text, the mean over its tokens; or, with `ends`, one of the tokens that end there.

    Args:
        loaded: The model and its tokenizer.
        architecture: Its projections, from `describe` of this very model.
        texts: T texts.
        projections: Names of those wanted; a layer that lacks one is passed over.
        folder: The store's; an older store there is replaced.
        max_tokens: Longer texts are cut.
        batch_tokens: Most padded tokens of a forward pass.
        key: Kept in the store: what decides its contents.
        ends: Per text, the characters after which a token is read (`common_ends`); None for means over whole texts.
        processes: Among whom the batches are shared out; each calls this and writes its rows into the one store.
        progress: Called after each batch with (texts done, all that it reads), or, of a model that is read by
            blocks, with (blocks done, all); may raise to stop, and then there is no store.
        cancelled: Asked before each batch whether to stop.
        note: As for `read_batches`.
        room: Likewise.

    Raises:
        Cancelled: `cancelled` said so.
        CheckpointError: A feature is not finite though the model computes in float32.
        DeviceError: A feature is not finite in a shorter dtype.
        NotEnoughDiskError: The features do not fit.
        NotEnoughMemoryError: As `read_batches`.
        TokenizerError: The tokenizer gives no token for any text.
        UnsupportedModelError: A projection did not run exactly once in a forward pass.
    """
    began = time.perf_counter()
    encoded = encode(loaded, texts, max_tokens)
    lengths = encoded.lengths
    empty = [text for text, length in enumerate(lengths) if not length]
    if len(empty) == len(texts):
        raise TokenizerError(f"{loaded.reference}: the tokenizer gives no token for any text; use the model's own")
    taps = architecture.taps(projections)
    listed = json.dumps(list(texts), ensure_ascii=False)
    facts = {
        "model": loaded.reference.name,
        "commit": loaded.commit,
        "dtype": str(loaded.dtype).removeprefix("torch."),
        "texts_sha256": hashlib.sha256(listed.encode()).hexdigest(),
    }
    forward_seconds = 0.0
    widths = {(tap.layer, tap.key): tap.features for tap in taps}
    positions = None if ends is None else token_positions(loaded.tokenizer, texts, ends, encoded.limit)
    rows = len(texts) if positions is None else sum(map(len, positions))
    # A token's activations are stored as they are; means over texts have more digits.
    dtypes = {} if positions is None else {_feature(tap): _stored_dtype(loaded, tap) for tap in taps}
    writer = processes.from_first(lambda: FeatureWriter(folder, rows, widths, key=key, facts=facts, dtypes=dtypes))
    with writer if processes.is_first else nullcontext(writer):
        pool = _Pool(loaded, taps, lengths, writer, positions)
        with pool.hooked():
            steps = read_batches(loaded, encoded, batch_tokens, pool.begin, pool.forget, note, processes, room)
            for step in steps:
                pool.end(step.block)
                forward_seconds += step.seconds
                if progress is not None:
                    progress(step.done, step.of)
                if cancelled is not None and cancelled():
                    raise Cancelled("stopped while reading features; the same command continues")
        pool.write()
        processes.wait()

        def finish() -> None:
            if empty and positions is None:
                writer.fill_with_mean(empty)
            writer.finish()

        processes.from_first(finish)
    shares = processes.gathered((pool.batches, pool.padded, forward_seconds))
    return CaptureReport(
        texts=len(texts),
        tokens=sum(lengths),
        truncated=encoded.truncated,
        limit=encoded.limit,
        without_tokens=len(empty),
        padded_tokens=sum(share[1] for share in shares),
        batches=sum(share[0] for share in shares),
        forward_seconds=max(share[2] for share in shares),
        seconds=time.perf_counter() - began,
    )


def bare_forward(loaded: LoadedModel, texts: Sequence[str], *, max_tokens: int, batch_tokens: int) -> float:
    """Seconds of the forward passes that `capture` would run on these texts, without its hooks."""
    encoded = encode(loaded, texts, max_tokens)
    return sum(step.seconds for step in read_batches(loaded, encoded, batch_tokens))


class _Pool:
    """Takes the means of a batch as its forward pass goes by, and hands them to the writer.

    A module is pooled whole, once for its input and once for its output, and the taps then read their features from
    the means: a tap selects features and does not mix tokens, so the order makes no difference, and a fused
    projection is not pooled once for each of its parts.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        taps: Sequence[Tap],
        lengths: Sequence[int],
        writer: FeatureWriter,
        positions: Sequence[Sequence[int]] | None = None,
    ) -> None:
        self._loaded, self._lengths, self._writer, self._positions = loaded, lengths, writer, positions
        # Where a text's rows begin in the store.
        self._first = [] if positions is None else list(accumulate(map(len, positions), initial=0))
        self._served: dict[nn.Module, list[Tap]] = {}
        for tap in taps:
            self._served.setdefault(tap.module, []).append(tap)
        self._layers = Counter(tap.layer for tap in taps)
        self.forget()
        self.begin([])

    def forget(self) -> None:
        """What has been read, as it will be again: what is in the store by now is written over."""
        self._waiting: dict[tuple[int, str], list[tuple[list[int], Tensor]]] = {}
        self._waiting_bytes = 0
        # Forward passes, and the tokens of all of them, padding included.
        self.batches = self.padded = 0

    @contextmanager
    def hooked(self) -> Iterator[None]:
        handles = [module.register_forward_hook(partial(self._hook, served)) for module, served in self._served.items()]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def begin(self, texts: list[int]) -> None:
        """Say which texts the next forward pass reads, one a row."""
        self._texts = self._rows = texts
        if self._positions is not None:
            self._rows = [self._first[text] + index for text in texts for index in range(len(self._positions[text]))]
            read = [(row, position) for row, text in enumerate(texts) for position in self._positions[text]]
            self._read = torch.tensor(read, dtype=torch.int64).reshape(-1, 2)
        self._batch_lengths = [self._lengths[text] for text in texts]
        # Rows of one length lie side by side in a batch, so they are summed together and padding is never touched.
        self._runs: list[tuple[slice, int]] = []
        row = 0
        for length, run in groupby(self._batch_lengths):
            start, row = row, row + len(list(run))
            self._runs.append((slice(start, row), length))
        self._divisors = torch.tensor(self._batch_lengths, dtype=torch.float32).unsqueeze(1)
        self._masks: dict[torch.device, tuple[Tensor, Tensor]] = {}
        self._read_there: dict[torch.device, Tensor] = {}
        self._pending: dict[tuple[int, str], Tensor] = {}
        self._pending_bytes = 0
        self._seen: set[tuple[int, str]] = set()

    def end(self, block: int | None) -> None:
        """Take what the forward pass left, or the pass through a block."""
        self._take()
        if len(self._seen) != (self._layers.total() if block is None else self._layers[block]):
            taps = [tap for served in self._served.values() for tap in served if block in (None, tap.layer)]
            raise self._unsupported(next(tap for tap in taps if _feature(tap) not in self._seen), "did not run")
        if not block:
            self.batches += 1
            self.padded += padded_tokens(self._texts, self._lengths)

    def _hook(self, served: list[Tap], module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
        # Nothing is returned: a tensor would take the place of the module's output.
        means: dict[str, Tensor] = {}
        for tap in served:
            if tap.side not in means:
                # (B, 1, n): one token, as far as the tap is concerned.
                means[tap.side] = self._mean(inputs[0] if tap.side == "pre" else output).unsqueeze(1)
            feature, mean = _feature(tap), means[tap.side]
            if feature in self._seen:
                raise self._unsupported(tap, "ran twice")
            self._seen.add(feature)
            rows = tap.read((mean,), mean).squeeze(1)
            self._pending[feature] = rows
            self._pending_bytes += rows.nbytes
        if self._pending_bytes > _PENDING_BYTES:
            self._take()

    def _mean(self, features: Tensor) -> Tensor:
        """Rows for the store, of ``(B, S, n)`` or ``(B * S, n)`` in any dtype.

        Means over each text's real tokens, ``(B, n)`` float32; or the tokens that are read, as many as there are.
        """
        if features.dim() == 2:
            # Some models flatten their tokens before the MLP.
            features = features.unflatten(0, (len(self._texts), -1))
        if self._positions is not None:
            # Once a device, not once a module.
            if features.device not in self._read_there:
                self._read_there[features.device] = self._read.to(features.device)
            read = self._read_there[features.device]
            return features[read[:, 0], read[:, 1]].float()
        if features.device.type != "cpu":
            return self._masked_mean(features)
        means = torch.empty(len(self._texts), features.shape[2])
        slice_bytes = _SLICE_BYTES * torch.get_num_threads()
        for rows, length in self._runs:
            # Slices that stay in a core's cache, and the dtype of the sum: torch is three times as slow on a large
            # tensor, and a converted copy of all activations costs more than the sums themselves.
            step = max(1, slice_bytes // (length * features.shape[2] * features.element_size()))
            for start in range(rows.start, rows.stop, step):
                cache_slice = slice(start, min(start + step, rows.stop))
                torch.sum(features[cache_slice, :length], 1, dtype=torch.float32, out=means[cache_slice])
        return means.div_(self._divisors)

    def _masked_mean(self, features: Tensor) -> Tensor:
        """The same in few kernels, for devices where each run would be one to launch."""
        if len(self._runs) == 1:
            return features.sum(1, dtype=torch.float32).div_(self._runs[0][1])
        padding, lengths = self._mask(features.device, features.shape[1])
        return features.masked_fill(padding, 0).sum(1, dtype=torch.float32).div_(lengths)

    def _mask(self, device: torch.device, longest: int) -> tuple[Tensor, Tensor]:
        """Where the padding is ``(B, S, 1)``, and the lengths ``(B, 1)``, on the features' own device."""
        if device not in self._masks:
            lengths = torch.tensor(self._batch_lengths, device=device).unsqueeze(1)
            padding = torch.arange(longest, device=device) >= lengths
            self._masks[device] = (padding.unsqueeze(2), lengths.float())
        return self._masks[device]

    def write(self) -> None:
        """Write the means that wait, each feature's rows in the order of the texts.

        A batch's texts lie all over the store. Waiting for many batches turns their rows into few long stretches.
        """
        for feature, batches in self._waiting.items():
            texts = torch.tensor([text for batch_texts, _ in batches for text in batch_texts])
            order = texts.argsort()
            rows = torch.cat([rows for _, rows in batches])[order]
            self._writer.write(texts[order].tolist(), {feature: rows})
        self._waiting, self._waiting_bytes = {}, 0

    def _take(self) -> None:
        by_device: dict[torch.device, list[tuple[int, str]]] = {}
        for feature, rows in self._pending.items():
            by_device.setdefault(rows.device, []).append(feature)
        for device, features in by_device.items():
            if device.type != "cpu":
                # One transfer for all.
                widths = [self._pending[feature].shape[1] for feature in features]
                moved = torch.cat([self._pending[feature] for feature in features], 1).cpu().split(widths, 1)
                self._pending.update(zip(features, moved, strict=True))
        for feature, rows in self._pending.items():
            if not len(rows):
                continue
            # The sum first, as it is quicker; it may overflow where no value does.
            if not math.isfinite(float(rows.sum())) and not bool(torch.isfinite(rows).all()):
                raise self._not_finite(feature, rows)
            self._waiting.setdefault(feature, []).append((self._rows, rows))
        self._waiting_bytes += self._pending_bytes
        self._pending, self._pending_bytes = {}, 0
        if self._waiting_bytes > _PENDING_BYTES:
            self.write()

    def _not_finite(self, feature: tuple[int, str], rows: Tensor) -> TmergeError:
        layer, key = feature
        row = self._rows[int((~torch.isfinite(rows)).any(1).nonzero()[0])]
        text = row if self._positions is None else bisect_right(self._first, row) - 1
        what = f"{self._loaded.reference}: {key} of layer {layer} is not finite for text {text}"
        if self._loaded.dtype == torch.float32:
            return CheckpointError(f"{what}, in float32; the weights are damaged: download or convert them again")
        short = str(self._loaded.dtype).removeprefix("torch.")
        return DeviceError(f"{what}, in {short}; set dtype: float32")

    def _unsupported(self, tap: Tap, what: str) -> UnsupportedModelError:
        return UnsupportedModelError(
            f"{self._loaded.reference}: {tap.key} of layer {tap.layer} {what} in a forward pass, so it has no features "
            "of its own; leave this projection out of fusion.projections, or choose another model"
        )


def _stored_dtype(loaded: LoadedModel, tap: Tap) -> torch.dtype:
    """What holds every value of a feature: a plain linear's inputs and outputs are in the dtype of its weight."""
    computed = loaded.computed_dtype
    is_short = computed in (torch.bfloat16, torch.float16) and tap.module.get_parameter("weight").dtype == computed
    return computed if is_short else torch.float32


def _feature(tap: Tap) -> tuple[int, str]:
    return tap.layer, tap.key
