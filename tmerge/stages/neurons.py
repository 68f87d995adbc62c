"""The neurons that a run transported, and those of its permuted control: read from the run's cache, one at a time."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

from tmerge.evaluation import noise, shrink
from tmerge.fusion import NeuronWriter, StoredNeurons, TransportedNeurons
from tmerge.models import Projection

__all__ = ["Neurons"]


class Neurons:
    """What fusing writes.

    Args:
        cache: Of the run.
    """

    def __init__(self, cache: Path) -> None:
        self._folders = cache / "transported", cache / "permuted"

    def write(self, key: str, *, resume: bool = False) -> tuple[NeuronWriter, NeuronWriter]:
        """Begin: with what is carried through the plans, and through shuffled ones.

        Args:
            key: What decides them.
            resume: Whether what there is of this key stays.
        """
        transported, permuted = (NeuronWriter(folder, key, resume=resume) for folder in self._folders)
        return transported, permuted

    @cached_property
    def transported(self) -> StoredNeurons:
        """Carried through the plans.

        Raises:
            RunNotFoundError: They are not there any more.
        """
        return StoredNeurons(self._folders[0])

    @cached_property
    def permuted(self) -> StoredNeurons:
        """Carried through shuffled plans; raises likewise."""
        return StoredNeurons(self._folders[1])

    def of(self, name: str, layers: Sequence[dict[str, Projection]], seed: int) -> Sequence[TransportedNeurons]:
        """What fusing writes for ``fused``, or for a control.

        Args:
            name: ``fused``, ``shrink``, ``noise`` or ``permuted``.
            layers: The target's projections; those of an item unfused when it is asked for.
            seed: Of the noise.
        """
        if name == "shrink":
            return shrink(layers, self.transported)
        if name == "noise":
            return noise(layers, self.transported, seed)
        return self.permuted if name == "permuted" else self.transported
