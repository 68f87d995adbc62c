"""Carrying a task vector's embeddings, head and norms: what lies on the residual stream beside the projections.

They meet the stream's correspondence on one side only. A norm's weights and an embedding's columns are outputs to the
stream, so Phi_out carries them; a head's columns read it, so Phi_in does. An embedding's rows are tokens, and stay what
they are where both models have one vocabulary; where the target's head is tied to its embedding, that one carries the
source's embedding, and what a head of the source's own learned stays behind; a head of the target's own takes what a
tied source learned in its one matrix. Norms of q and k, learned positions and a head's bias are left alone. Beside the
projections this carries much of what fine-tuning in another language changed (docs/experiments.md).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from tmerge.fusion.maps import after
from tmerge.fusion.merge import TransportedNeurons
from tmerge.models import EMBEDDING, HEAD, Architecture, Projection

__all__ = ["carry_stream"]


def carry_stream(
    target: Architecture,
    source: Architecture,
    source_base: Architecture,
    pairs: Mapping[int, int],
    maps: tuple[Tensor, Tensor],
    vocabulary: Tensor | None,
) -> Iterator[TransportedNeurons]:
    """The task vector of everything on the stream that both models have, one thing at a time.

    Args:
        target: The target.
        source: The source.
        source_base: The source before its fine-tuning.
        pairs: target layer -> source layer, whose norms are held against each other by name.
        maps: (n, n') Phi_out and (n', n) Phi_in of the stream, dense or sparse.
        vocabulary: (2, V) ids in the target and in the source of the tokens that both have; None leaves embeddings and
            head alone.
    """
    out_map, in_map = maps
    last = {len(target.layers): len(source.layers)}
    for layer, source_layer in {**pairs, **last}.items():
        for name, view in target.stream[layer].items():
            read, base = (_view(model, source_layer, name) for model in (source, source_base))
            if read is None or base is None or (name in (EMBEDDING, HEAD) and vocabulary is None):
                continue
            if name in (EMBEDDING, HEAD):
                assert vocabulary is not None
                rows = min(read.out_features, base.out_features)
                neurons, counterparts = vocabulary[:, (vocabulary[0] < view.out_features) & (vocabulary[1] < rows)]
            else:
                neurons, counterparts = torch.arange(view.out_features), torch.arange(read.out_features)
            learned = read.weight()[counterparts].float().cpu() - base.weight()[counterparts].float().cpu()
            if name == EMBEDDING:
                learned *= source.embedding_scale / target.embedding_scale
            if name == HEAD:
                weight = after(learned, in_map)
            elif name == EMBEDDING:
                weight = after(learned, out_map.t())
            else:
                # A gain: of a neuron that is matched with its negative, the gain is the same.
                weight = out_map.abs() @ learned
            bias = None
            target_bias, source_bias, base_bias = view.bias(), read.bias(), base.bias()
            if (
                name not in (EMBEDDING, HEAD)
                and target_bias is not None
                and source_bias is not None
                and base_bias is not None
            ):
                bias = out_map @ (source_bias.float().cpu() - base_bias.float().cpu())
            yield TransportedNeurons(layer, name, neurons, weight.contiguous(), bias, True)


def _view(model: Architecture, layer: int, name: str) -> Projection | None:
    """What goes by a name; the head of a model that ties it to its embedding is that embedding."""
    views = model.stream[layer]
    return views.get(name) or (views.get(EMBEDDING) if name == HEAD else None)
