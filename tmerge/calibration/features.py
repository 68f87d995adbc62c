"""The features of one model over the calibration texts, on disk: one NumPy file each, mapped on reading.

``layer-0007.qkv.pre.npy`` holds that layer's ``qkv.pre`` ``(T, n)``, rows in the texts' order: in float32, or, where
all of them came in 16 bits, in those (bfloat16, which NumPy does not have, as int16).
``store.json`` names the layers, their keys and what was captured. All are written in a folder of another name, which
takes the store's place when it is whole.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.lib.format import open_memmap
from torch import Tensor

from tmerge.documents import parse_json
from tmerge.errors import NotEnoughDiskError, RunNotFoundError
from tmerge.quantities import bytes_words

__all__ = ["FeatureStore", "FeatureWriter"]

_NOTE = "store.json"
# What features are stored in, and NumPy's dtype of the same bits.
_STORED: dict[torch.dtype, np.dtype[Any]] = {
    torch.float32: np.dtype("<f4"),
    torch.float16: np.dtype("<f2"),
    torch.bfloat16: np.dtype("<i2"),
}
# As what torch hands those bits to NumPy.
_BITS = {torch.float32: torch.float32, torch.float16: torch.float16, torch.bfloat16: torch.int16}
_FULL = {errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC)}  # the second: not on Windows


@dataclass(frozen=True)
class _Place:
    """Where a feature's rows lie: its file, at which byte they begin, n, and in which dtype."""

    path: Path
    offset: int
    width: int
    dtype: torch.dtype

    @property
    def row(self) -> int:
        """Bytes of one."""
        return self.width * self.dtype.itemsize


class FeatureWriter:
    """Puts pooled features where they belong on disk, whatever order the texts come in.

    Batches are of texts of like length, so rows come out of order. The files are laid out in full when the writer is
    made, and a batch's rows are written to their places: nothing is held in memory and nothing is written
    twice. Use it as a context: what is not finished when the context ends is removed.

    Args:
        folder: The store's; a store that is there is removed first.
        texts: T.
        widths: (layer, feature key) -> n.
        dtypes: Likewise -> float32, or the 16 bits that all its values have; float32 for those that are left out.
        key: What decides the contents; `FeatureStore.key` gives it back.
        facts: Kept with the store, for people.

    Raises:
        NotEnoughDiskError: The features do not fit.
        ValueError: The folder holds something else than a store.
    """

    def __init__(
        self,
        folder: Path,
        texts: int,
        widths: Mapping[tuple[int, str], int],
        *,
        key: str,
        facts: Mapping[str, str] | None = None,
        dtypes: Mapping[tuple[int, str], torch.dtype] | None = None,
    ) -> None:
        self.folder = Path(folder)
        self.texts = texts
        self.key = key
        self.facts = dict(facts or {})
        self._scratch = self.folder.with_name(self.folder.name + ".partial")
        for old in (self.folder, self._scratch):
            _remove_store(old)
        self._scratch.mkdir(parents=True)
        self._places = {
            feature: _Place(_path(self._scratch, *feature), 0, width, (dtypes or {}).get(feature, torch.float32))
            for feature, width in sorted(widths.items())
        }
        free = shutil.disk_usage(self._scratch).free
        if self._size > free:
            self._scratch.rmdir()
            raise self._no_room(free)
        self._places = {feature: self._laid_out(place) for feature, place in self._places.items()}

    def __enter__(self) -> FeatureWriter:
        return self

    def __exit__(self, *exception: object) -> None:
        _remove_store(self._scratch)

    def write(self, texts: Sequence[int], rows: Mapping[tuple[int, str], Tensor]) -> None:
        """Write some texts' features.

        Args:
            texts: Which texts, by their place; neighbours that follow one another are written together.
            rows: (layer, feature key) -> ``(len(texts), n)`` float32 on the CPU.

        Raises:
            NotEnoughDiskError: The disk is full.
            ValueError: A feature has values that its 16 bits do not hold.
        """
        breaks = np.flatnonzero(np.diff(np.asarray(texts)) != 1) + 1
        runs = list(zip([0, *breaks], [*breaks, len(texts)], strict=True))
        try:
            for name, values in rows.items():
                place = self._places[name]
                kept = values.to(place.dtype).contiguous()
                if place.dtype != torch.float32 and not torch.equal(kept.float(), values):
                    raise ValueError(f"{name} has values that {place.dtype} does not hold")
                stored = kept.view(_BITS[place.dtype]).numpy()
                # Written and not mapped: that is quicker, and a full disk is an error and not a crash.
                with place.path.open("r+b", buffering=0) as file:
                    for start, stop in runs:
                        file.seek(place.offset + texts[start] * place.row)
                        if file.write(stored[start:stop].data) != (stop - start) * place.row:
                            raise OSError(errno.ENOSPC, "short write")
        except OSError as error:
            raise self._explained(error) from None

    def fill_with_mean(self, texts: Sequence[int]) -> None:
        """Give texts that have no features the mean of all others, which changes no covariance of any feature."""
        with_features = np.setdiff1d(np.arange(self.texts), np.asarray(texts, dtype=np.int64))
        for name, place in self._places.items():
            mean = _values(place.path)[with_features].mean(0, dtype=torch.float64).float()
            self.write(texts, {name: mean.expand(len(texts), -1)})

    def finish(self) -> None:
        """Make it a store. It is a cache: it survives the end of the process, and need not survive a power cut."""
        layers: dict[int, list[str]] = {}
        for layer, name in self._places:
            layers.setdefault(layer, []).append(name)
        note = {
            "key": self.key,
            "texts": self.texts,
            "layers": layers,
            "facts": self.facts,
        }
        (self._scratch / _NOTE).write_text(json.dumps(note, indent=1), encoding="utf-8")
        os.replace(self._scratch, self.folder)

    def _laid_out(self, place: _Place) -> _Place:
        """A file of the right size, whose rows are yet to come."""
        stored = open_memmap(place.path, mode="w+", dtype=_STORED[place.dtype], shape=(self.texts, place.width))
        return replace(place, offset=stored.offset)

    @property
    def _size(self) -> int:
        """Bytes of all rows."""
        return self.texts * sum(place.row for place in self._places.values())

    def _explained(self, error: OSError) -> Exception:
        """A full disk in our words; other errors as they are."""
        if error.errno not in _FULL:
            return error
        return self._no_room(shutil.disk_usage(self._scratch).free)

    def _no_room(self, free: int) -> NotEnoughDiskError:
        return NotEnoughDiskError(
            f"the features of {self.texts} texts need {bytes_words(self._size)} of disk, where {bytes_words(free)} are "
            "free; make room, lower calibration.texts, or choose fewer fusion.projections"
        )


