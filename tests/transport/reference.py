"""The independent side of the solver's tests: features of several kinds, and their plans by NumPy and POT."""

from __future__ import annotations

import warnings

import numpy as np
import ot
import torch
from torch import Tensor

__all__ = ["assert_same_plan", "feature_pair", "pot_plan", "reference_cost", "reference_plan"]

# Below this share of the largest entry, an entry of a plan is not compared by its own size.
_NEGLIGIBLE = 1e-12


def feature_pair(kind: str, n: int, m: int, *, texts: int = 200, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Features (texts, n) and (texts, m), float64, that correlate in some way.

    ``independent``: not at all. ``factors``: through six hidden causes. ``copies``: the second are noisy copies of
    the first.
    """
    rng = np.random.default_rng(seed)
    if kind == "independent":
        pair = rng.normal(size=(texts, n)), rng.normal(size=(texts, m))
    elif kind == "factors":
        causes = rng.normal(size=(texts, 6))
        pair = tuple(causes @ rng.normal(size=(6, size)) + 2 * rng.normal(size=(texts, size)) for size in (n, m))
    else:
        target = rng.normal(size=(texts, n))
        origin = rng.permutation(np.resize(np.arange(n), m))
        pair = target, target[:, origin] + 0.5 * rng.normal(size=(texts, m))
    return torch.from_numpy(pair[0]), torch.from_numpy(pair[1])


def reference_cost(target: Tensor, source: Tensor) -> np.ndarray:
    """1 - correlation by `numpy.corrcoef`, in float64 whatever the features' dtype; 1 where a feature is constant."""
    x, y = target.double().numpy(), source.double().numpy()
    with warnings.catch_warnings(), np.errstate(invalid="ignore", divide="ignore"):
        warnings.simplefilter("ignore", RuntimeWarning)
        correlation = np.corrcoef(x, y, rowvar=False)[: x.shape[1], x.shape[1] :]
    return 1.0 - np.where(np.isnan(correlation), 0.0, correlation)


def pot_plan(
    cost: np.ndarray,
    epsilon: float,
    *,
    a: np.ndarray | None = None,
    b: np.ndarray | None = None,
    method: str = "sinkhorn_log",
    iterations: int = 100_000,
) -> np.ndarray:
    """POT's plan, iterated until its marginals hold to 1e-13; a warning that they do not fails the test."""
    n, m = cost.shape
    a = np.full(n, 1.0 / n) if a is None else a
    b = np.full(m, 1.0 / m) if b is None else b
    return ot.sinkhorn(a, b, cost, epsilon, method=method, stopThr=1e-13, numItermax=iterations)


def reference_plan(target: Tensor, source: Tensor, epsilon: float) -> np.ndarray:
    """The plan of two models' features, independently of tmerge."""
    return pot_plan(reference_cost(target, source), epsilon)


def assert_same_plan(got: Tensor, wanted: np.ndarray, relative: float = 1e-5, *, entrywise: bool = True) -> None:
    """Two plans agree: everywhere to `relative` of the largest entry, and each entry to `relative` of itself.

    The second is asked of the entries above 1e-12 of the largest. It is the sharper of the two: an error d of
    (f + g - C) / eps changes *every* entry by a factor exp(d), the smallest as much as the largest.

    Args:
        got: tmerge's plan.
        wanted: The reference.
        relative: The tolerance.
        entrywise: Whether to ask for the second.
    """
    found = got.double().numpy()
    assert np.isfinite(found).all()
    difference = np.abs(found - wanted)
    assert difference.max() <= relative * wanted.max(), f"{difference.max() / wanted.max():.1e} of the largest entry"
    if entrywise:
        counted = wanted > _NEGLIGIBLE * wanted.max()
        worst = (difference[counted] / wanted[counted]).max()
        assert worst <= relative, f"an entry differs by {worst:.1e} of itself"
