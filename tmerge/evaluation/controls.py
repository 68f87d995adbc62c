"""Controls: what else could have made the difference that a merge made.

Each takes the same selected neurons as the merge, and asks one question of its result.

* ``shrink``: the neurons scaled by 1 - alpha, or, for a task vector, made smaller by as much as it changes them. Is it
  only that they became smaller?
* ``noise``: a random direction of the same norm as the merge's change. Would any change do?
* ``permuted``: transported through plans whose target neurons are shuffled: the same entries, the same layers, the
  wrong correspondence. Does the *correspondence* carry anything?
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from tmerge.fusion import COLUMN_PROJECTIONS, Alpha, TransportedNeurons, alpha_of, fuse, read_neurons
from tmerge.models import Projection

__all__ = ["Control", "applied", "control_generator", "noise", "shrink"]

Control = Literal["shrink", "noise", "permuted"]


def control_generator(seed: int, *place: object) -> torch.Generator:
    """A generator of its own for every place, so that no control depends on the order of the others."""
    digest = hashlib.sha256(repr((seed, *place)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


def shrink(
    layers: Sequence[dict[str, Projection]], transported: Sequence[TransportedNeurons]
) -> list[TransportedNeurons]:
    """Targets of zero: fusing with alpha then scales the selected neurons by 1 - alpha.

    A task vector is added and takes nothing away; its control goes as far towards zero as the task vector goes.

    Args:
        layers: The *unfused* target's projections, `Architecture.views`.
        transported: What the merge would fuse.
    """
    return [
        _towards_zero(layers[item.layer][item.projection], item)
        if item.is_difference
        else replace(
            item,
            weight=torch.zeros_like(item.weight),
            bias=None if item.bias is None else torch.zeros_like(item.bias),
            is_difference=False,
        )
        for item in transported
    ]


def _towards_zero(view: Projection, item: TransportedNeurons) -> TransportedNeurons:
    own = read_neurons(view, item.neurons).cpu()
    size = torch.linalg.vector_norm(own)
    share = torch.linalg.vector_norm(item.weight) / size if size > 0 else torch.zeros(())
    return replace(item, weight=-share * own, bias=None)


def noise(
    layers: Sequence[dict[str, Projection]], transported: Sequence[TransportedNeurons], seed: int
) -> list[TransportedNeurons]:
    """Random directions of the merge's own norm, for each layer and projection.

    Args:
        layers: The *unfused* target's projections.
        transported: What the merge would fuse.
        seed: Of the run.
    """
    result = []
    for item in transported:
        view = layers[item.layer][item.projection]
        generator = control_generator(seed, "noise", item.layer, item.projection)
        own = read_neurons(view, item.neurons).cpu()
        weight = _random_like(item.weight if item.is_difference else item.weight - own, generator)
        bias = None
        own_bias = view.bias()
        if item.bias is not None and own_bias is not None:
            moved = own_bias.float().cpu()
            moved = moved if item.projection in COLUMN_PROJECTIONS else moved[item.neurons]
            bias = _random_like(item.bias if item.is_difference else item.bias - moved, generator)
        result.append(replace(item, weight=weight, bias=bias, is_difference=True))
    return result


@contextmanager
def applied(
    layers: Sequence[dict[str, Projection]], transported: Sequence[TransportedNeurons], alpha: Alpha
) -> Iterator[None]:
    """The target with something fused into it, for the length of a ``with``; its bytes come back afterwards."""
    changed = [item for item in transported if alpha_of(alpha, item.projection) != 0]
    kept = [(layers[item.layer][item.projection], item.neurons) for item in changed]
    stored = []
    for view, neurons in kept:
        weight = view.weight()
        own = weight[:, neurons] if view.name in COLUMN_PROJECTIONS else weight[neurons]
        bias = view.bias()
        stored.append((own.clone(), None if bias is None else bias.clone()))
    try:
        fuse(layers, changed, alpha)
        yield
    finally:
        for (view, neurons), (own, bias) in zip(kept, stored, strict=True):
            if view.name in COLUMN_PROJECTIONS:
                view.write(own, columns=neurons)
            else:
                view.write(own, rows=neurons)
            if bias is not None:
                view.write(bias=bias)


def _random_like(change: Tensor, generator: torch.Generator) -> Tensor:
    """A Gaussian direction with the norm of `change`."""
    direction = torch.randn(change.shape, generator=generator)
    return direction * (torch.linalg.vector_norm(change) / torch.linalg.vector_norm(direction))
