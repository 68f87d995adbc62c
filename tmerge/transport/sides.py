"""What a solver is given: the two models' features, and whom to tell how far it is."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from tmerge.calibration import FeatureStore
from tmerge.models import feature_key
from tmerge.transport.agreement import ReadWeight
from tmerge.transport.heads import Heads

__all__ = ["HEAD_KEYS", "STREAM_KEYS", "Heard", "Read", "Side", "feature_keys"]

STREAM_KEYS = ("qkv.pre", "mlp.pre", "o.post", "down.post")
"""Features whose neurons are those of the residual stream: what is read from it and what is written to it."""
HEAD_KEYS = ("q.post", "k.post", "v.post", "o.pre")
"""Features whose neurons are those of a layer's attention heads."""

Read = Callable[[int, str], Tensor]
"""(layer, feature key) -> (T, n) features of one model."""


class Heard(Protocol):
    """Whoever hears of a solver's steps; may raise to stop."""

    def __call__(self, what: str, done: int, total: int, unit: str, row: tuple[str, int, Tensor] | None = None) -> None:
        """Hear of a step.

        Args:
            what: In words: what is being done.
            done: Units done.
            total: Units in all.
            unit: ``layers``, ``problems``.
            row: (feature key, target layer, its (M,) costs), where a row of costs has come in.
        """


@dataclass(frozen=True)
class Side:
    """One model, as far as its features tell, and its weights.

    Attributes:
        read: (layer, key) -> (T, n) features.
        keys: layer -> the feature keys it has.
        heads: layer -> how its attention divides; layers that are not named have none that is known.
        weights: (layer, projection) -> (out, in) weight; None where neurons are compared by their features alone.
        embedding: Reads (v, n) the embeddings of tokens that both models have, in one order; None where weights are, or
            where the two have no vocabulary in common.
    """

    read: Read
    keys: Mapping[int, Sequence[str]]
    heads: Mapping[int, Heads]
    weights: ReadWeight | None = None
    embedding: Callable[[], Tensor] | None = None

    @classmethod
    def of(cls, store: FeatureStore, heads: Mapping[str, Mapping[str, Any]]) -> Side:
        """A model whose features are on disk.

        Args:
            store: Its features.
            heads: layer -> facts, as `tmerge.models.head_facts` noted them when the model was read.
        """
        known_heads = {int(layer): Heads.of(facts) for layer, facts in heads.items()}
        return cls(store.get, {layer: store.keys(layer) for layer in store.layers}, known_heads)

    def layers_with(self, key: str) -> tuple[int, ...]:
        """The layers that have a feature, ascending."""
        return tuple(layer for layer in sorted(self.keys) if key in self.keys[layer])


def feature_keys(projections: Sequence[str]) -> list[str]:
    """Feature keys of some projections, each once, in their order."""
    return list(dict.fromkeys(feature_key(name, side) for name in projections for side in ("pre", "post")))
