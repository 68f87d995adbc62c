"""The honest rivals of a plan: linear maps fitted to the same features (``transport.map``).

* ``procrustes``: the orthogonal map between the two models' centred features, Phi_out = U V^T with U S V^T = X^T Y and
  Phi_in its transpose, as Theseus carries task vectors (arXiv 2602.12952; Schoenemann 1966).
* ``ridge``: least squares in the direction in which each map is used, Phi_in from the target's features to the
  source's, Phi_out back, with a penalty relative to the features' mean variance (Hoerl and Kennard 1970).

Both take the pairs of layers as they are, and a map may mix all neurons, so that neither asks for a correspondence.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from tmerge.fusion.pairs import Pairs, PlanPair

__all__ = ["MappedPairs", "procrustes", "ridge"]

Read = Callable[[int, str], Tensor]


def procrustes(target: Tensor, source: Tensor) -> tuple[Tensor, Tensor]:
    """The semi-orthogonal map between two features.

    Args:
        target: (T, n).
        source: (T, n').

    Returns:
        Phi_out (n, n') and Phi_in (n', n), its transpose, float32.
    """
    left, _, right = torch.linalg.svd(_centred(target).T @ _centred(source), full_matrices=False)
    out = (left @ right).float()
    return out, out.T.contiguous()


def ridge(target: Tensor, source: Tensor, penalty: float) -> tuple[Tensor, Tensor]:
    """Least-squares maps in both directions.

    Args:
        target: (T, n).
        source: (T, n').
        penalty: Relative to the mean variance of the features that are mapped from.

    Returns:
        Phi_out (n, n') and Phi_in (n', n), float32.
    """
    mine, theirs = _centred(target), _centred(source)
    return _fit(theirs, mine, penalty).float(), _fit(mine, theirs, penalty).float()


class MappedPairs:
    """Pairs of layers whose maps are fitted, beside what their plans say for the record."""

    def __init__(
        self, pairs: Pairs, features: tuple[Read, Read], kind: Literal["procrustes", "ridge"], penalty: float
    ) -> None:
        self._pairs, self._features, self._kind, self._penalty = pairs, features, kind, penalty

    def of_layer(self, layer: int, wanted: Sequence[tuple[str, int]]) -> dict[tuple[str, int], PlanPair]:
        """As `Pairs.of_layer`."""
        read = self._pairs.of_layer(layer, wanted)
        for (key, other), pair in read.items():
            mine, theirs = self._features[0](layer, key), self._features[1](other, key)
            fitted = procrustes(mine, theirs) if self._kind == "procrustes" else ridge(mine, theirs, self._penalty)
            read[key, other] = replace(pair, maps=fitted)
        return read

    def keep(self, used: Sequence[PlanPair]) -> None:
        """As `Pairs.keep`."""
        self._pairs.keep(used)

    def tensors(self) -> dict[str, Tensor]:
        """As `Pairs.tensors`: the plans, which these maps do without."""
        return self._pairs.tensors()


def _centred(features: Tensor) -> Tensor:
    exact = features.to(torch.float64)
    return exact - exact.mean(0)


def _fit(given: Tensor, wanted: Tensor, penalty: float) -> Tensor:
    """(m, n): the map that takes (T, n) nearest to (T, m)."""
    products = given.T @ given
    products.diagonal().add_(penalty * products.diagonal().mean())
    return torch.linalg.solve(products, given.T @ wanted).T
