"""Whether two models' neurons correspond at all, asked before anything is fused.

A matching always finds a partner for every neuron. Whether it found *the* partner shows when it is asked twice: the
calibration set is cut into two halves, each is matched by itself, and the share of the target's neurons that get the
same partner from both is the pair's **relatedness**. Between models with a common ancestor it is near one, whatever was
pruned, permuted or trained since; between strangers each half finds its own. The same with the source's rows shuffled,
so that nothing can correspond, says what chance alone gives.

Not all neurons are asked: of every layer that is looked at a few hundred are drawn, each with all of the source's to
choose from. So a wide model's question takes seconds instead of minutes, and the interval says what that costs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from tmerge.errors import NoSharedStructureError
from tmerge.processes import ALONE, Processes
from tmerge.transport.matching import Correspondence
from tmerge.transport.neurons import match_neurons
from tmerge.transport.sides import STREAM_KEYS, Side

__all__ = ["ASKED_LAYERS", "ASKED_NEURONS", "Relatedness", "relatedness"]

_MLP_KEYS = ("gate.post", "up.post", "down.pre")
ASKED_LAYERS = 8
"""Layers whose MLPs are matched, evenly spaced; the stream is one problem for all layers that are looked at."""
ASKED_NEURONS = 512
"""Neurons of the target's that are drawn of each such MLP, and of the stream."""
_Z = 1.959963984540054  # of a 95 % interval


@dataclass(frozen=True)
class Relatedness:
    """Shares of the target's neurons, from 0 to 1.

    Attributes:
        value: That both halves match alike: mean of `stream` and `mlp`.
        ci95: Of `value`, over the neurons that were not drawn.
        permuted: The same with the source's rows shuffled: what chance gives.
        stream: Of the residual stream's neurons.
        mlp: Of the MLPs' neurons; None where no MLP's features were read.
        rows: Rows of each half.
        neurons: Of the target's that were asked, in all.
    """

    value: float
    ci95: tuple[float, float]
    permuted: float
    stream: float
    mlp: float | None
    rows: int
    neurons: int

    def to_dict(self) -> dict[str, Any]:
        """As the report holds it."""
        return asdict(self)


def relatedness(
    target: Side,
    source: Side,
    pairs: Mapping[int, int],
    rows: int,
    *,
    seed: int,
    processes: Processes = ALONE,
    progress: Callable[[int, int], None] | None = None,
) -> Relatedness:
    """Match the two halves of the rows and compare.

    Args:
        target: The target.
        source: The source.
        pairs: target layer -> source layer.
        rows: T.
        seed: Of the shuffled rows, and of the neurons that are drawn.
        processes: Among whom the four matchings are shared out; each calls this and is given the answer.
        progress: Called with (problems done, all); may raise to stop.

    Raises:
        NoSharedStructureError: As `match_neurons`.
    """
    sampled = torch.linspace(0, len(pairs) - 1, min(ASKED_LAYERS, len(pairs))).round().long().unique().tolist()
    sampled_pairs = dict(list(pairs.items())[number] for number in sampled)
    half = rows // 2
    draw = torch.Generator().manual_seed(seed)
    asked = _Drawn(target, list(sampled_pairs), draw)
    # Two halves as they are, and two of them with the source's rows shuffled.
    halves = [torch.arange(start, start + half) for start in (0, half)]
    problems = [(rows, rows) for rows in halves]
    problems += [(rows, rows[torch.randperm(half, generator=draw)]) for rows in halves]
    mine, solved, lacking = processes.mine(problems), [], None
    for target_rows, source_rows in mine:
        of_target, of_source = asked.part(target, target_rows), _part(source, source_rows)
        try:
            solved.append(match_neurons(of_target, of_source, sampled_pairs))
        except NoSharedStructureError as error:
            lacking = str(error)
            break
        if progress is not None:
            progress(len(solved), len(mine))
    # All of them learn of it, those too that had no problem to solve.
    for words in processes.gathered(lacking):
        if words is not None:
            raise NoSharedStructureError(words)
    solved = processes.of_all(solved)
    shares: list[_Shares] = []
    for (stream, inner), (second_stream, second_inner) in (solved[:2], solved[2:]):
        # One feature of an MLP's speaks for all three: they are matched together.
        firsts = {layer: (layer, key) for layer, key in reversed(list(inner))}
        mlp = [_agreement(inner[feature], second_inner[feature]) for feature in firsts.values()]
        shares.append(_Shares(_agreement(stream, second_stream), torch.cat(mlp) if mlp else None))
    answered, by_chance = shares
    return Relatedness(
        value=answered.value,
        ci95=answered.interval(asked.stream_width, asked.mlp_neurons),
        permuted=by_chance.value,
        stream=_share(answered.stream),
        mlp=None if answered.mlp is None else _share(answered.mlp),
        rows=half,
        neurons=len(answered.stream) + (0 if answered.mlp is None else len(answered.mlp)),
    )


