"""What of an adapter a merge carries, and what it leaves behind, from names alone."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from tmerge.models import Architecture

__all__ = ["Learned", "stream_names"]

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
        cls, parameters: Collection[str], source: Architecture, projections: Sequence[str], *, stream: bool
    ) -> Learned:
        """Sort them.

        Args:
            parameters: Names of the source's parameters that are changed.
            source: Its projections.
            projections: Asked for, and in both models.
            stream: Whether embeddings and norms are carried.
        """
        changed = set(parameters)
        touched = [name for name in projections if changed.intersection(source.parameters([name], stream=False))]
        left = changed.difference(source.parameters(touched, stream=stream))
        counts = Counter(_NUMBER.sub(".*", name) for name in sorted(left))
        words = tuple(name if count == 1 else f"{name} ({count})" for name, count in counts.items())
        return cls(touched, [name for name in projections if name not in touched], words)


def stream_names(parameters: Collection[str], source: Architecture) -> list[str]:
    """Of what lies on the source's residual stream beside the projections, the names of what is changed."""
    changed = set(parameters)
    views = (view for layer in source.stream for view in layer.values())
    return sorted({view.name for view in views if changed.intersection(view.parameters)})
