"""Controls: what else could have made the difference that a merge made.

Each takes the same selected neurons as the merge, and asks one question of its result.

* ``shrink``: the neurons scaled by 1 - alpha, or, for a task vector, made smaller by as much as it changes them. Is it
  only that they became smaller?
* ``noise``: a random direction of the same norm as the merge's change. Would any change do?
* ``permuted``: transported through plans whose target neurons are shuffled: the same entries, the same layers, the
  wrong correspondence. Does the *correspondence* carry anything?
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from tmerge.errors import TmergeError
from tmerge.fusion import (
    COLUMN_PROJECTIONS,
    Alpha,
    NeuronSequence,
    TransportedNeurons,
    alpha_of,
    fuse,
    generator_for,
    places_of,
    read_neurons,
)
from tmerge.models import Projection

__all__ = ["Control", "Derived", "applied", "noise", "shrink"]

Control = Literal["shrink", "noise", "permuted", "source_base", "texts"]


class Derived(NeuronSequence):
    """Items made of others when they are asked for, so that no more than one of them is in memory.

    Args:
        transported: The others.
        make: Called with one of them each time that its counterpart is asked for.
    """

    def __init__(
        self, transported: Sequence[TransportedNeurons], make: Callable[[TransportedNeurons], TransportedNeurons]
    ) -> None:
        self._items, self._make = transported, make

    def __len__(self) -> int:
        return len(self._items)

    def places(self) -> list[tuple[int, str]]:
        """As `NeuronSequence.places`, those of the others."""
        return places_of(self._items)

    def _item(self, index: int) -> TransportedNeurons:
        return self._make(self._items[index])


def shrink(layers: Sequence[dict[str, Projection]], transported: Sequence[TransportedNeurons]) -> Derived:
    """Targets of zero: fusing with alpha then scales the selected neurons by 1 - alpha.

    A task vector is added and takes nothing away; its control goes as far towards zero as the task vector goes.

    Args:
        layers: The target's projections, `Architecture.views`; those of an item *unfused* when it is asked for.
        transported: What the merge would fuse.
    """

    def make(transported_neurons: TransportedNeurons) -> TransportedNeurons:
        if transported_neurons.is_difference:
            return _towards_zero(layers[transported_neurons.layer][transported_neurons.projection], transported_neurons)
        bias = None if transported_neurons.bias is None else torch.zeros_like(transported_neurons.bias)
        return replace(
            transported_neurons, weight=torch.zeros_like(transported_neurons.weight), bias=bias, is_difference=False
        )

    return Derived(transported, make)


def _towards_zero(view: Projection, transported_neurons: TransportedNeurons) -> TransportedNeurons:
    own = read_neurons(view, transported_neurons.neurons).cpu()
    size = torch.linalg.vector_norm(own)
    share = torch.linalg.vector_norm(transported_neurons.weight) / size if size > 0 else torch.zeros(())
    return replace(transported_neurons, weight=-share * own, bias=None)


def noise(layers: Sequence[dict[str, Projection]], transported: Sequence[TransportedNeurons], seed: int) -> Derived:
    """Random directions of the merge's own norm, for each layer and projection.

    Args:
        layers: The target's projections; those of an item *unfused* when it is asked for.
        transported: What the merge would fuse.
        seed: Of the run.
    """

    def make(transported_neurons: TransportedNeurons) -> TransportedNeurons:
        view = layers[transported_neurons.layer][transported_neurons.projection]
        generator = generator_for(seed, "noise", transported_neurons.layer, transported_neurons.projection)
        own = read_neurons(view, transported_neurons.neurons).cpu()
        weight = _random_like(
            transported_neurons.weight if transported_neurons.is_difference else transported_neurons.weight - own,
            generator,
        )
        bias = None
        own_bias = view.bias()
        if transported_neurons.bias is not None and own_bias is not None:
            selected_bias = own_bias.float().cpu()
            selected_bias = (
                selected_bias
                if transported_neurons.projection in COLUMN_PROJECTIONS
                else selected_bias[transported_neurons.neurons]
            )
            bias = _random_like(
                transported_neurons.bias
                if transported_neurons.is_difference
                else transported_neurons.bias - selected_bias,
                generator,
            )
        return replace(transported_neurons, weight=weight, bias=bias, is_difference=True)

    return Derived(transported, make)


@contextmanager
def applied(
    layers: Sequence[dict[str, Projection]],
    transported: Sequence[TransportedNeurons],
    alpha: Alpha,
    unfused: Sequence[Mapping[str, Projection]] = (),
) -> Iterator[None]:
    """The target with something fused into it, for the length of a ``with``; its bytes come back afterwards.

    One item is in memory at a time, and what the target's neurons were before, but for those that are read again.

    Args:
        layers: The target's, `Architecture.views`.
        transported: What is fused.
        alpha: Of each projection.
        unfused: By layer, views of the same values in the model's files (`Model.unfused`), where there are any.
    """
    changed: list[tuple[Projection, Tensor, _Values | None]] = []
    try:
        for transported_neurons in transported:
            if alpha_of(alpha, transported_neurons.projection) == 0:
                continue
            layer, name = transported_neurons.layer, transported_neurons.projection
            view, neurons = layers[layer][name], transported_neurons.neurons.clone()
            in_files = layer < len(unfused) and name in unfused[layer]
            changed.append((view, neurons, None if in_files else _values(view, neurons)))
            fuse(layers, [transported_neurons], alpha)
        yield
    except BaseException:
        # What went wrong inside is what is told, whatever cannot be read again.
        _restore(changed, unfused)
        raise
    failed = _restore(changed, unfused)
    if failed is not None:
        raise failed


def _restore(
    changed: Sequence[tuple[Projection, Tensor, _Values | None]], unfused: Sequence[Mapping[str, Projection]]
) -> TmergeError | None:
    """Write what was there before; of what the files do not give again, the first error."""
    failed: TmergeError | None = None
    for view, neurons, values in changed:
        try:
            weight, bias = values or _values(unfused[view.layer][view.name], neurons)
        except TmergeError as error:
            failed = failed or error
            continue
        if view.name in COLUMN_PROJECTIONS:
            view.write(weight, columns=neurons)
        else:
            view.write(weight, rows=neurons)
        if bias is not None:
            view.write(bias=bias)
    return failed


_Values = tuple[Tensor, Tensor | None]


def _values(view: Projection, neurons: Tensor) -> _Values:
    """A copy of some neurons' weights, and of the whole bias."""
    weight, bias = view.weight(), view.bias()
    own = weight[:, neurons] if view.name in COLUMN_PROJECTIONS else weight[neurons]
    return own.clone(), None if bias is None else bias.clone()


def _random_like(change: Tensor, generator: torch.Generator) -> Tensor:
    """A Gaussian direction with the norm of `change`."""
    direction = torch.randn(change.shape, generator=generator)
    return direction * (torch.linalg.vector_norm(change) / torch.linalg.vector_norm(direction))
