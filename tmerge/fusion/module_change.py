"""What fusing changes of each module that stores projections, as two thin factors: what a LoRA adapter holds.

The change of a module's weight is ``alpha * transported``, written where its projections' selected neurons lie; of
weights that were carried as differences and are of low rank it has one too (`tmerge.fusion.low_rank`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby

import torch
from torch import Tensor

from tmerge.errors import FusionError
from tmerge.fusion.low_rank import factors
from tmerge.fusion.merge import Alpha, TransportedNeurons, alpha_of
from tmerge.fusion.selection import COLUMN_PROJECTIONS
from tmerge.models import ModuleChange, Projection

__all__ = ["changed_together", "module_change", "unchanged_modules"]


def unchanged_modules(layers: Sequence[Mapping[str, Projection]], projections: Sequence[str]) -> Iterator[ModuleChange]:
    """No change, of every module that stores some of the projections."""
    seen = set[str]()
    for view in (layer[name] for layer in layers for name in projections if name in layer):
        if view.module_name not in seen:
            seen.add(view.module_name)
            yield ModuleChange(
                view.module_name, torch.zeros(view.rows.stored, 0), torch.zeros(0, view.in_features), None
            )


def changed_together(
    layers: Sequence[Mapping[str, Projection]], transported: Sequence[TransportedNeurons]
) -> Iterator[list[TransportedNeurons]]:
    """What was transported, a list for each module; one layer's is held at a time.

    Args:
        layers: The target's projections.
        transported: Differences of them, in the order of layers.

    Raises:
        FusionError: What was transported is no difference, or is of embeddings, head or norms.
    """
    for layer, items in groupby(transported, lambda item: item.layer):
        of_module: dict[str, list[TransportedNeurons]] = {}
        for item in items:
            view = layers[layer].get(item.projection) if layer < len(layers) else None
            if view is None or not item.is_difference:
                raise FusionError(f"{item.projection} of layer {layer} is nothing that an adapter can hold")
            of_module.setdefault(view.module_name, []).append(item)
        yield from of_module.values()


def module_change(
    layers: Sequence[Mapping[str, Projection]], items: Sequence[TransportedNeurons], alpha: Alpha
) -> ModuleChange:
    """What fusing changes of one module; the target is left as it is.

    Args:
        layers: The target's projections, not fused yet.
        items: One of `changed_together`.
        alpha: Fusion strength, or one for each projection.
    """
    views = layers[items[0].layer]
    first = views[items[0].projection]
    whole, bias = torch.zeros(first.rows.stored, first.in_features), None
    for item in items:
        view, strength = views[item.projection], alpha_of(alpha, item.projection)
        if strength == 0:
            continue
        _add(view, whole, item, strength)
        if item.bias is not None and view.has_bias:
            if bias is None:
                bias = view.module.get_parameter("bias").detach().to("cpu", torch.float32, copy=True)
            _add_to_bias(view, bias, item, strength)
    up, down = factors(whole)
    return ModuleChange(first.module_name, up, down, bias)


def _add(view: Projection, whole: Tensor, item: TransportedNeurons, strength: float) -> None:
    """Add a projection's change to its module's (outputs, inputs)."""
    own = torch.zeros(view.out_features, view.in_features)
    if item.projection in COLUMN_PROJECTIONS:
        own[:, item.neurons] = strength * item.weight
    else:
        own[item.neurons] = strength * item.weight
    view.rows.grouped(whole, 0).add_(own.unflatten(0, (view.rows.groups, view.rows.width)))


def _add_to_bias(view: Projection, bias: Tensor, item: TransportedNeurons, strength: float) -> None:
    assert item.bias is not None
    own = torch.zeros(view.out_features)
    if item.projection in COLUMN_PROJECTIONS:
        own += strength * item.bias
    else:
        own[item.neurons] = strength * item.bias
    view.rows.grouped(bias, 0).add_(own.unflatten(0, (view.rows.groups, view.rows.width)))
