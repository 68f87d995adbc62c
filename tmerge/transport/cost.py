"""The cost between two models' features: one minus the Pearson correlation over texts (Eq. 7).

``C_ij = 1 - corr(X[:, i], Y[:, j])`` lies in [0, 2]. Each side is standardised once, to columns of mean zero and
unit norm, so that the correlations of any pair of layers are one matrix product.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from tmerge.errors import TransportError

__all__ = ["correlation_cost", "row_blocks", "standardise"]

# A column whose deviations are within this many float32 roundings of its size has no variation to correlate.
_ROUNDINGS = 8 * torch.finfo(torch.float32).eps
# Entries of a block: on a CPU, and elsewhere, where it is memory that they save.
_CACHED = 1 << 17
_AT_ONCE = 1 << 24


def standardise(features: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Columns of mean zero and norm one.

    Args:
        features: (T, n), any floating dtype; T texts, n neurons. Means and norms are taken in float64.
        dtype: Of the result.

    Returns:
        (T, n). A constant column has no correlation with anything: it becomes zeros, so its cost is 1, never NaN.

    Raises:
        TransportError: Fewer than two texts, or a feature that is not finite.
    """
    if features.dim() != 2 or features.shape[0] < 2:
        raise TransportError(f"features of shape {tuple(features.shape)}: a correlation needs at least two texts")
    size = features.abs().amax(0).to(torch.float64)
    if not bool(torch.isfinite(size).all()):
        raise TransportError("features are not finite: run the models with dtype float32")
    exact = features.to(torch.float64, copy=True)
    exact -= exact.mean(0)
    norm = exact.square().sum(0).sqrt()  # six times as fast as vector_norm along the first dimension
    constant = norm <= _ROUNDINGS * size * features.shape[0] ** 0.5
    scale = torch.where(constant, torch.zeros_like(norm), 1.0 / norm.clamp_min(torch.finfo(torch.float64).tiny))
    return exact.mul_(scale).to(dtype).contiguous()


def correlation_cost(target: Tensor, source: Tensor, *, out: Tensor | None = None) -> Tensor:
    """1 - correlation of every target neuron with every source neuron.

    Args:
        target: (T, n) from `standardise`.
        source: (T, m) or a batch (M, T, m) from `standardise`, same dtype and device.
        out: Where the costs are written; new memory if None.

    Returns:
        (n, m) or (M, n, m) costs in [0, 2], in the inputs' dtype.
    """
    if target.shape[-2] != source.shape[-2]:
        raise TransportError(
            f"target features have {target.shape[-2]} texts and source features {source.shape[-2]}: "
            "both models must read the same texts in the same order"
        )
    correlation = torch.matmul(target.mT, source, out=out)
    for rows in row_blocks(correlation):
        # Rounding leaves duplicates a hair outside [-1, 1].
        correlation[..., rows, :].neg_().add_(1.0).clamp_(0.0, 2.0)
    return correlation


def row_blocks(matrix: Tensor) -> Iterator[slice]:
    """Rows of a matrix (..., n, m), some at a time: what several operations follow each other on stays in the cache."""
    entries = _CACHED if matrix.device.type == "cpu" else _AT_ONCE
    rows = max(1, entries * matrix.shape[-2] // max(1, matrix.numel()))
    for start in range(0, matrix.shape[-2], rows):
        yield slice(start, start + rows)
