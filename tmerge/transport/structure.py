"""One correspondence for a whole model: transport that respects how a transformer is built (the paper's future work).

Solved apart, the plans of a projection's two sides know nothing of each other, or of the next layer's. But all layers
read and write one residual stream, q and k meet in a product, and an MLP neuron is one unit seen by gate, up and down.
So: layers are paired in order (`tmerge.transport.layers`); then one correspondence of the residual stream is solved,
and of each pair of layers one of its heads and one of its MLP neurons (`tmerge.transport.neurons`). Each is a problem
of Eq. 7-9 whose cost is a mean over features that must agree.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from safetensors.torch import load_file, safe_open
from torch import Tensor

from tmerge.documents import parse_json
from tmerge.processes import ALONE, Processes
from tmerge.store import write_tensors
from tmerge.transport.agreement import WeightAgreement
from tmerge.transport.layers import compare_layers, nearest_cosines
from tmerge.transport.matching import MATCHING, Correspondence, Solver
from tmerge.transport.neurons import match_neurons, match_stream
from tmerge.transport.sides import STREAM_KEYS, Heard, Side

__all__ = ["Structure", "find_structure"]

# Seed of the order that shows what chance gives.
_SHUFFLE = 0


@dataclass(frozen=True)
class Structure:
    """What `find_structure` finds.

    Attributes:
        pairs: target layer -> source layer.
        cost: Feature key -> (L, M) `nearest_cost` of the layers that have it.
        layers: Feature key -> (its target layers, its source layers).
        stream: The residual stream's correspondence, one for all layers.
        inner: (target layer, feature key) -> the correspondence with its pair's, of heads and MLP neurons.
        agreement: What the weights say of layers; None where they were not asked.
    """

    pairs: dict[int, int]
    cost: Mapping[str, Tensor]
    layers: Mapping[str, tuple[tuple[int, ...], tuple[int, ...]]]
    stream: Correspondence
    inner: dict[tuple[int, str], Correspondence]
    agreement: WeightAgreement | None = None

    def of(self, layer: int, key: str) -> Correspondence:
        """The correspondence of a target layer's feature."""
        return self.stream if key in STREAM_KEYS else self.inner[layer, key]

    @property
    def in_place(self) -> float | None:
        """The share of the target's neurons that are matched with the source's of the same number.

        None where the two models are not of one shape, or their layers not paired one by one.
        """
        shapes = {correspondence.shape for correspondence in self.problems}
        others = {layer for _, sources in self.layers.values() for layer in sources}
        if any(own != other for own, other in shapes) or others != self.pairs.keys():
            return None
        if any(layer != source for layer, source in self.pairs.items()):
            return None
        neurons = sum(correspondence.shape[0] for correspondence in self.problems)
        return sum(correspondence.in_place for correspondence in self.problems) / neurons

    @property
    def problems(self) -> list[Correspondence]:
        """All of them, the stream's once."""
        return [self.stream, *self.inner.values()]

    def save(self, path: Path) -> None:
        """Write to a temporary name, then rename."""
        tensors = {f"cost/{key}": cost.contiguous() for key, cost in self.cost.items()}
        correspondences = {"stream": self.stream} | {
            f"{layer}/{key}": correspondence for (layer, key), correspondence in self.inner.items()
        }
        facts = {}
        for name, correspondence in correspondences.items():
            # A layer's MLP features share one: each is written by itself.
            tensors |= {
                f"{name}/{field}": getattr(correspondence, field).clone() for field in ("rows", "columns", "values")
            }
            facts[name] = [*correspondence.shape, correspondence.iterations, correspondence.marginal_error]
        noted = {
            "pairs": list(self.pairs.items()),
            "layers": self.layers,
            "found": facts,
            "agreement": None if self.agreement is None else asdict(self.agreement),
        }
        write_tensors(path, tensors, {"structure": json.dumps(noted)})

    @classmethod
    def load(cls, path: Path) -> Structure:
        """Read what `save` wrote."""
        with safe_open(path, "pt") as stored:
            noted = parse_json(stored.metadata()["structure"])
        tensors = load_file(path)
        correspondences = {}
        for name, (n, m, sweeps, error) in noted["found"].items():
            rows, columns, values = (tensors[f"{name}/{field}"] for field in ("rows", "columns", "values"))
            correspondences[name] = Correspondence(rows, columns, values, (n, m), sweeps, error)
        stream = correspondences.pop("stream")
        inner = {
            (int(name.partition("/")[0]), name.partition("/")[2]): correspondence
            for name, correspondence in correspondences.items()
        }
        return cls(
            dict(map(tuple, noted["pairs"])),
            {key: tensors[f"cost/{key}"] for key in noted["layers"]},
            {key: (tuple(rows), tuple(columns)) for key, (rows, columns) in noted["layers"].items()},
            stream,
            inner,
            None if noted["agreement"] is None else WeightAgreement(**noted["agreement"]),
        )


