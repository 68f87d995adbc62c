"""Which source layer each target layer is, before one correspondence is solved for all of them.

Two layers are as far apart as their neurons are from the nearest ones of the other side: the cost of semi-relaxed
transport without regularisation, in which every target neuron goes to the source neuron of least cost (Eq. 10 with the
source's marginal free and eps towards 0). It needs no iteration, so every pair of layers can be asked, and some of the
neurons and texts suffice. That layers follow one another in both models then settles what is nearly equal: neighbouring
layers of a residual stream are alike.

Neurons are compared by their activations; and by their weights, once it is known which neurons of the residual stream,
where these begin or end in every layer, stand for each other.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import normalize

from tmerge.models import PROJECTIONS, SIDES, feature_key
from tmerge.processes import ALONE, Processes
from tmerge.transport.agreement import neuron_weights
from tmerge.transport.cost import standardise
from tmerge.transport.matching import Correspondence
from tmerge.transport.order import in_order
from tmerge.transport.sides import HEAD_KEYS, STREAM_KEYS, Side

__all__ = [
    "PAIRING_NEURONS",
    "PAIRING_ROWS",
    "PAIRING_WEIGHTS",
    "ComparedLayers",
    "compare_layers",
    "nearest_cosines",
    "nearest_cost",
    "sampled",
]


PAIRING_ROWS, PAIRING_NEURONS, PAIRING_WEIGHTS = 512, 256, 64
"""What a target layer is known by, at most: rows of features, neurons of each, and of each projection by weights."""

# Bytes of source layers' samples, which each target layer is held against before the next ones are read: those of all
# layers of a deep and wide source are gigabytes.
_HELD = 2**29


@dataclass(frozen=True)
class ComparedLayers:
    """How alike the layers of two models are.

    Attributes:
        target: The target's L layers.
        source: The source's M layers.
        alike: (L, M) mean similarity of the target's neurons to the nearest ones; less 2 where the source's layer
            lacks something that the target's has.
        cost: Feature key -> (L, M) `nearest_cost` of the layers that have it.
        compared: Feature key -> (its target layers, its source layers).
    """

    target: Sequence[int]
    source: Sequence[int]
    alike: Tensor
    cost: Mapping[str, Tensor]
    compared: Mapping[str, tuple[tuple[int, ...], tuple[int, ...]]]

    @property
    def pairs(self) -> dict[int, int]:
        """Target layer -> source layer: the pairing in order that is most alike in all."""
        chosen = in_order(self.alike).tolist()
        return {layer: self.source[column] for layer, column in zip(self.target, chosen, strict=True)}

    def with_weights(self, cosines: Tensor) -> dict[int, int]:
        """The pairs by weights too, as much as by activations.

        Args:
            cosines: (L, M) from `nearest_cosines`. What could not be compared is as alike as all others are.
        """
        known = ~cosines.isnan()
        if not bool(known.any()):
            return self.pairs
        return replace(self, alike=self.alike + torch.where(known, cosines, cosines[known].mean())).pairs


def sampled(features: Tensor, *, neurons: int | None = None) -> Tensor:
    """Standardised columns over evenly spaced rows.

    Args:
        features: (T, n).
        neurons: Take evenly spaced columns, this many at most; all if None.
    """
    rows = features[:: -(-features.shape[0] // PAIRING_ROWS)]
    if neurons is not None:
        rows = rows[:, :: -(-features.shape[1] // neurons)]
    return standardise(rows)


def nearest_cost(target: Tensor, source: Tensor, *, signed: bool = False) -> float:
    """Mean over the target's neurons of 1 - correlation with the source neuron that is most like it, in [0, 1].

    Args:
        target: (T, n) from `sampled`.
        source: (T, n') likewise, over the same rows.
        signed: Whether a neuron's negative is as like it as the neuron itself.
    """
    # A neuron without a likeness is at cost 1, as one that never varies is.
    likeness = target.T @ source
    return float(1.0 - (likeness.abs() if signed else likeness).amax(1).clamp_min(0.0).mean())


def compare_layers(
    target: Side,
    source: Side,
    keys: Sequence[str],
    *,
    signed: bool = False,
    solved: Callable[[str, int, Tensor], None] | None = None,
    processes: Processes = ALONE,
) -> ComparedLayers:
    """Compare the layers by their features.

    Args:
        target: The target.
        source: The source.
        keys: Feature keys to compare.
        signed: Whether a neuron's negative is as like it as the neuron itself.
        solved: Called with (key, target layer, its (M,) costs); may raise to stop.
        processes: Among whom the target's layers are shared out; each calls this and is given all.
    """
    target_layers, source_layers = sorted(target.keys), sorted(source.keys)
    total = torch.zeros(len(target_layers), len(source_layers))
    counts = torch.zeros_like(total)
    cost, layers = {}, {}
    for key in keys:
        rows = [layer for layer in target_layers if key in target.keys[layer]]
        columns = [layer for layer in source_layers if key in source.keys[layer]]
        found: dict[int, list[float]] = {layer: [] for layer in processes.mine(rows)}
        for held in _in_turn(source, key, columns):
            for layer, of_layer in found.items():
                sampled_target = layer_features(target.read(layer, key))
                of_layer += [nearest_cost(sampled_target, of_source, signed=signed) for of_source in held]
                if solved is not None and len(of_layer) == len(columns):
                    solved(key, layer, torch.tensor(of_layer, dtype=torch.float64))
            del held[:]  # before the next are read
        of_all = processes.of_all(list(found.values()))
        costs = torch.tensor(of_all, dtype=torch.float64).reshape(len(rows), len(columns))
        cost[key], layers[key] = costs, (tuple(rows), tuple(columns))
        entries = (
            torch.tensor([target_layers.index(layer) for layer in rows], dtype=torch.int64)[:, None],
            torch.tensor([source_layers.index(layer) for layer in columns], dtype=torch.int64),
        )
        total[entries] += 1.0 - costs.float()
        counts[entries] += 1.0
    # A source layer that lacks a feature of the target's layer cannot feed it: it is taken only where none is left.
    lacking = torch.tensor(
        [
            [any(key in target.keys[a] and key not in source.keys[b] for key in keys) for b in source_layers]
            for a in target_layers
        ]
    )
    return ComparedLayers(target_layers, source_layers, total / counts.clamp_min(1.0) - 2.0 * lacking, cost, layers)


def _in_turn(source: Side, key: str, layers: Sequence[int]) -> Iterator[list[Tensor]]:
    """The layers' samples, as many at once as there is room for, at least one."""
    held: list[Tensor] = []
    for layer in layers:
        held.append(sampled(source.read(layer, key)))
        if sum(sample.nbytes for sample in held) >= _HELD:
            yield held
            held = []
    if held or not layers:
        yield held


def layer_features(features: Tensor) -> Tensor:
    """What a target layer is known by."""
    return sampled(features, neurons=PAIRING_NEURONS)


def nearest_cosines(
    target: Side,
    source: Side,
    stream: Correspondence,
    *,
    pairs: Mapping[int, int] | None = None,
    signed: bool = False,
    progress: Callable[[int, int], None] | None = None,
    processes: Processes = ALONE,
) -> Tensor:
    """How alike the weights of every pair of layers are.

        mean_p mean_i max_j cos(a_pi, b_pj)

    over the projections p of both layers' attention, some neurons i of the target's and all neurons j of the source's,
    whose weights to or from the residual stream, a_pi and b_pj, are in the order of the target's stream. A layer
    without attention is known by what else it has.

    Args:
        target: The target; it has weights, and so has the source.
        source: The source. Each of its weights is read once, one at a time.
        stream: The residual stream's correspondence.
        pairs: target layer -> source layer, where these alone are compared; every layer with every one if None.
        signed: Whether a neuron's negative is as like it as the neuron itself.
        progress: Called with (the source's projections read, all); may raise to stop.
        processes: Among whom the source's layers are shared out; each calls this and is given all.

    Returns:
        (L, M) in [-1, 1]; NaN where two layers have nothing in common, or are not compared.
    """
    assert target.weights is not None and source.weights is not None
    own, theirs = sorted(target.keys), sorted(source.keys)
    asked = [{layer: _asked(side, layer) for layer in layers} for side, layers in ((target, own), (source, theirs))]
    names = [name for name in PROJECTIONS if any(name in of for of in asked[0].values())]
    mine, done = processes.mine(theirs), itertools.count(1)
    total = torch.zeros(len(mine), len(own))
    counts = torch.zeros_like(total)
    for name in names:
        by_columns = feature_key(name, "post") in STREAM_KEYS
        known: list[Tensor | None] = [None] * len(own)
        for row, layer in enumerate(own):
            if name in asked[0][layer]:
                weights = neuron_weights(target.weights(layer, name), by_columns)
                known[row] = normalize(weights[:: -(-len(weights) // PAIRING_WEIGHTS)])
        for column, source_layer in enumerate(mine):
            met = [row for row, layer in enumerate(own) if pairs is None or pairs[layer] == source_layer]
            if name in asked[1][source_layer] and met:
                weights = normalize(neuron_weights(source.weights(source_layer, name), by_columns, stream))
                for row in met:
                    if (of_target := known[row]) is not None:
                        cosines = of_target @ weights.T
                        total[column, row] += (cosines.abs() if signed else cosines).amax(1).mean()
                        counts[column, row] += 1
                del weights
            if progress is not None:
                progress(next(done), len(names) * len(mine))
    return torch.stack(processes.of_all(list(total / counts))).T


def _asked(side: Side, layer: int) -> list[str]:
    """Projections by which a layer is known: a fifth of a large model's weights lie in its attention."""
    has = [name for name in PROJECTIONS if all(feature_key(name, of) in side.keys[layer] for of in SIDES)]
    return [name for name in has if any(feature_key(name, of) in HEAD_KEYS for of in SIDES)] or has
