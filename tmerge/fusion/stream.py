"""Carrying a task vector's embeddings, head and norms: what it changes beside the projections.

Most meet the stream's correspondence, on one side only. A norm's weights and an embedding's columns are outputs to the
stream, so Phi_out carries them; a head's columns read it, so Phi_in does. An embedding's rows are tokens, and stay what
they are where both models have one vocabulary; where the target's head is tied to its embedding, that one carries the
source's embedding, and what a head of the source's own learned stays behind; a head of the target's own takes what a
tied source learned in its one matrix. Beside the projections this carries much of what fine-tuning in another language
changed (docs/experiments.md).

A norm of q or k goes by the correspondence of their outputs. One that all heads share is read as if each had its own,
and of what the target's heads are given the mean is taken. Learned positions and a head's bias are left alone.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping

import torch
from torch import Tensor

from tmerge.fusion.maps import after, unmatched
from tmerge.fusion.merge import TransportedNeurons
from tmerge.models import EMBEDDING, HEAD, HEAD_NORMS, Architecture, Projection

__all__ = ["carry_stream"]


def carry_stream(
    target: Architecture,
    source: Architecture,
    source_base: Architecture,
    pairs: Mapping[int, int],
    maps: tuple[Tensor, Tensor],
    vocabulary: Tensor | None,
    head_map: Callable[[str, int, int], Tensor | None],
    changed: Collection[str] | None = None,
) -> Iterator[TransportedNeurons]:
    """The task vector of everything beside the projections that both models have, one thing at a time.

    Args:
        target: The target.
        source: The source.
        source_base: The source before its fine-tuning.
        pairs: target layer -> source layer, whose norms are held against each other by what they do.
        maps: (n, n') Phi_out and (n', n) Phi_in of the stream, dense or sparse.
        vocabulary: (2, V) ids in the target and in the source of the tokens that both have; None leaves embeddings and
            head alone.
        head_map: (``q`` or ``k``, target layer, source layer) -> (n, n') Phi_out of its outputs; None where these are
            not carried, which leaves their norm alone.
        changed: Names of the source's parameters that are other than the base's, where that is known; all may be if
            None. What has none of them learned nothing, and is not carried.
    """
    out_map, in_map = maps
    last = {len(target.layers): len(source.layers)}
    for layer, source_layer in {**pairs, **last}.items():
        for name, view in target.stream[layer].items():
            read, base = (_view(model, source_layer, name) for model in (source, source_base))
            if read is None or base is None or (changed is not None and not {*read.parameters} & {*changed}):
                continue
            neurons, bias = torch.arange(view.out_features), None
            if name in (EMBEDDING, HEAD):
                if vocabulary is None:
                    continue
                rows = min(read.out_features, base.out_features)
                neurons, counterparts = vocabulary[:, (vocabulary[0] < view.out_features) & (vocabulary[1] < rows)]
                learned = _learned(read.weight_rows(counterparts), base.weight_rows(counterparts))
                if name == HEAD:
                    weight = after(learned * target.multipliers.weight_ratio(HEAD, source.multipliers), in_map)
                else:
                    weight = after(learned * (source.embedding_scale / target.embedding_scale), out_map.t())
            else:
                norm_map = head_map(HEAD_NORMS[name], layer, source_layer) if name in HEAD_NORMS else out_map
                if norm_map is None:
                    continue
                weight, bias = _carried_norm(view, read, base, norm_map)
            yield TransportedNeurons(layer, name, neurons, weight.contiguous(), bias, True)


def _learned(now: Tensor, before: Tensor) -> Tensor:
    return now.float().cpu() - before.float().cpu()


def _carried_norm(
    view: Projection, read: Projection, base: Projection, out_map: Tensor
) -> tuple[Tensor, Tensor | None]:
    """(k, 1) what a norm's gains learned and (k,) its biases, through the map (n, n') of what it scales.

    The target's k are n, or a head's dimensions, which are then given the mean over the heads that have a counterpart.
    """
    heads, source_heads = out_map.shape[0] // view.out_features, out_map.shape[1] // read.out_features
    matched = (~unmatched(out_map, 0)).unflatten(0, (heads, -1)).sum(0).clamp_min(1)

    def through(mapping: Tensor, learned: Tensor) -> Tensor:
        return (mapping @ learned.repeat(source_heads)).unflatten(0, (heads, -1)).sum(0) / matched

    # A gain: of a neuron that is matched with its negative, the gain is the same.
    weight = through(out_map.abs(), _learned(read.weight()[:, 0], base.weight()[:, 0])).unsqueeze(1)
    source_bias, base_bias = read.bias(), base.bias()
    if not view.has_bias or source_bias is None or base_bias is None:
        return weight, None
    return weight, through(out_map, _learned(source_bias, base_bias))


def _view(model: Architecture, layer: int, name: str) -> Projection | None:
    """What goes by a name; the head of a model that ties it to its embedding is that embedding."""
    views = model.stream[layer]
    return views.get(name) or (views.get(EMBEDDING) if name == HEAD else None)
