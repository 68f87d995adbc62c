"""A checkpoint's weights written again: what was not changed is copied, what was is written in its own dtype.

A tensor of the files is what it was as long as loading it gives the values that the model has. Its bytes are copied
then, more digits than the model computes with included; any other is written anew, in the dtype and under the name that
it is stored in (in the model's, where that one would lose digits). One tensor is in memory at a time beside the model.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from huggingface_hub import split_state_dict_into_shards_factory
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import PreTrainedModel

from tmerge.errors import CheckpointError
from tmerge.models.checkpoint import INDEX_FILE, read_safetensors_header
from tmerge.models.loading import LoadedModel
from tmerge.models.place import Place
from tmerge.models.renaming import renamed
from tmerge.store import write_json, write_tensors_in_turn

__all__ = ["WrittenTensor", "stored_again", "write_shards"]

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


@dataclass(frozen=True)
class WrittenTensor:
    """One tensor that is to be written.

    Attributes:
        dtype: In the file.
        shape: Likewise.
        read: Gives its values, on the CPU.
    """

    dtype: torch.dtype
    shape: tuple[int, ...]
    read: Callable[[], Tensor]

    @property
    def nbytes(self) -> int:
        """In the file."""
        return self.dtype.itemsize * math.prod(self.shape)


def stored_again(loaded: LoadedModel, place: Place) -> dict[str, WrittenTensor] | None:
    """A loaded model's weights by the names that its files have, as they are to be written.

    What the files hold beside the model is not among them.

    Args:
        loaded: The model, changed or not; its tensors are read when they are written.
        place: The files that it was loaded from.

    Returns:
        None where ``transformers`` does not tell which stored tensor became which of the model's.

    Raises:
        CheckpointError: The files are no longer there.
    """
    names = renamed(place.empty, place.headers)
    if names is None:
        return None
    own = loaded.model.state_dict(keep_vars=True)
    twice = _stored_twice(loaded.model, own, {name for name, _ in names.values()})
    kept = {stored: (name, converted) for stored, (name, converted) in names.items() if name in own}
    # All that the model has is in the files, or is one with what is.
    written = {id(own[name]) for name, _ in kept.values()}
    if any(id(tensor) not in written for name, tensor in own.items() if name not in _unsaved(loaded.model)):
        return None
    apart = _Apart(loaded.model, own)
    files = {name: path for path in place.weights for name in read_safetensors_header(path)}
    tensors = {}
    for stored, (name, converted) in kept.items():
        entry = place.headers[stored]
        shape = apart.shape(name, stored) if converted else tuple(own[name].shape)
        if entry.dtype not in _DTYPES or entry.shape != shape:
            return None
        if not converted and name in twice:
            continue
        now = partial(apart.read, name, stored) if converted else own[name].detach
        reading = _Stored(files[stored], stored, now, loaded.dtype)
        tensors[stored] = WrittenTensor(reading.dtype(_DTYPES[entry.dtype]), entry.shape, reading.read)
    return tensors


def _stored_twice(model: PreTrainedModel, own: Mapping[str, Tensor], stored: set[str]) -> set[str]:
    """Of tensors that are one in the model and two in the files, those that go without saying."""
    tied: Mapping[str, str] = getattr(model, "all_tied_weights_keys", None) or {}
    both = {other: first for other, first in tied.items() if other in own and first in own}
    return {other for other, first in both.items() if own[other] is own[first] and first in stored}


def _unsaved(model: PreTrainedModel) -> set[str]:
    """Names of the model's tensors that ``transformers`` does not write."""
    return set(getattr(model, "_keys_to_ignore_on_save", None) or ())


class _Apart:
    """What loading put together from several tensors, as it was stored: one module's tensors taken apart at a time.

    Files list a layer's experts one after another, each with its parts of all the module's stacked tensors. To take a
    stack apart costs a copy of all of it, so what a module has is kept until another module is asked for: each stack is
    then taken apart once, and once more for every file that begins in the middle of it.
    """

    def __init__(self, model: PreTrainedModel, own: Mapping[str, Tensor]) -> None:
        self._model, self._own = model, own
        self._shapes: dict[str, dict[str, tuple[int, ...]]] = {}
        self._module, self._held = "", dict[str, dict[str, Tensor]]()

    def shape(self, name: str, stored: str) -> tuple[int, ...] | None:
        """Of one of the parts; None where the model's tensor has no such part."""
        if name not in self._shapes:
            parts = self._parts(name, torch.empty_like(self._own[name], device="meta"))
            self._shapes[name] = {part: tuple(tensor.shape) for part, tensor in parts.items()}
        return self._shapes[name].get(stored)

    def read(self, name: str, stored: str) -> Tensor:
        """One of the parts."""
        module = name.rpartition(".")[0]
        if module != self._module:
            self._module, self._held = module, {}  # let go before the next is taken apart
        if name not in self._held:
            self._held[name] = self._parts(name, self._own[name].detach())
        return self._held[name][stored]

    def _parts(self, name: str, tensor: Tensor) -> dict[str, Tensor]:
        from transformers.core_model_loading import revert_weight_conversion

        return dict(revert_weight_conversion(self._model, {name: tensor}))


@dataclass(frozen=True)
class _Stored:
    """A stored tensor and what the model has of it.

    Attributes:
        path: The file.
        name: In it.
        now: Gives the model's values.
        loaded_as: The dtype that the model was loaded in; some modules are held in float32 all the same.
    """

    path: Path
    name: str
    now: Callable[[], Tensor]
    loaded_as: torch.dtype

    def dtype(self, stored: torch.dtype) -> torch.dtype:
        """What it is to be written in: as it is stored, or as the model has it where it has values of more digits."""
        if not stored.is_floating_point or torch.promote_types(stored, self.loaded_as) == stored:
            return stored
        now = self.now().to("cpu")
        return stored if torch.equal(now.to(stored).to(now.dtype), now) else self.loaded_as

    def read(self) -> Tensor:
        """The stored values where loading them gives the model's, else the model's."""
        try:
            with safe_open(self.path, "pt") as file:
                stored: Tensor = file.get_tensor(self.name)
        except (OSError, SafetensorError):
            raise CheckpointError(
                f"{str(self.path)!r} is no longer there, or not what it was; bring it back, and run the same command"
            ) from None
        now = self.now().to("cpu")
        loaded = (stored.to(dtype).to(now.dtype) for dtype in dict.fromkeys((self.loaded_as, now.dtype)))
        if torch.equal(stored, now) if not stored.is_floating_point() else any(torch.equal(v, now) for v in loaded):
            return stored
        return now.to(self.dtype(stored.dtype))


def write_shards(folder: Path, tensors: Mapping[str, WrittenTensor], max_shard_size: int | str) -> None:
    """Write weights into one file, or into several with an index, in the order given.

    Args:
        folder: That they are written to.
        tensors: By their names.
        max_shard_size: As `save_checkpoint`.
    """
    split = split_state_dict_into_shards_factory(
        dict(tensors),
        get_storage_size=lambda tensor: tensor.nbytes,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=max_shard_size,
    )
    for file, names in split.filename_to_tensors.items():
        layout = {name: (tensors[name].dtype, tensors[name].shape) for name in names}
        write_tensors_in_turn(folder / file, layout, lambda name: tensors[name].read(), {"format": "pt"})
    if split.is_sharded:
        write_json(folder / INDEX_FILE, {"metadata": split.metadata, "weight_map": split.tensor_to_filename})
