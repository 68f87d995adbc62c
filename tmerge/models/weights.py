"""A model's weights by name, read from its files when they are asked for: nothing of them stays in memory.

``transformers`` may rename, stack or unpack what a checkpoint stores. Which stored tensor becomes which parameter is
asked of its own renaming; whatever is more than a renaming is none of these weights, and neither is a GGUF file's. Such
tensors are taken from the loaded model once, and written to a file that is read in the same way (`write_weights`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import PreTrainedModel

from tmerge.errors import CheckpointError
from tmerge.models.checkpoint import StoredTensor, file_state, read_safetensors_header
from tmerge.models.configs import stored_dtype
from tmerge.models.device import pick_dtype
from tmerge.models.finite import check_finite
from tmerge.models.loading import LoadedModel
from tmerge.models.place import Place
from tmerge.models.reference import ModelReference
from tmerge.models.renaming import renamed
from tmerge.store import write_tensors_in_turn

__all__ = ["MappedWeights", "mapped_weights", "read_weights_file", "write_weights"]


@dataclass(frozen=True)
class _Entry:
    """Where one tensor is stored."""

    path: Path
    name: str


class MappedWeights(Mapping[str, Tensor]):
    """Tensors of safetensors files, each mapped into memory when it is asked for, and gone when it is let go.

    Args:
        entries: Name -> where it is.
        dtype: What values are rounded to, as loading the model rounds them; None leaves them as they are stored.
        reference: Of the model, whose weights are held to be finite when each is first read: one that is fused from and
            never run is loaded by nobody, who would find it out. None of what was taken from a loaded one.
    """

    def __init__(
        self,
        entries: Mapping[str, _Entry],
        dtype: torch.dtype | None = None,
        reference: ModelReference | None = None,
    ) -> None:
        self._entries, self._dtype, self._reference = dict(entries), dtype, reference
        self._checked: set[str] = set()
        self._states = {entry.path: file_state(entry.path) for entry in self._entries.values()}

    def __getitem__(self, name: str) -> Tensor:
        return self._taken(name)

    def rows(self, name: str, index: Tensor) -> Tensor:
        """Some of a tensor's rows: of no others is a value read, rounded, or held to be finite."""
        return self._taken(name, index)

    def _taken(self, name: str, index: Tensor | None = None) -> Tensor:
        entry = self._entries[name]
        # Opened each time: a file that stays open would keep every page that was read of it.
        try:
            with safe_open(entry.path, "pt") as file:
                tensor: Tensor = file.get_tensor(entry.name)
            if index is not None:
                tensor = tensor[index]
            changed = file_state(entry.path) != self._states[entry.path]
        except (OSError, SafetensorError):
            changed = True
        if changed:
            raise CheckpointError(f"{str(entry.path)!r} changed while it was read; start again when it is written")
        taken = tensor if self._dtype is None else tensor.to(self._dtype)
        if self._reference is not None and name not in self._checked:
            check_finite(self._reference, [(entry.name, taken)], lambda: [(entry.name, tensor)])
            if index is None:
                self._checked.add(name)
        return taken

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, name: object) -> bool:
        return name in self._entries  # Mapping's own would read it


def mapped_weights(model: PreTrainedModel, place: Place, dtype: str) -> MappedWeights:
    """Those of a checkpoint's weights that ``transformers`` takes as they are stored, but for rounding them.

    Args:
        model: On the meta device.
        place: Of the checkpoint.
        dtype: As `load_model`.

    Returns:
        By the names of the model's parameters. What is not finite among them is refused when it is read.

    Raises:
        TmergeError: The files cannot be read.
    """
    number_format = pick_dtype(dtype, stored_dtype(place.stored_config, place.headers))
    files = {name: path for path in place.weights for name in read_safetensors_header(path)}
    own = {name: tuple(parameter.shape) for name, parameter in model.named_parameters(remove_duplicate=False)}
    wider = _wider_modules(model, number_format)
    entries = {
        name: _Entry(files[stored], stored)
        for name, stored in _plain_names(model, place.headers, own).items()
        if place.headers[stored].shape == own[name] and not any(part in name for part in wider)
    }
    return MappedWeights(entries, number_format, place.reference)


def _plain_names(model: PreTrainedModel, stored: Mapping[str, StoredTensor], own: Mapping[str, Any]) -> dict[str, str]:
    """Parameter -> the one stored tensor that becomes it, as ``transformers`` renames them."""
    renames = renamed(model, stored) or {}
    # What is made of several, or stored twice, is not taken as it is.
    times = Counter(name for name, _ in renames.values())
    return {
        name: source
        for source, (name, converted) in renames.items()
        if not converted and name in own and times[name] == 1
    }


def _wider_modules(model: PreTrainedModel, dtype: torch.dtype) -> set[str]:
    """Parts of the names of parameters that ``transformers`` keeps in float32 whatever is asked for."""
    kept: set[str] = set()
    if dtype in (torch.float16, torch.bfloat16):
        kept |= set(getattr(model, "_keep_in_fp32_modules_strict", None) or ())
    if dtype == torch.float16:
        kept |= set(getattr(model, "_keep_in_fp32_modules", None) or ())
    return kept


def write_weights(loaded: LoadedModel, names: Collection[str], path: Path, key: str) -> None:
    """Write some of a loaded model's parameters to a file, one after the other.

    Args:
        loaded: The model; one that is read by blocks has one in memory at a time.
        names: Of the parameters.
        path: The file.
        key: What decides them, kept in the file.
    """
    parts = loaded.block_weights
    read = loaded.model.get_parameter if parts is None else parts.read
    shapes = {}
    try:
        for name in names:
            parameter = read(name).detach()
            shapes[name] = (_narrowest(parameter, loaded.dtype), tuple(parameter.shape))
        write_tensors_in_turn(path, shapes, lambda name: read(name).detach().to("cpu", shapes[name][0]), {"key": key})
    finally:
        if parts is not None:
            parts.close()


def _narrowest(parameter: Tensor, stored: torch.dtype) -> torch.dtype:
    """The dtype that the model is stored in, where it holds all values: most often it is what was widened."""
    return stored if torch.equal(parameter.to(stored).to(parameter.dtype), parameter) else parameter.dtype


def read_weights_file(path: Path, key: str) -> MappedWeights | None:
    """What `write_weights` wrote under this key; None where it has not."""
    try:
        with safe_open(path, "pt") as file:
            if (file.metadata() or {}).get("key") != key:
                return None
            return MappedWeights({name: _Entry(path, name) for name in file.keys()})  # noqa: SIM118 - not a mapping
    except (OSError, SafetensorError):
        return None
