"""Transported neurons on disk: written as they come, a file for each layer, and read one item at a time.

What is carried of a large source takes as much memory as the target itself. So no layer's outlives its writing, and who
reads an item has the file's pages for as long as it holds the item.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

from safetensors import safe_open
from torch import Tensor

from tmerge.errors import RunNotFoundError
from tmerge.fusion.merge import NeuronSequence, TransportedNeurons
from tmerge.models import PROJECTIONS
from tmerge.store import read_json, write_json, write_tensors

__all__ = ["NeuronWriter", "StoredNeurons"]

_INDEX = "index.json"


class NeuronWriter:
    """Writes transported neurons into a folder, which is emptied first.

    Args:
        folder: Of nothing else.
        key: What decides them, kept in the folder.
    """

    def __init__(self, folder: Path, key: str) -> None:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        self._folder, self._key = folder, key
        self._items: list[dict[str, int | str | bool]] = []
        self._files = 0

    def add(self, items: Sequence[TransportedNeurons]) -> None:
        """Write some more, in a file of their own; they may be let go then."""
        tensors: dict[str, Tensor] = {}
        name = f"{self._files:05}.safetensors"
        for item in items:
            fields = {"neurons": item.neurons, "weight": item.weight, "bias": item.bias}
            tensors |= {f"{len(self._items)}.{field}": value for field, value in fields.items() if value is not None}
            self._items.append(
                {"file": name, "layer": item.layer, "projection": item.projection, "difference": item.is_difference}
            )
        if tensors:
            write_tensors(self._folder / name, tensors)
            self._files += 1

    def finish(self) -> StoredNeurons:
        """Write what there is, last: without it the folder is of no use."""
        write_json(self._folder / _INDEX, {"key": self._key, "items": self._items})
        return StoredNeurons(self._folder)


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
        self._items = sorted(enumerate(index["items"]), key=lambda entry: _place(entry[1]))

    def __len__(self) -> int:
        return len(self._items)

    def _item(self, index: int) -> TransportedNeurons:
        number, item = self._items[index]
        # Opened for each item: its pages go with it.
        with safe_open(self._folder / item["file"], "pt") as file:
            tensors = {
                field: file.get_tensor(f"{number}.{field}")
                for field in ("neurons", "weight", "bias")
                if f"{number}.{field}" in file.keys()  # noqa: SIM118 - not a mapping
            }
        return TransportedNeurons(
            item["layer"],
            item["projection"],
            tensors["neurons"],
            tensors["weight"],
            tensors.get("bias"),
            item["difference"],
        )


def _place(item: dict[str, int | str]) -> tuple[int, int, str]:
    layer, projection = int(item["layer"]), str(item["projection"])
    return layer, PROJECTIONS.index(projection) if projection in PROJECTIONS else len(PROJECTIONS), projection
