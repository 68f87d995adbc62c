"""Writing a model as a plain checkpoint: `AutoModelForCausalLM.from_pretrained(folder)` reads it, and the like.

What is written needs nothing of tmerge to be read, and nothing that the target's own files do not need: they are copied
but for the weights that were changed (`copying`, `settings`). `verifying` proves that it is the model.
"""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import torch
from transformers import GenerationConfig, PreTrainedModel

from tmerge.errors import NotEnoughDiskError
from tmerge.models.copying import WrittenTensor, stored_again, write_shards
from tmerge.models.licence_files import licence_files, write_licence_files
from tmerge.models.loading import LoadedModel
from tmerge.models.place import Place
from tmerge.models.quiet import quiet
from tmerge.models.settings import own_place, write_config, write_generation_config, write_tokenizer
from tmerge.quantities import bytes_words

__all__ = ["save_checkpoint"]

# Tokenizer files, config and file system blocks on top of the weights; Gemma's tokenizer.json alone has 33 MB.
_ROOM = 64 << 20


def save_checkpoint(
    loaded: LoadedModel, folder: Path, *, max_shard_size: int | str = "5GB", dtype: torch.dtype | None = None
) -> list[Path]:
    """Write a model, its tokenizer, chat templates, generation config and licence files into a folder.

    Of a model that came from a checkpoint, the tensors that were not changed keep their bytes, and those that were, and
    all its settings, what they are called and stored as. One that came from a GGUF file is written as ``transformers``
    writes any other: its weights were unpacked at load, and `load_model` took off the marks of the packing. No second
    copy of the weights is made, except for another `dtype`. The same model gives the same bytes.

    Args:
        loaded: What to write; it is left as it is.
        folder: Made if it is not there. The caller renames it into place when all is well.
        max_shard_size: Above it the weights go into several files with an index: "5GB", "200MB", or bytes.
        dtype: Of all weights in the files; by default each is stored as it was, or, of a model that was loaded in
            another dtype than it is stored in, in that one.

    Returns:
        Every file written, sorted.

    Raises:
        NotEnoughDiskError: The checkpoint does not fit; nothing has been written.
        CheckpointError: The files that the model came from are others by now.
    """
    folder.mkdir(parents=True, exist_ok=True)
    before = set(folder.rglob("*"))
    if isinstance(loaded.place, Place):
        loaded.place.refuse_changed()
    place = own_place(loaded)
    tensors = None if place is None else stored_again(loaded, place)
    written = dtype or loaded.dtype
    if place is not None and tensors is not None and written != place.dtype:
        tensors = {name: _converted(tensor, written) for name, tensor in tensors.items()}
    if tensors is None:
        weights = sum(parameter.numel() for parameter in loaded.model.parameters()) * written.itemsize
    else:
        weights = sum(tensor.nbytes for tensor in tensors.values())
    needed, free = weights + _ROOM, shutil.disk_usage(folder).free
    if needed > free:
        raise NotEnoughDiskError(
            f"saving {loaded.reference.name} needs {bytes_words(needed)} in {str(folder)!r}, where {bytes_words(free)} "
            "are free; make room, or choose another --out"
        )
    if tensors is None:
        place = None
        _save_anew(loaded.model, folder, max_shard_size, written)
    else:
        write_shards(folder, tensors, max_shard_size)
    write_config(loaded, folder, written, place)
    write_generation_config(loaded, folder)
    write_tokenizer(loaded, folder)
    write_licence_files(licence_files(loaded.place), folder)
    return sorted(path for path in set(folder.rglob("*")) - before if path.is_file())


def _converted(tensor: WrittenTensor, dtype: torch.dtype) -> WrittenTensor:
    if not tensor.dtype.is_floating_point:
        return tensor
    return replace(tensor, dtype=dtype, read=lambda: tensor.read().to(dtype))


def _save_anew(model: PreTrainedModel, folder: Path, max_shard_size: int | str, dtype: torch.dtype) -> None:
    """As ``transformers`` writes a model; the one in memory stays as it is."""
    kept, generation = model.config.dtype, model.generation_config
    # A generation config may be one that transformers reads but refuses to write; it is written apart.
    model.generation_config = GenerationConfig()
    try:
        with quiet():
            model.save_pretrained(folder, max_shard_size=max_shard_size, state_dict=_in_dtype(model, dtype))
    finally:
        # save_pretrained writes into the config of the model in memory.
        model.config.dtype, model.generation_config = kept, generation
    (folder / "generation_config.json").unlink(missing_ok=True)


def _in_dtype(model: PreTrainedModel, dtype: torch.dtype) -> dict[str, torch.Tensor] | None:
    """The weights in another dtype, tied ones still one tensor; None for the model's own."""
    if dtype == model.dtype:
        return None
    seen: dict[int, torch.Tensor] = {}
    state = {}
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point():
            tensor = seen.setdefault(tensor.data_ptr(), tensor.to(dtype)) if tensor.numel() else tensor.to(dtype)
        state[name] = tensor
    return state
