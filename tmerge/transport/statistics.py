"""What is known of each neuron over the calibration set, beside its correlations."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["FeatureStatistics", "Statistics", "measured"]


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
    def of(cls, features: Tensor) -> FeatureStatistics:
        """Statistics of features (T, n), summed in float64 and returned in float32."""
        exact = features.to(torch.float64)
        return cls(
            exact.mean(0).to(torch.float32),
            exact.std(0, correction=0).to(torch.float32),
            exact.abs().mean(0).to(torch.float32),
        )

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
    return {(layer, key): FeatureStatistics.of(read(layer, key)) for key, of in layers.items() for layer in of}
