"""Phi_out and Phi_in of one target layer, as weights meet them: in the recipe's scale and units, plain or shuffled."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Protocol

from torch import Tensor

from tmerge.fusion.maps import Units, scaled, unit_factors
from tmerge.transport import FeatureMap, FeatureStatistics, Statistics
from tmerge.transport.maps import Scale

__all__ = ["LayerPhis", "Phis", "ShuffledPhis"]


class Phis(Protocol):
    """Where the maps of a target layer come from."""

    def out(self, key: str, source_layer: int) -> Tensor:
        """(n, n') Phi_out of a feature, from a source layer."""
        ...

    def into(self, key: str, source_layer: int) -> Tensor:
        """(n', n) Phi_in of a feature, to a source layer."""
        ...


class LayerPhis:
    """The maps of one target layer. q, k and v ask for the same ones, so each is kept while its layer is worked on.

    Args:
        maps: By feature key and source layer.
        statistics: Of the features, for `units`.
        scale: As for `tmerge.transport.maps.phi_out`.
        units: As for `unit_factors`.
    """

    def __init__(
        self, maps: Mapping[tuple[str, int], FeatureMap], statistics: Statistics, scale: Scale, units: Units
    ) -> None:
        self._maps, self._statistics, self._scale, self._units = maps, statistics, scale, units
        self._out: dict[tuple[str, int], Tensor] = {}
        self._into: dict[tuple[str, int], Tensor] = {}

    def out(self, key: str, source_layer: int) -> Tensor:
        """As `Phis.out`."""
        if (key, source_layer) not in self._out:
            target, source = self._of(key, source_layer)
            self._out[key, source_layer] = self._in_units(
                self._maps[key, source_layer].phi_out(self._scale), target, source
            )
        return self._out[key, source_layer]

    def into(self, key: str, source_layer: int) -> Tensor:
        """As `Phis.into`."""
        if (key, source_layer) not in self._into:
            target, source = self._of(key, source_layer)
            self._into[key, source_layer] = self._in_units(
                self._maps[key, source_layer].phi_in(self._scale), source, target
            )
        return self._into[key, source_layer]

    def _of(self, key: str, source_layer: int) -> tuple[FeatureStatistics, FeatureStatistics]:
        layer = self._maps[key, source_layer].target_layer
        return self._statistics.target[layer, key], self._statistics.source[source_layer, key]

    def _in_units(self, phi: Tensor, to: FeatureStatistics, of: FeatureStatistics) -> Tensor:
        return phi if self._units == "none" else scaled(phi, *unit_factors(to, of, self._units))


class ShuffledPhis:
    """The same maps with the target's neurons in another order, for the `permuted` control.

    Args:
        phis: The maps.
        order: (feature key, n) -> a permutation (n,).
    """

    def __init__(self, phis: Phis, order: Callable[[str, int], Tensor]) -> None:
        self._phis, self._order = phis, order

    def out(self, key: str, source_layer: int) -> Tensor:
        """As `Phis.out`."""
        phi = self._phis.out(key, source_layer)
        return phi.index_select(0, self._order(key, phi.shape[0]))

    def into(self, key: str, source_layer: int) -> Tensor:
        """As `Phis.into`."""
        phi = self._phis.into(key, source_layer)
        return phi.index_select(1, self._order(key, phi.shape[1]))
