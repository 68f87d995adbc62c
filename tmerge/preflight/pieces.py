"""What a run's work is made of, each piece timed on this machine: `tmerge.preflight.seconds` puts them together.

A piece is timed as the run does it, in the shapes and the dtype that it has there: a product of 512 by 512 says little
about a head of 262,144 rows, and nothing about the attention beside it.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf.constants import GGMLQuantizationType
from tokenizers import Tokenizer
from tokenizers.models import BPE
from torch import Tensor
from torch.nn import functional

from tmerge.models.demo import cache_folder
from tmerge.preflight.speed import Timing, timing_of
from tmerge.transport import (
    correlation_cost,
    mass_of_top,
    match,
    mutual_top,
    plan_from_potentials,
    sinkhorn,
    sparsify,
    standardise,
)

__all__ = ["ROWS", "WIDTH", "Pieces"]

ROWS = 512
"""Of the features that transport is timed on."""
WIDTH = 512
"""Neurons of each model there."""

_CPU = torch.device("cpu")
# Rows of what a product is timed on, and values of its weight at most: a wider one takes as long for each of them.
_TOKENS, _VALUES = 256, 1 << 23
# Weights that are read one after the other, so that no cache holds them.
_UNCACHED = 8
# Of the attention that is timed: texts, their tokens, heads and their width.
_ATTENTION = (4, 64, 8, 64)
# Values that are passed over, converted, unpacked and written.
_PASSED = 1 << 20
# Of the tokenizer that is built: tokens of one letter, and each pair of them one more.
_LETTERS = 100
# Of the features: what both models' neurons have in common, and what each adds. Sinkhorn's sweeps depend on it:
# features that have nothing in common are done after three, a problem of features with themselves is not done after a
# hundred, and neither is what a run meets.
_SHARED, _OWN = 8, 0.3


@dataclass
class Pieces:
    """Times pieces, and remembers which it was asked for.

    Attributes:
        device: Where models and transport run.
        timings: What the answers were made of.
    """

    device: torch.device
    timings: list[Timing] = field(default_factory=list)

    def product(self, inputs: int, outputs: int, dtype: torch.dtype, device: torch.device | None = None) -> float:
        """Seconds of a projection for each row of what it reads."""
        where = device or self.device
        inputs = max(1, min(inputs, _VALUES))
        timed = max(1, min(outputs, _VALUES // inputs))

        def prepare() -> Callable[[], object]:
            draw = torch.Generator().manual_seed(0)
            rows = torch.randn(_TOKENS, inputs, generator=draw).to(where, dtype)
            weight = torch.randn(timed, inputs, generator=draw).to(where, dtype)
            # Read back, as an accelerator would else be asked for the next one before it has done this.
            return lambda: functional.linear(rows, weight)[0, 0].item()

        seconds = self._timed(f"product {_TOKENS} by {inputs} by {timed}", prepare, where, dtype)
        return seconds * outputs / timed / _TOKENS

    def streaming(self, dtype: torch.dtype) -> float:
        """Seconds for each weight of a product with so few rows that reading the weight is all there is to it."""
        side = int(_VALUES**0.5)

        def prepare() -> Callable[[], object]:
            draw = torch.Generator().manual_seed(0)
            rows, weights = (
                torch.randn(1, side, generator=draw).to(self.device, dtype),
                [torch.randn(side, side, generator=draw).to(self.device, dtype) for _ in range(_UNCACHED)],
            )
            return lambda: [functional.linear(rows, weight) for weight in weights][-1][0, 0].item()

        return self._timed(f"streaming {_UNCACHED} of {side}", prepare, self.device, dtype) / _UNCACHED / side**2

    def hashing(self) -> float:
        """Seconds for each byte of a file that is hashed."""
        return self._timed(f"sha256 {16 * _PASSED}", _hashed, _CPU, torch.uint8) / (16 * _PASSED)

    def attention(self, dtype: torch.dtype) -> float:
        """Seconds for each token, each value of its queries and each token of its text."""
        texts, tokens, heads, width = _ATTENTION

        def prepare() -> Callable[[], object]:
            draw = torch.Generator().manual_seed(0)
            values = torch.randn(texts, heads, tokens, width, generator=draw).to(self.device, dtype)
            return lambda: functional.scaled_dot_product_attention(values, values, values)[0, 0, 0, 0].item()

        seconds = self._timed(f"attention {_ATTENTION}", prepare, self.device, dtype)
        return seconds / (texts * tokens * heads * width * tokens)

    def passing(self, dtype: torch.dtype) -> float:
        """Seconds for each value that something elementwise passes over, an activation or a norm's part."""

        def prepare() -> Callable[[], object]:
            values = torch.randn(_PASSED, generator=torch.Generator().manual_seed(0)).to(self.device, dtype)
            return lambda: (functional.silu(values) * values)[0].item()

        return self._timed(f"silu {_PASSED}", prepare, self.device, dtype) / _PASSED / 2

    def conversion(self, dtype: torch.dtype) -> float:
        """Seconds for each weight that is read from a file, in bfloat16, and held in `dtype`."""

        def prepare() -> Callable[[], object]:
            values = torch.ones(_PASSED, dtype=torch.bfloat16)
            return lambda: values.to(dtype, copy=True)

        return self._timed(f"conversion {_PASSED}", prepare, _CPU, dtype) / _PASSED

    def unpacking(self) -> float:
        """Seconds for each weight that is unpacked from a GGUF file's blocks."""

        def prepare() -> Callable[[], object]:
            values, size = gguf.GGML_QUANT_SIZES[GGMLQuantizationType.Q4_K]
            packed = np.zeros((_PASSED // 8192, 8192 // values * size), dtype=np.uint8)
            return lambda: gguf.dequantize(packed, GGMLQuantizationType.Q4_K)

        return self._timed(f"unpacking {_PASSED}", prepare, _CPU, torch.float32) / _PASSED

    def vocabulary(self) -> float:
        """Seconds for each token of a tokenizer that is built from its file."""

        def prepare() -> Callable[[], object]:
            letters = [chr(0x4E00 + letter) for letter in range(_LETTERS)]
            pairs = [(first, second) for first in letters for second in letters]
            tokens = [*letters, *(first + second for first, second in pairs)]
            text = Tokenizer(BPE({token: index for index, token in enumerate(tokens)}, pairs)).to_str()
            return lambda: Tokenizer.from_str(text)

        entries = _LETTERS * (_LETTERS + 1)
        return self._timed(f"tokenizer {entries}", prepare, _CPU, torch.int64) / entries

    def writing(self) -> float:
        """Seconds for each byte that is written to a file and reaches the disk."""

        def prepare() -> Callable[[], object]:
            data = bytes(16 * _PASSED)
            folder: Path | None = cache_folder()  # the system's temporary folder may be memory
            try:
                cache_folder().mkdir(parents=True, exist_ok=True)
            except OSError:
                folder = None

            def write() -> None:
                with tempfile.TemporaryFile(dir=folder) as file:
                    file.write(data)
                    file.flush()
                    os.fsync(file.fileno())

            return write

        return self._timed(f"writing {16 * _PASSED}", prepare, _CPU, torch.uint8) / (16 * _PASSED)

    def equations(self) -> float:
        """Seconds for each operation of a Cholesky factor in float64 and of what is solved by it."""

        def prepare() -> Callable[[], object]:
            side = torch.randn(WIDTH, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
            regular = (side @ side.T).add_(torch.eye(WIDTH, dtype=torch.float64), alpha=WIDTH)
            return lambda: torch.cholesky_solve(side, torch.linalg.cholesky(regular))

        return self._timed(f"equations {WIDTH}", prepare, _CPU, torch.float64) / (WIDTH**3 * (1 / 3 + 2))

    def recording(self, kept: int) -> float:
        """Seconds for each entry of a plan of which a record keeps so many of each row and column."""

        def prepare() -> Callable[[], object]:
            cost = correlation_cost(*_features(torch.float32))
            solved = sinkhorn(cost, 0.1)

            def record() -> None:
                plan = plan_from_potentials(cost, solved.f, solved.g, 0.1)
                sparsify([plan], [mutual_top(plan, kept)])
                mass_of_top(plan)

            return record

        return self._timed(f"recording {kept} of {WIDTH}", prepare, _CPU, torch.float32) / WIDTH**2

    def costs(self, dtype: torch.dtype) -> float:
        """Seconds for each entry of a cost matrix and each row of the features."""

        def prepare() -> Callable[[], object]:
            left, right = (features.to(self.device) for features in _features(dtype))
            return lambda: correlation_cost(left, right)[0, 0].item()

        return self._timed(f"costs {ROWS} by {WIDTH}", prepare, self.device, dtype) / WIDTH**2 / ROWS

    def matching(self) -> float:
        """Seconds for each entry of a similarity that is matched one to one."""

        def prepare() -> Callable[[], object]:
            similarity = 1 - correlation_cost(*_features(torch.float32))
            return lambda: match(similarity)

        return self._timed(f"matching {WIDTH}", prepare, _CPU, torch.float32) / WIDTH**2

    def sweeps(self, epsilon: float, dtype: torch.dtype) -> float:
        """Seconds for each entry of a cost matrix that Sinkhorn's sweeps bring to an end."""

        def prepare() -> Callable[[], object]:
            cost = correlation_cost(*(features.to(self.device) for features in _features(dtype)))
            return lambda: sinkhorn(cost, epsilon)

        return self._timed(f"sinkhorn {WIDTH}, epsilon {epsilon:g}", prepare, self.device, dtype) / WIDTH**2

    def _timed(
        self, what: str, prepare: Callable[[], Callable[[], Any]], device: torch.device, dtype: torch.dtype
    ) -> float:
        timing = timing_of(what, prepare, device, dtype)
        if timing not in self.timings:
            self.timings.append(timing)
        return timing.seconds


def _hashed() -> Callable[[], object]:
    data = bytes(16 * _PASSED)
    return lambda: hashlib.sha256(data).digest()


def _features(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(ROWS, WIDTH) standardised features of two models that have something in common; the same at every call."""
    draw = torch.Generator().manual_seed(0)

    def normal(rows: int, columns: int) -> Tensor:
        return torch.randn(rows, columns, generator=draw)

    common = normal(ROWS, _SHARED) / _SHARED**0.5
    left, right = (standardise(common @ normal(_SHARED, WIDTH) + _OWN * normal(ROWS, WIDTH), dtype) for _ in range(2))
    return left, right
