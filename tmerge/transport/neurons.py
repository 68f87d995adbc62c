"""The neurons of paired layers: the residual stream's, one correspondence for all layers, heads' and MLPs'.

The stream is solved from the correlations of all pairs' stream features together, and of the embeddings. Through it the
weights of a pair's heads and MLP neurons are compared beside their activations, and through these the stream's in turn
(`tmerge.transport.agreement`), where both sides have weights.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from tmerge.errors import NoSharedStructureError
from tmerge.models import PROJECTIONS, SIDES, feature_key
from tmerge.processes import ALONE, Processes
from tmerge.transport.agreement import add_cosines
from tmerge.transport.cost import standardise
from tmerge.transport.heads import match_heads
from tmerge.transport.matching import MATCHING, Correspondence, Solver
from tmerge.transport.sides import HEAD_KEYS, STREAM_KEYS, Side

__all__ = ["match_neurons", "match_stream"]

_MLP_KEYS = ("gate.post", "up.post", "down.pre")


def match_stream(
    target: Side,
    source: Side,
    pairs: Mapping[int, int],
    solver: Solver = MATCHING,
    *,
    processes: Processes = ALONE,
) -> tuple[Correspondence, Tensor]:
    """The residual stream's correspondence by activations, and by embeddings where both sides have them.

    An embedding is what a layer reads from the stream, of every token of the vocabulary and not of some texts: it says
    which neuron is which where a target's training has spoilt its activations.

    Args:
        target: The target.
        source: The source.
        pairs: target layer -> source layer.
        solver: Of the problem.
        processes: Among whom the pairs are shared out; each calls this and is given all.

    Returns:
        The correspondence, and the (n, n') similarities that it was solved from: mean correlations of the activations,
        and, as much as these, the correlations of the embeddings over tokens.

    Raises:
        NoSharedStructureError: As `match_neurons`.
    """
    total = _Sum()
    for layer, source_layer in processes.mine(list(pairs.items())):
        for key in filter(STREAM_KEYS.__contains__, _common(target, source, layer, source_layer)):
            total.add(_correlation(target.read(layer, key), source.read(source_layer, key)), f"{key} of layer {layer}")
    alike = total.of_all(processes)
    if alike is None:
        raise NoSharedStructureError(
            "no pair of layers reads or writes a residual stream; set transport.structure: none"
        )
    if target.embedding is not None and source.embedding is not None:
        alike = alike.add_(_correlation(target.embedding(), source.embedding())).div_(2)
    return solver.either_sign(alike), alike


def match_neurons(
    target: Side,
    source: Side,
    pairs: Mapping[int, int],
    solver: Solver = MATCHING,
    *,
    stream: tuple[Correspondence, Tensor] | None = None,
    progress: Callable[[int, int], None] | None = None,
    processes: Processes = ALONE,
) -> tuple[Correspondence, dict[tuple[int, str], Correspondence]]:
    """The residual stream's correspondence, and each layer pair's of heads and MLP neurons.

    Args:
        target: The target.
        source: The source.
        pairs: target layer -> source layer.
        solver: Of every problem.
        stream: What `match_stream` gives of these pairs, where that is known.
        progress: Called with (layers done, all); may raise to stop.
        processes: Among whom the pairs are shared out; each calls this and is given all.

    Raises:
        NoSharedStructureError: What a model reads from its residual stream and what it writes differ in width, or no
            pair of layers does either.
    """
    found_stream, alike = stream or match_stream(target, source, pairs, solver, processes=processes)
    mine = processes.mine(list(pairs.items()))
    inner: dict[tuple[int, str], Correspondence] = {}
    of_all_layers, by_weights = dict.fromkeys(STREAM_KEYS, found_stream), _Sum()
    for done, (layer, source_layer) in enumerate(mine, start=1):
        keys = _common(target, source, layer, source_layer)
        compare = _by_weights(target, source, layer, source_layer, keys)

        def similar(
            key: str, layer: int = layer, source_layer: int = source_layer, compare: _ByWeights = compare
        ) -> Tensor:
            correlation = _correlation(target.read(layer, key), source.read(source_layer, key))
            # Where the correlations are: an MLP's similarities are the largest that is held.
            return correlation.div_(2) if compare(correlation, key, matched=of_all_layers) else correlation

        found = _layer(similar, keys, layer, source_layer, target, source, solver)
        inner |= {(layer, key): correspondence for key, correspondence in found.items()}
        for key in filter(STREAM_KEYS.__contains__, keys):
            cosines = torch.zeros_like(alike)
            if compare(cosines, key, matched=found):
                by_weights.add(cosines, f"{key} of layer {layer}")
        if progress is not None:
            progress(done, len(mine))
    cosines_of_all = by_weights.of_all(processes)
    if cosines_of_all is not None:
        found_stream = solver.either_sign((alike + cosines_of_all) / 2)
    if processes.count > 1:
        shares = processes.gathered(inner)
        together = {name: correspondence for some in shares for name, correspondence in some.items()}
        inner = dict(sorted(together.items(), key=lambda item: item[0][0]))
    return found_stream, inner


class _ByWeights(Protocol):
    """`add_cosines` of a pair of layers; nothing is added where a side has no weights."""

    def __call__(self, similarity: Tensor, key: str, *, matched: Mapping[str, Correspondence]) -> bool: ...


class _Sum:
    """The mean of similarities of the residual stream's neurons, taken one after the other."""

    def __init__(self) -> None:
        self._total: Tensor | None = None
        self._count = 0

    def add(self, similarity: Tensor, of: str) -> None:
        if self._total is not None and self._total.shape != similarity.shape:
            raise NoSharedStructureError(
                f"{of} has {tuple(similarity.shape)} neurons, other features of the residual stream "
                f"{tuple(self._total.shape)}: set transport.structure: none"
            )
        self._total = similarity if self._total is None else self._total.add_(similarity)
        self._count += 1

    def of_all(self, processes: Processes) -> Tensor | None:
        """The mean over what all processes have added; None where there is nothing."""
        if processes.count == 1:
            return None if self._total is None else self._total / self._count
        shares = processes.gathered((self._total, self._count))
        totals = [total for total, _ in shares if total is not None]
        if len({total.shape for total in totals}) > 1:
            raise NoSharedStructureError("the residual stream is of several widths: set transport.structure: none")
        return torch.stack(totals).sum(0) / sum(count for _, count in shares) if totals else None


def _common(target: Side, source: Side, layer: int, source_layer: int) -> list[str]:
    """The feature keys that a pair of layers has in common, in the target's order."""
    return [key for key in target.keys[layer] if key in source.keys[source_layer]]


def _by_weights(target: Side, source: Side, layer: int, source_layer: int, keys: Sequence[str]) -> _ByWeights:
    if target.weights is None or source.weights is None:
        return lambda similarity, key, *, matched: False
    read, read_source = target.weights, source.weights
    projections = [name for name in PROJECTIONS if all(feature_key(name, side) in keys for side in SIDES)]
    return lambda similarity, key, *, matched: add_cosines(
        similarity, key, projections, partial(read, layer), partial(read_source, source_layer), matched
    )


def _layer(
    alike: Callable[[str], Tensor],
    keys: Sequence[str],
    layer: int,
    source_layer: int,
    target: Side,
    source: Side,
    solver: Solver,
) -> dict[str, Correspondence]:
    """Everything of a pair of layers that is not the residual stream.

    An MLP's similarities, the widest by far, are made one after the other and summed where they are.
    """
    correspondences: dict[str, Correspondence] = {}
    heads = {key: alike(key) for key in HEAD_KEYS if key in keys}
    if heads and layer in target.heads and source_layer in source.heads:
        correspondences |= match_heads(heads, target.heads[layer], source.heads[source_layer], solver)
    else:
        correspondences |= {key: solver(values) for key, values in heads.items()}
    neurons = [key for key in keys if key in _MLP_KEYS]
    rest = [key for key in neurons if key != "gate.post"]
    if len(rest) < len(neurons) and solver.signed and rest:
        # Silu(gate) * up: up and down may both change sign, the gate may not.
        together = _summed(alike, rest)
        units = solver(alike("gate.post").add_(together.abs()).div_(len(neurons)))
        correspondences |= {key: units if key == "gate.post" else units.signed(together) for key in neurons}
    elif neurons:
        units = solver(_summed(alike, sorted(neurons, key="gate.post".__ne__)).div_(len(neurons)))
        correspondences |= dict.fromkeys(neurons, units)
    return correspondences


def _summed(alike: Callable[[str], Tensor], keys: Sequence[str]) -> Tensor:
    """The sum of some features' similarities, two of them in memory at a time."""
    summed = alike(keys[0])
    for key in keys[1:]:
        summed.add_(alike(key))
    return summed


def _correlation(target: Tensor, source: Tensor) -> Tensor:
    """(n, n') Pearson correlations."""
    return standardise(target).T @ standardise(source)
