"""Transported neurons on disk: written as they come, a file for each layer, and read one item at a time.

What is carried of a large source takes as much memory as the target itself. So no layer's outlives its writing, and who
reads an item has the file's pages for as long as it holds the item.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Generic, TypeVar

from pydantic import BaseModel
from safetensors import safe_open
from torch import Tensor

from tmerge.errors import RunNotFoundError
from tmerge.fusion.merge import NeuronSequence, TransportedNeurons
from tmerge.models import PROJECTIONS
from tmerge.processes import ALONE, Processes
from tmerge.store import read_json, write_json, write_tensors

__all__ = ["NeuronWriter", "StoredNeurons", "is_stored"]

PartNote = TypeVar("PartNote", bound=BaseModel)

_INDEX, _PART = "index.json", "part.json"


class NeuronWriter(Generic[PartNote]):
    """Writes transported neurons into a folder, part by part, and a note beside each part, of one type.

    Args:
        folder: Of nothing else; emptied first.
        key: What decides them, kept in the folder.
        notes: Type of the notes; None where parts have none.
        resume: Whether parts that an earlier writer of the same key left there stay.
        processes: That write into the folder together, each with a writer of its own; their parts are one at the end.

    Attributes:
        notes: One for each part that is there, where they have any.
        is_finished: Whether an earlier writer of the same key had finished.
    """

    def __init__(
        self,
        folder: Path,
        key: str,
        *,
        notes: type[PartNote] | None = None,
        resume: bool = False,
        processes: Processes = ALONE,
    ) -> None:
        self._folder, self._key, self._resume, self._processes = folder, key, resume, processes
        self._items: list[dict[str, Any]] = []
        self.notes: list[PartNote] = []
        self._parts = 0
        self.is_finished = False
        if resume:
            finished, unfinished = (read_json(folder / name) for name in (_INDEX, _PART))
            index = finished or unfinished
            if index is not None and index["key"] == key:
                self._items, self._parts = index["items"], index["parts"]
                if notes is not None:
                    self.notes = [notes.model_validate(note) for note in index["notes"]]
                self.is_finished = finished is not None
                return
        processes.from_first(self._clear)

    def _clear(self) -> None:
        shutil.rmtree(self._folder, ignore_errors=True)
        self._folder.mkdir(parents=True)
        if self._resume:
            # Who opens the folder of this key after this one finds it begun, and leaves it as it is.
            write_json(self._folder / _PART, self._index)

    def parts(self) -> list[list[TransportedNeurons]]:
        """What is there already, a list for each time that some was added."""
        parts: list[list[TransportedNeurons]] = [[] for _ in range(self._parts)]
        for entry in self._items:
            parts[entry["part"]].append(_read(self._folder, entry))
        return parts

    def add(self, transported: Sequence[TransportedNeurons], note: PartNote | None = None) -> None:
        """Write some more, in a file of their own; they may be let go then.

        Args:
            transported: What to write.
            note: Kept with them, in `notes`.
        """
        tensors: dict[str, Tensor] = {}
        name = f"{self._processes.rank:03}-{self._parts:05}.safetensors"
        for transported_neurons in transported:
            fields = {
                "neurons": transported_neurons.neurons,
                "weight": transported_neurons.weight,
                "bias": transported_neurons.bias,
            }
            number = len(self._items)
            tensors |= {f"{number}.{field}": value for field, value in fields.items() if value is not None}
            self._items.append(
                {
                    "file": name,
                    "number": number,
                    "part": self._parts,
                    "layer": transported_neurons.layer,
                    "projection": transported_neurons.projection,
                    "difference": transported_neurons.is_difference,
                }
            )
        if tensors:
            write_tensors(self._folder / name, tensors)
        self._parts += 1
        if note is not None:
            self.notes.append(note)
        if self._resume:
            write_json(self._folder / _PART, self._index)

    def finish(self) -> StoredNeurons:
        """Write what there is, last: without it the folder is of no use."""
        shares = self._processes.gathered((self._items, self._parts))
        self._items, self._parts = [item for items, _ in shares for item in items], sum(parts for _, parts in shares)
        self._processes.from_first(lambda: write_json(self._folder / _INDEX, self._index))
        return StoredNeurons(self._folder)

    @property
    def _index(self) -> dict[str, Any]:
        notes = [note.model_dump(mode="json") for note in self.notes]
        return {"key": self._key, "parts": self._parts, "notes": notes, "items": self._items}


def is_stored(folder: Path, key: str) -> bool:
    """Whether a `NeuronWriter` of this key has finished there."""
    return (read_json(folder / _INDEX) or {}).get("key") == key


class StoredNeurons(NeuronSequence):
    """What a `NeuronWriter` wrote, in the order of layers and then of projections.

    Args:
        folder: Of the writer.

    Raises:
        RunNotFoundError: It is not there, or was not finished.
    """

    def __init__(self, folder: Path) -> None:
        index = read_json(folder / _INDEX)
        if index is None:
            raise RunNotFoundError(f"{folder} holds no transported neurons any more; run the merge again")
        self._folder = folder
        self._items = sorted(index["items"], key=_place)

    def __len__(self) -> int:
        return len(self._items)

    def places(self) -> list[tuple[int, str]]:
        """As `NeuronSequence.places`; no file is read."""
        return [(entry["layer"], entry["projection"]) for entry in self._items]

    def _item(self, index: int) -> TransportedNeurons:
        return _read(self._folder, self._items[index])


def _read(folder: Path, entry: Mapping[str, Any]) -> TransportedNeurons:
    number = entry["number"]
    # Opened for each item: its pages go with it.
    with safe_open(folder / entry["file"], "pt") as file:
        tensors = {
            field: file.get_tensor(f"{number}.{field}")
            for field in ("neurons", "weight", "bias")
            if f"{number}.{field}" in file.keys()  # noqa: SIM118 - not a mapping
        }
    return TransportedNeurons(
        entry["layer"],
        entry["projection"],
        tensors["neurons"],
        tensors["weight"],
        tensors.get("bias"),
        entry["difference"],
    )


def _place(entry: dict[str, int | str]) -> tuple[int, int, str]:
    layer, projection = int(entry["layer"]), str(entry["projection"])
    return layer, PROJECTIONS.index(projection) if projection in PROJECTIONS else len(PROJECTIONS), projection
