"""What is known of each neuron over the calibration set, beside its correlations."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["FeatureStatistics", "Statistics", "measured"]

_BUFFERED = 2**20  # values of a feature that are in memory in float64 at a time


@dataclass(frozen=True)
class FeatureStatistics:
    """Per-neuron statistics of one feature over the calibration set.

    Attributes:
        mean: (n,) mean over texts.
        deviation: (n,) standard deviation over texts.
        magnitude: (n,) mean |activation| over texts, the selection score of A.5.
    """

    mean: Tensor
    deviation: Tensor
    magnitude: Tensor

    @classmethod
    def of(cls, features: Tensor, buffer: Tensor | None = None) -> FeatureStatistics:
        """Statistics of features (T, n), summed in float64 and returned in float32.

        Args:
            features: (T, n).
            buffer: (b,) float64 that is written over; made if None, or too small for one row.
        """
        rows, width = features.shape
        if buffer is None or len(buffer) < width:
            buffer = torch.empty(width * max(1, min(rows, _BUFFERED // width)), dtype=torch.float64)
        buffered = len(buffer) // width
        exact_rows = buffer[: buffered * width].view(buffered, width)
        mean, squares, magnitude = (torch.zeros(width, dtype=torch.float64) for _ in range(3))
        for chunk in features.split(len(exact_rows)):
            exact = exact_rows[: len(chunk)].copy_(chunk)
            mean += exact.sum(0) / rows
            magnitude += exact.abs_().sum(0) / rows
        for chunk in features.split(len(exact_rows)):
            squares += exact_rows[: len(chunk)].copy_(chunk).sub_(mean).square_().sum(0) / rows
        return cls(mean.float(), squares.sqrt().float(), magnitude.float())

    @property
    def root_mean_square(self) -> float:
        """Root mean square over texts and neurons."""
        return float((self.deviation.double().square() + self.mean.double().square()).mean().sqrt())


@dataclass(frozen=True)
class Statistics:
    """Both models' statistics.

    Attributes:
        target: (layer, feature key) -> of that feature.
        source: Likewise.
    """

    target: Mapping[tuple[int, str], FeatureStatistics]
    source: Mapping[tuple[int, str], FeatureStatistics]


def measured(
    read: Callable[[int, str], Tensor], layers: Mapping[str, tuple[int, ...]]
) -> dict[tuple[int, str], FeatureStatistics]:
    """One model's statistics.

    Args:
        read: (layer, key) -> (T, n) features.
        layers: Feature key -> the layers that have it.
    """
    # One buffer for all: large copies made anew, between the few numbers of each that stay, leave glibc's allocator
    # holes that fit none of the next, and memory grows with depth.
    buffer = torch.empty(_BUFFERED, dtype=torch.float64)
    return {(layer, key): FeatureStatistics.of(read(layer, key), buffer) for key, of in layers.items() for layer in of}
