"""The neurons that a run transported, and those of its permuted control: read from the run's cache when first asked."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path

from tmerge.fusion import TransportedNeurons, load_transported

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
