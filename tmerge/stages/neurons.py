"""The neurons that a run transported, and those of its permuted control: read from the run's cache when first asked."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

from tmerge.evaluation import noise, shrink
from tmerge.fusion import TransportedNeurons, load_transported
from tmerge.models import Projection

__all__ = ["Neurons"]


class Neurons:
    """What fusing writes.

    Args:
        cache: Of the run.
    """

    def __init__(self, cache: Path) -> None:
        self.transported_path = cache / "transported.safetensors"
        self.permuted_path = cache / "permuted.safetensors"

    @cached_property
    def transported(self) -> list[TransportedNeurons]:
        """Carried through the plans."""
        return load_transported(self.transported_path)

    @cached_property
    def permuted(self) -> list[TransportedNeurons]:
        """Carried through shuffled plans."""
        return load_transported(self.permuted_path)

    def of(self, name: str, layers: Sequence[dict[str, Projection]], seed: int) -> list[TransportedNeurons]:
        """What fusing writes for ``fused``, or for a control.

        Args:
            name: ``fused``, ``shrink``, ``noise`` or ``permuted``.
            layers: The unfused target's projections.
            seed: Of the noise.
        """
        if name == "shrink":
            return shrink(layers, self.transported)
        if name == "noise":
            return noise(layers, self.transported, seed)
        return self.permuted if name == "permuted" else self.transported
