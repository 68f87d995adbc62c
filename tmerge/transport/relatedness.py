"""Whether two models' neurons correspond at all, asked before anything is fused.

A matching always finds a partner for every neuron. Whether it found *the* partner shows when it is asked twice: the
calibration set is cut into two halves, each is matched by itself, and the share of the target's neurons that get the
same partner from both is the pair's **relatedness**. Between models with a common ancestor it is near one, whatever was
pruned, permuted or trained since; between strangers each half finds its own. The same with the source's rows shuffled,
so that nothing can correspond, says what chance alone gives.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from tmerge.transport.matching import Correspondence
from tmerge.transport.sides import Side
from tmerge.transport.structure import STREAM_KEYS, solve_structure

__all__ = ["Relatedness", "relatedness"]

_MLP_KEYS = ("gate.post", "up.post", "down.pre")
# Layers whose MLPs are matched, evenly spaced; the stream is one problem for all layers that are looked at.
_LAYERS = 8


@dataclass(frozen=True)
class Relatedness:
    """Shares of the target's neurons, from 0 to 1.

    Attributes:
        value: That both halves match alike: mean of `stream` and `mlp`.
        permuted: The same with the source's rows shuffled: what chance gives.
        stream: Of the residual stream's neurons.
        mlp: Of the MLPs' neurons; None where no MLP's features were read.
        rows: Rows of each half.
    """

    value: float
    permuted: float
    stream: float
    mlp: float | None
    rows: int

    def to_dict(self) -> dict[str, float | int | None]:
        """As the report holds it."""
        return asdict(self)


def relatedness(
    target: Side,
    source: Side,
    pairs: Mapping[int, int],
    rows: int,
    *,
    seed: int,
    progress: Callable[[int, int], None] | None = None,
) -> Relatedness:
    """Match the two halves of the rows and compare.

    Args:
        target: The target.
        source: The source.
        pairs: target layer -> source layer.
        rows: T.
        seed: Of the shuffled rows.
        progress: Called with (problems done, all); may raise to stop.
    """
    sampled = torch.linspace(0, len(pairs) - 1, min(_LAYERS, len(pairs))).round().long().unique().tolist()
    sampled_pairs = [list(pairs.items())[number] for number in sampled]
    half = rows // 2
    draw = torch.Generator().manual_seed(seed)
    shares = []
    for shuffled in (False, True):
        halves = []
        for start in (0, half):
            target_rows = torch.arange(start, start + half)
            source_rows = target_rows[torch.randperm(half, generator=draw)] if shuffled else target_rows
            halves.append(solve_structure(_part(target, target_rows), _part(source, source_rows), dict(sampled_pairs)))
            if progress is not None:
                progress(len(halves) + 2 * shuffled, 4)
        (stream, inner), (second_stream, second_inner) = halves
        mlp = [_agreement(inner[feature], second_inner[feature]) for feature in inner]
        shares.append((_agreement(stream, second_stream), sum(mlp) / len(mlp) if mlp else None))
    (stream_share, mlp_share), by_chance = shares
    return Relatedness(_mean(stream_share, mlp_share), _mean(*by_chance), stream_share, mlp_share, half)


def _part(side: Side, rows: Tensor) -> Side:
    """Some rows of a side, and of its MLPs one feature's neurons for all three."""
    keys = {layer: [key for key in of if key in STREAM_KEYS or key in _MLP_KEYS] for layer, of in side.keys.items()}
    return Side(lambda layer, key: side.read(layer, key)[rows], keys, {})


def _agreement(first: Correspondence, second: Correspondence) -> float:
    partners, second_partners = first.partner(), second.partner()
    # Where one has none, there is nothing to agree on.
    return float(((partners == second_partners) & (partners >= 0)).double().mean())


def _mean(stream: float, mlp: float | None) -> float:
    return stream if mlp is None else (stream + mlp) / 2
