"""Carrying a whole source over: from a transport to transported neurons, layer by layer.

Each target layer's maps are built, serve every fused projection's selected neurons, and go: a plan exists in full only
while its layer is worked on, and so do the transported neurons, where the caller takes them layer by layer. What later
pictures and later fusions need of a plan is gathered for the run's `TransportRecord` as it goes.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from tmerge.fusion.merge import CPU, TransportedNeurons, read_neurons
from tmerge.fusion.phis import LayerPhis, ShuffledPhis
from tmerge.fusion.projection import Carrier
from tmerge.fusion.selection import COLUMN_PROJECTIONS
from tmerge.fusion.stream import carry_stream
from tmerge.models import STREAM, Architecture, Projection, feature_key
from tmerge.processes import ALONE, Processes
from tmerge.recipe import CarriedSettings
from tmerge.transport import PlanRecorder, Transport, in_turn, one_thread_each
from tmerge.transport.record import Part, read_part, write_part

__all__ = ["Carried", "carry", "norm_ratio"]

Shuffle = Callable[[int, str, int], Tensor]
"""(layer, feature key, n) -> a permutation (n,) of the target's neurons."""

Keep = Callable[[Sequence[TransportedNeurons], Sequence[TransportedNeurons]], None]
"""Takes what was transported of a layer, and the same through shuffled plans, in the order of layers."""


@dataclass
class Carried:
    """What `carry` gives.

    Attributes:
        transported: One item per fused layer and projection, by layer; empty where they were handed over.
        permuted: The same through plans whose target neurons are shuffled; empty unless asked for.
        stream: Names of what else was carried: embeddings, head and norms.
        norm_ratios: projection -> one number per fused layer: transported over own norm of the selected neurons; None
            where the target's own are all zero.
        biases: projection -> what became of its bias, in words.
        tensors: For the run's record: the transport's layers and plans, and the selected neurons.
    """

    transported: list[TransportedNeurons] = field(default_factory=list)
    permuted: list[TransportedNeurons] = field(default_factory=list)
    stream: set[str] = field(default_factory=set)
    norm_ratios: dict[str, list[float | None]] = field(default_factory=dict)
    biases: dict[str, str] = field(default_factory=dict)
    tensors: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class _CarriedLayer:
    """One target layer's share of `Carried`, and of the record."""

    transported: list[TransportedNeurons]
    permuted: list[TransportedNeurons]
    recorded: Part


@dataclass(frozen=True)
class _ProjectionNote:
    """What is told of one layer's projection.

    Attributes:
        norm_ratio: Transported over own norm of the selected neurons.
        bias: What became of its bias.
        neurons: That were selected.
    """

    norm_ratio: float | None
    bias: str
    neurons: Tensor


_LayerNote = dict[str, _ProjectionNote]