def find_structure(
    target: Side,
    source: Side,
    keys: Sequence[str],
    solver: Solver = MATCHING,
    *,
    heard: Heard | None = None,
    processes: Processes = ALONE,
) -> Structure:
    """Pair the layers, and match the neurons of each pair.

    Where both sides have weights, layers are paired by these too if they are more alike than by chance, through the
    residual stream that the pairs suggest which activations find. Of a target without a third of its layers, on texts
    that it could not read, these were 8 of 20 pairs, and three quarters of the stream: enough for the weights to find
    all 20.

    Args:
        target: The target.
        source: The source.
        keys: Feature keys by which layers are compared.
        solver: Of every problem between neurons.
        heard: Hears of every layer; may raise to stop.
        processes: Among whom the work is shared out; each calls this and is given all.

    Raises:
        NoSharedStructureError: As `match_neurons`.
    """
    total = sum(len(processes.mine(target.layers_with(key))) for key in keys)
    done = itertools.count(1)

    def compared(key: str, layer: int, costs: Tensor) -> None:
        if heard is not None:
            heard(f"layers by {key}", next(done), total, "layers", (key, layer, costs))

    def hears_of(what: str, unit: str) -> Callable[[int, int], None] | None:
        return None if heard is None else lambda done, total: heard(what, done, total, unit)

    layers = compare_layers(target, source, keys, signed=solver.signed, solved=compared, processes=processes)

    def weigh(what: str, stream: Correspondence, pairs: Mapping[int, int] | None = None) -> Tensor:
        progress = hears_of(what, "projections")
        return nearest_cosines(
            target, source, stream, pairs=pairs, signed=solver.signed, progress=progress, processes=processes
        )

    pairs, agreement, begun = layers.pairs, None, None
    if target.weights is not None and source.weights is not None:
        begun = match_stream(target, source, pairs, solver, processes=processes)
        stream = begun[0]
        cosines = weigh("layers by weights", stream)
        by_weights = layers.with_weights(cosines)
        chance = weigh("layers by chance", stream.shuffled(_SHUFFLE), by_weights)
        # Some pairs may have nothing in common; where none has, nothing is said.
        compared_pairs = ~chance.isnan()
        if bool(compared_pairs.any()):
            moved = sum(pairs[layer] != other for layer, other in by_weights.items())
            paired, by_chance = (float(alike[compared_pairs].mean()) for alike in (cosines, chance))
            agreement = WeightAgreement(paired, by_chance, moved)
            if agreement.clear:
                pairs = by_weights
            else:
                agreement = replace(agreement, moved_layers=0)
    progress = hears_of("matching heads and neurons", "layers")
    # By activations the stream of the same pairs is the same.
    known = begun if pairs == layers.pairs else None
    stream, inner = match_neurons(target, source, pairs, solver, stream=known, progress=progress, processes=processes)
    if agreement is not None and agreement.clear:
        # Through the stream that is known now; what chance gives is the same through any.
        cosines = weigh("how alike their weights are", stream, pairs)
        agreement = replace(agreement, paired=float(cosines[~cosines.isnan()].mean()))
    return Structure(pairs, layers.cost, layers.compared, stream, inner, agreement)
