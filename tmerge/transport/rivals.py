"""The honest rivals of a plan: linear maps fitted to the same features (``transport.map``).

* ``procrustes``: the orthogonal map between the two models' centred features, Phi_out = U V^T with U S V^T = X^T Y and
  Phi_in its transpose, as Theseus carries task vectors (arXiv 2602.12952; Schoenemann 1966).
* ``ridge``: least squares in the direction in which each map is used, Phi_in from the target's features to the
  source's, Phi_out back, with a penalty relative to the features' mean variance (Hoerl and Kennard 1970).

Both take the pairs of layers as they are, and a map may mix all neurons, so that neither asks for a correspondence.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from tmerge.recipe import TransportSettings
from tmerge.transport.result import FeatureMap, Transport, Wanted
from tmerge.transport.sides import Read

__all__ = ["procrustes", "ridge", "with_fitted_maps"]


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
    centred = _centred(target), _centred(source)
    return _fit(centred[1], centred[0], penalty).float(), _fit(*centred, penalty).float()


def with_fitted_maps(transport: Transport, target: Read, source: Read, settings: TransportSettings) -> Transport:
    """A transport as the recipe's ``transport.map`` asks for it.

    Args:
        transport: Of plans, which stay what is recorded.
        target: (layer, key) -> (T, n) features of the target.
        source: (layer, key) -> (T, n') features of the source.
        settings: The recipe's section.

    Returns:
        The same, with fitted maps in place of those that are read off the plans; itself with ``map: plan``.
    """
    if settings.map == "plan":
        return transport

    def build(layer: int, wanted: Wanted) -> dict[tuple[str, int], FeatureMap]:
        maps = transport.build(layer, wanted)
        for (key, source_layer), feature_map in maps.items():
            features = target(layer, key), source(source_layer, key)
            fitted = procrustes(*features) if settings.map == "procrustes" else ridge(*features, settings.ridge)
            maps[key, source_layer] = replace(feature_map, fitted=fitted)
        return maps

    return replace(transport, build=build, matched=False)


def _centred(features: Tensor) -> Tensor:
    exact = features.to(torch.float64)
    return exact - exact.mean(0)


def _fit(inputs: Tensor, outputs: Tensor, penalty: float) -> Tensor:
    """(m, n): the map that takes (T, n) nearest to (T, m)."""
    products = inputs.T @ inputs
    products.diagonal().add_(penalty * products.diagonal().mean())
    return torch.linalg.solve(products, inputs.T @ outputs).T
