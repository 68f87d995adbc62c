"""What of an adapter a merge carries, and what it leaves behind, from names alone."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from tmerge.models import HEAD_NORMS, Architecture

__all__ = ["Learned", "changed_of", "stream_names"]

_NUMBER = re.compile(r"\.\d+(?=\.)")


@dataclass(frozen=True)
class Learned:
    """An adapter's changes, held against what a recipe carries.

    Attributes:
        projections: Names of those asked for that it changes, in the order asked.
        untouched: Those that it leaves as they are.
        left_out: What else it changes: ``model.layers.*.mlp.router.weight (24)``.
    """

    projections: list[str]
    untouched: list[str]
    left_out: tuple[str, ...]

    @classmethod
    def of(
        cls,
        parameters: Collection[str],
        models: tuple[Architecture, Architecture],
        projections: Sequence[str],
        *,
        stream: bool,
        carried: Collection[str] | None = None,
    ) -> Learned:
        """Sort them.

        Args:
            parameters: Names of the source's parameters that are changed.
            models: The target, and the source.
            projections: Asked for, and in both models.
            stream: Whether embeddings and norms are carried.
            carried: Of the projections, those that are; None for those that are changed. Of several sources one may
                change a norm of q, and another q itself.
        """
        target, source = models
        touched = changed_of(parameters, source, projections)
        going = set(source.parameters(touched, stream=False))
        if stream:
            beside = _beside(target, source, touched if carried is None else carried)
            going.update(name for names in beside.values() for name in names)
        left = set(parameters) - going
        counts = Counter(_NUMBER.sub(".*", name) for name in sorted(left))
        words = tuple(name if count == 1 else f"{name} ({count})" for name, count in counts.items())
        return cls(touched, [name for name in projections if name not in touched], words)


def changed_of(parameters: Collection[str], source: Architecture, projections: Sequence[str]) -> list[str]:
    """Of some projections, in their order, those of which a parameter is among these."""
    changed = set(parameters)
    return [name for name in projections if changed.intersection(source.parameters([name], stream=False))]


def stream_names(
    parameters: Collection[str], target: Architecture, source: Architecture, carried: Collection[str]
) -> list[str]:
    """Of embeddings, head and norms, the names of what is changed and has a place in the target.

    Args:
        parameters: Names of the source's parameters that are changed.
        target: Its norms are met by their names.
        source: Whose they are.
        carried: Projections that are; a norm of q or k goes with what it norms.
    """
    beside = _beside(target, source, carried)
    return sorted(name for name, names in beside.items() if not names.isdisjoint(parameters))


def _beside(target: Architecture, source: Architecture, carried: Collection[str]) -> dict[str, set[str]]:
    """Of embeddings, head and norms, what the target has too, by name; and the source's parameters of it."""
    places = {name for layer in target.stream for name in layer}
    places.difference_update(norm for norm, normed in HEAD_NORMS.items() if normed not in carried)
    found: dict[str, set[str]] = {name: set() for name in places}
    for layer in source.stream:
        for name, view in layer.items():
            if name in places:
                found[name].update(view.parameters)
    return found
