"""The neurons that a run transported, and those of its permuted control: read from the run's cache, one at a time."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

from tmerge.evaluation import noise, shrink
from tmerge.fusion import BlockNote, NeuronSequence, NeuronWriter, StoredNeurons, TransportedNeurons, is_stored
from tmerge.models import Projection
from tmerge.processes import Processes
from tmerge.run import Run
from tmerge.stages.notes import CarriedNote
from tmerge.store import write_json

__all__ = ["Neurons"]


class Neurons:
    """What fusing writes.

    Args:
        cache: Of the run.
    """

    def __init__(self, cache: Path) -> None:
        self._cache = cache

    def write(self, key: str, processes: Processes) -> tuple[NeuronWriter[BlockNote], NeuronWriter[BlockNote]]:
        """Begin anew: with what is carried through the plans, and through shuffled ones.

        Args:
            key: What decides them.
            processes: That write together.
        """
        transported, permuted = self._folders
        return NeuronWriter(transported, key, processes=processes), NeuronWriter(permuted, key, processes=processes)

    def keep(self, key: str, note: CarriedNote) -> CarriedNote:
        """Note of what was written under a key what else is told of it; last of all."""
        write_json(self._note, {"key": key, "facts": note.model_dump(mode="json")})
        return note

    def kept(self, key: str) -> CarriedNote | None:
        """What was noted of it, where all of it was written under this key; None otherwise."""
        facts = Run.note(self._note, key)
        if facts is None or not all(is_stored(folder, key) for folder in self._folders):
            return None
        return CarriedNote.model_validate(facts)

    @property
    def _folders(self) -> tuple[Path, Path]:
        return self._cache / "transported", self._cache / "permuted"

    @property
    def _note(self) -> Path:
        return self._cache / "carried.json"

    def stored(self, name: str) -> NeuronSequence:
        """What was written under a name: ``transported``, or a control's.

        Raises:
            RunNotFoundError: It is not there any more.
        """
        return StoredNeurons(self._cache / name)

    @cached_property
    def transported(self) -> NeuronSequence:
        """Carried through the plans; raises as `stored`."""
        return self.stored("transported")

    def go_on(self, name: str, key: str) -> NeuronWriter[BlockNote]:
        """Go on with what is fitted: what there is of this key stays.

        Args:
            name: ``fused``, or a control.
            key: What decides it.
        """
        folder = self._cache / ("transported" if name == "fused" else name)
        return NeuronWriter(folder, key, notes=BlockNote, resume=True)

    def of(self, name: str, layers: Sequence[dict[str, Projection]], seed: int) -> Sequence[TransportedNeurons]:
        """What fusing writes for ``fused``, or for a control.

        Args:
            name: ``fused``, or a control.
            layers: The target's projections; those of an item unfused when it is asked for.
            seed: Of the noise.
        """
        if name == "shrink":
            return shrink(layers, self.transported)
        if name == "noise":
            return noise(layers, self.transported, seed)
        return self.transported if name == "fused" else self.stored(name)
