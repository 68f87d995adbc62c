"""A checkpoint's weights written again: what was not changed is copied, what was is written in its own dtype.

A tensor of the files is what it was as long as loading it gives the values that the model has. Its bytes are copied
then, more digits than the model computes with included; any other is written anew, in the dtype and under the name that
it is stored in. One tensor is in memory at a time beside the model.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from huggingface_hub import split_state_dict_into_shards_factory
from safetensors import safe_open
from torch import Tensor
from transformers import PreTrainedModel

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
    """
    names = renamed(place.empty, place.headers)
    if names is None:
        return None
    own = loaded.model.state_dict(keep_vars=True)
    twice = _stored_twice(loaded.model, own, {name for name, _ in names.values()})
    kept = {stored: (name, converted) for stored, (name, converted) in names.items() if name in own}
    values: dict[str, Tensor] = {
        stored: own[name] for stored, (name, converted) in kept.items() if not converted and name not in twice
    }
    converted = {stored for stored, (_, whether) in kept.items() if whether}
    if converted:
        taken_apart = _taken_apart(loaded.model, {name: own[name] for name, whether in kept.values() if whether})
        if taken_apart.keys() != converted:
            return None
        values |= taken_apart
    # All that the model has is in the files, or is one with what is.
    written = {id(own[name]) for name, _ in kept.values()}
    if any(id(tensor) not in written for name, tensor in own.items() if name not in _unsaved(loaded.model)):
        return None
    stored = {name: entry for name, entry in place.headers.items() if name in values}
    if any(entry.dtype not in _DTYPES or entry.shape != values[name].shape for name, entry in stored.items()):
        return None
    files = {name: path for path in place.weights for name in read_safetensors_header(path)}
    return {
        name: WrittenTensor(
            _DTYPES[entry.dtype],
            entry.shape,
            partial(_unchanged_or_anew, files[name], name, values[name], loaded.dtype),
        )
        for name, entry in stored.items()
    }


def _stored_twice(model: PreTrainedModel, own: Mapping[str, Tensor], stored: set[str]) -> set[str]:
    """Of tensors that are one in the model and two in the files, those that go without saying."""
    tied: Mapping[str, str] = getattr(model, "all_tied_weights_keys", None) or {}
    both = {other: first for other, first in tied.items() if other in own and first in own}
    return {other for other, first in both.items() if own[other] is own[first] and first in stored}


def _unsaved(model: PreTrainedModel) -> set[str]:
    """Names of the model's tensors that ``transformers`` does not write."""
    return set(getattr(model, "_keys_to_ignore_on_save", None) or ())


def _taken_apart(model: PreTrainedModel, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """What loading put together from several tensors, as it was stored."""
    from transformers.core_model_loading import revert_weight_conversion

    return dict(revert_weight_conversion(model, tensors))


def _unchanged_or_anew(path: Path, name: str, values: Tensor, loaded_as: torch.dtype) -> Tensor:
    """A stored tensor as it is, where loading it gives these values; else these values in its dtype."""
    with safe_open(path, "pt") as file:
        stored: Tensor = file.get_tensor(name)
    now = values.detach().to("cpu")
    if not stored.is_floating_point():
        return stored if torch.equal(stored, now) else now.to(stored.dtype)
    # Some modules are held in float32 whatever the rest is loaded as.
    if any(torch.equal(stored.to(dtype).to(now.dtype), now) for dtype in dict.fromkeys((loaded_as, now.dtype))):
        return stored
    return now.to(stored.dtype)


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