def carry(
    target: Architecture,
    source: Architecture,
    transport: Transport,
    fusion: CarriedSettings,
    *,
    source_base: Architecture | None = None,
    shuffle: Shuffle | None = None,
    vocabulary: Tensor | None = None,
    changed: Collection[str] | None = None,
    device: torch.device = CPU,
    keep: Keep | None = None,
    scratch: Path | None = None,
    processes: Processes = ALONE,
    progress: Callable[[int, int], None] | None = None,
    note: Callable[[str], None] | None = None,
) -> Carried:
    """Transport every fused projection of every target layer (Eq. 13-14 up to alpha).

    At most one target layer a worker is worked on, and one more is waiting: with `keep` and `scratch`, memory does not
    grow with the number of layers.

    Args:
        target: Read for norms and shapes; nothing is written here.
        source: Its weights are what is transported.
        transport: From the source to the target, of the projections to be fused.
        fusion: The recipe's section.
        source_base: For task vectors: the source before its fine-tuning.
        shuffle: For the `permuted` control.
        vocabulary: With ``fusion.stream``: (2, V) ids in the target and in the source of tokens that both have.
        changed: With ``fusion.stream``, as for `carry_stream`.
        device: Where weights meet dense maps (`tmerge.fusion.merge.transport_neurons`).
        keep: Is handed each layer's neurons, which are let go then; None keeps all of them in the result.
        scratch: A folder to gather the record's tensors in; to be removed once they are written elsewhere. Several
            processes need one.
        processes: Among whom the target's layers are shared out; each calls this and keeps what it transported. What
            else is told of them all have, but for the record's tensors, which the first has.
        progress: Called with (layers done, all); may raise to stop.
        note: Told that some of it had no room on the device.
    """
    carrier = Carrier(target, source, source_base, transport, fusion, device, note)
    recorder, layers = PlanRecorder(transport, scratch), processes.mine(transport.target_layers)
    carried, noted = Carried(), list[_LayerNote]()
    statistics = transport.statistics  # read once, here, and not by every worker

    def hand_over(transported: Sequence[TransportedNeurons], permuted: Sequence[TransportedNeurons]) -> None:
        if keep is not None:
            keep(transported, permuted)
            return
        carried.transported += transported
        carried.permuted += permuted

    def work(layer: int) -> _CarriedLayer:
        maps = transport.feature_maps(layer)
        phis = LayerPhis(maps, statistics, fusion.scale, fusion.units)
        projections = transport.projections_of(layer)
        transported = [carrier.carried(layer, projection, phis) for projection in projections]
        permuted = []
        if shuffle is not None:
            shuffled = ShuffledPhis(phis, partial(shuffle, layer))
            permuted = [carrier.carried(layer, projection, shuffled) for projection in projections]
        return _CarriedLayer(transported, permuted, recorder.part(maps.values()))

    def take(layer: int, carried_layer: _CarriedLayer) -> None:
        noted.append({item.projection: _note(carrier, item) for item in carried_layer.transported})
        hand_over(carried_layer.transported, carried_layer.permuted)
        if processes.count == 1:
            recorder.add(carried_layer.recorded)
        else:
            assert scratch is not None
            write_part(carried_layer.recorded, scratch / f"{layer}.part")
        if progress is not None:
            progress(layers.index(layer) + 1, len(layers))

    with one_thread_each(device) as workers:
        in_turn(work, layers, workers, take)
    of_layers = processes.of_all(noted)
    if processes.is_first and processes.count > 1 and scratch is not None:
        for layer in transport.target_layers:
            recorder.add(read_part(scratch / f"{layer}.part"))
    if processes.is_first:
        carried.tensors = recorder.tensors()
    for projection in transport.layer_maps:
        notes = [layer_note[projection] for layer_note in of_layers if projection in layer_note]
        carried.norm_ratios[projection] = [note.norm_ratio for note in notes]
        carried.biases[projection] = notes[0].bias
        carried.tensors[f"neurons.{projection}"] = torch.stack([note.neurons for note in notes])
    if fusion.carries_stream:
        assert source_base is not None  # the recipe sees to it
        models = target, source, source_base

        def carry_streams() -> set[str]:
            names = set()
            for item in _carried_stream(models, transport, fusion, vocabulary, changed, None):
                names.add(item.projection)
                hand_over([item], [])
            if shuffle is not None:
                for item in _carried_stream(models, transport, fusion, vocabulary, changed, shuffle):
                    hand_over([], [item])
            return names

        carried.stream = processes.from_first(carry_streams)
    return carried


def _note(carrier: Carrier, transported_neurons: TransportedNeurons) -> _ProjectionNote:
    view = carrier.target.layers[transported_neurons.layer][transported_neurons.projection]
    return _ProjectionNote(
        norm_ratio(view, transported_neurons),
        carrier.bias_fate(view, transported_neurons.neurons),
        transported_neurons.neurons.to(torch.int32),
    )


def norm_ratio(view: Projection, transported_neurons: TransportedNeurons) -> float | None:
    """Norm of what was transported over that of the target's own neurons; None where these are all zero."""
    own = torch.linalg.vector_norm(read_neurons(view, transported_neurons.neurons))
    ratio = torch.linalg.vector_norm(transported_neurons.weight.cpu().double()) / own.cpu().double()
    # Blocks that were added to a model begin with zeros, and over nothing there is no ratio.
    return float(ratio) if own else None


def _carried_stream(
    models: tuple[Architecture, Architecture, Architecture],
    transport: Transport,
    fusion: CarriedSettings,
    vocabulary: Tensor | None,
    changed: Collection[str] | None,
    shuffle: Shuffle | None,
) -> Iterator[TransportedNeurons]:
    """The task vector of what lies beside the projections; the stream's one correspondence carries most of it."""
    pairs: dict[int, int] = {}
    for layer_map in transport.layer_maps.values():
        for layer in layer_map.target_layers:
            pairs.setdefault(layer, layer_map.sources(layer)[0])
    projection, first_map = next(iter(transport.layer_maps.items()))
    first_layer = first_map.target_layers[0]
    key = feature_key(projection, "post" if projection in COLUMN_PROJECTIONS else "pre")
    feature_map = transport.feature_map(first_layer, key, pairs[first_layer])
    out_map, in_map = feature_map.phi_out(fusion.scale), feature_map.phi_in(fusion.scale)
    if shuffle is not None:
        order = shuffle(-1, STREAM, out_map.shape[0])
        out_map, in_map = out_map.index_select(0, order), in_map.index_select(1, order)

    def head_map(name: str, layer: int, source_layer: int) -> Tensor | None:
        if name not in transport.layer_maps or layer not in transport.layer_maps[name].target_layers:
            return None
        key = feature_key(name, "post")
        mapping = transport.feature_map(layer, key, source_layer).phi_out(fusion.scale)
        return mapping if shuffle is None else mapping.index_select(0, shuffle(layer, key, mapping.shape[0]))

    return carry_stream(*models, pairs, (out_map, in_map), vocabulary, head_map, changed)