class FeatureStore:
    """What a `FeatureWriter` finished.

    Args:
        folder: The store's.

    Attributes:
        key: What was captured, as the writer was told.
        texts: T.
        facts: What else the writer was told.

    Raises:
        RunNotFoundError: The folder holds no finished store.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = Path(folder)
        try:
            note = parse_json((self.folder / _NOTE).read_text(encoding="utf-8"))
            self.key, self.texts = str(note["key"]), int(note["texts"])
            self.facts: dict[str, str] = dict(note["facts"])
            self._layers = {int(layer): tuple(keys) for layer, keys in note["layers"].items()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            raise RunNotFoundError(
                f"{self.folder.name!r} holds no captured features; run the merge again, and they are captured anew"
            ) from None

    @classmethod
    def is_finished(cls, folder: Path, key: str) -> bool:
        """Whether the folder holds a store of this very key."""
        try:
            return cls(folder).key == key
        except RunNotFoundError:
            return False

    @property
    def layers(self) -> tuple[int, ...]:
        """Layers that have any feature, ascending."""
        return tuple(sorted(self._layers))

    def keys(self, layer: int) -> tuple[str, ...]:
        """Feature keys of a layer."""
        return self._layers.get(layer, ())

    def get(self, layer: int, key: str) -> Tensor:
        """One feature: ``(T, n)`` float32; of one that is stored so mapped, so that only what is used is read.

        Raises:
            KeyError: That layer has no such feature.
            RunNotFoundError: Its file is damaged.
        """
        if key not in self.keys(layer):
            raise KeyError(f"no feature {key!r} of layer {layer}; there are {', '.join(self.keys(layer)) or 'none'}")
        path = _path(self.folder, layer, key)
        try:
            return _values(path)
        except (OSError, ValueError, EOFError):
            raise RunNotFoundError(
                f"the captured features in {path.name} are damaged; delete the run's cache folder and run it again"
            ) from None


def _path(folder: Path, layer: int, key: str) -> Path:
    return folder / f"layer-{layer:04d}.{key}.npy"


def _values(path: Path) -> Tensor:
    # "c": what is read is the file's, and nothing is written back; torch takes no read-only arrays.
    stored = torch.from_numpy(np.load(path, mmap_mode="c"))
    return stored.view(torch.bfloat16).float() if stored.dtype == torch.int16 else stored.float()


def _remove_store(folder: Path) -> None:
    """Remove a store, whole or half, and never anything else."""
    if not folder.exists():
        return
    files = sorted(folder.iterdir())
    foreign = [path for path in files if path.name != _NOTE and not path.match("layer-*.npy")]
    if foreign:
        raise ValueError(f"{folder} holds {foreign[0].name}, so it is no feature store and is not replaced")
    # The note first: without it there is no store, should this be interrupted.
    for path in sorted(files, key=lambda path: path.name != _NOTE):
        path.unlink()
    folder.rmdir()