class _Drawn:
    """The target's neurons that are asked.

    Attributes:
        stream_width: Neurons of its stream in all.
        mlp_neurons: Of the MLPs that are looked at, in all.
    """

    def __init__(self, target: Side, layers: Sequence[int], draw: torch.Generator) -> None:
        self.stream_width = self.mlp_neurons = 0
        self._stream: Tensor | None = None
        self._mlp: dict[int, Tensor] = {}
        for layer in layers:
            for key in target.keys[layer]:
                if key in STREAM_KEYS and self._stream is None:
                    self.stream_width = target.read(layer, key).shape[1]
                    self._stream = _some(self.stream_width, draw)
                elif key in _MLP_KEYS and layer not in self._mlp:
                    width = target.read(layer, key).shape[1]
                    self.mlp_neurons += width
                    self._mlp[layer] = _some(width, draw)

    def part(self, target: Side, rows: Tensor) -> Side:
        """Some rows of the target, and of them the neurons that are asked."""
        of_rows = _part(target, rows)

        def read(layer: int, key: str) -> Tensor:
            neurons, features = self._stream if key in STREAM_KEYS else self._mlp[layer], of_rows.read(layer, key)
            assert neurons is not None
            if key in STREAM_KEYS and features.shape[1] != self.stream_width:
                raise NoSharedStructureError(
                    f"{key} of layer {layer} has {features.shape[1]} neurons, other features of the residual stream "
                    f"{self.stream_width}: set transport.structure: none"
                )
            return features[:, neurons]

        return Side(read, of_rows.keys, {})


def _some(width: int, draw: torch.Generator) -> Tensor:
    """Numbers of neurons, ascending."""
    return torch.randperm(width, generator=draw)[:ASKED_NEURONS].sort().values


@dataclass(frozen=True)
class _Shares:
    """Which neurons both halves match alike: (n,) truth values, of the stream and of the MLPs."""

    stream: Tensor
    mlp: Tensor | None

    @property
    def value(self) -> float:
        return _share(self.stream) if self.mlp is None else (_share(self.stream) + _share(self.mlp)) / 2

    def interval(self, stream_width: int, mlp_neurons: int) -> tuple[float, float]:
        """95 % limits of `value`: Wilson's of each share, put together as Zou and Donner (2008) do."""
        asked = [(self.stream, stream_width)] + ([] if self.mlp is None else [(self.mlp, mlp_neurons)])
        limits = [_wilson(_share(alike), len(alike), width) for alike, width in asked]
        shares = [_share(alike) for alike, _ in asked]
        low = math.hypot(*(share - limit[0] for share, limit in zip(shares, limits, strict=True))) / len(shares)
        high = math.hypot(*(limit[1] - share for share, limit in zip(shares, limits, strict=True))) / len(shares)
        return max(0.0, self.value - low), min(1.0, self.value + high)


def _wilson(share: float, asked: int, of: int) -> tuple[float, float]:
    """95 % limits of a share among `asked` of `of`; where all were asked there is nothing to doubt."""
    if asked >= of:
        return share, share
    # As of a sample without replacement: fewer left out are less to doubt.
    number = asked * (of - 1) / (of - asked)
    middle = (share + _Z**2 / (2 * number)) / (1 + _Z**2 / number)
    reach = _Z * math.sqrt(share * (1 - share) / number + _Z**2 / (4 * number**2)) / (1 + _Z**2 / number)
    return max(0.0, min(share, middle - reach)), min(1.0, max(share, middle + reach))


def _part(side: Side, rows: Tensor) -> Side:
    """Some rows of a side, and of its MLPs one feature's neurons for all three."""
    keys = {layer: [key for key in of if key in STREAM_KEYS or key in _MLP_KEYS] for layer, of in side.keys.items()}
    return Side(lambda layer, key: side.read(layer, key)[rows], keys, {})


def _agreement(first: Correspondence, second: Correspondence) -> Tensor:
    partners, second_partners = first.partner(), second.partner()
    # Where one has none, there is nothing to agree on.
    return (partners == second_partners) & (partners >= 0)


def _share(alike: Tensor) -> float:
    return float(alike.double().mean())
