"""A head that is stored beside the embedding that the config has it tied to.

Most often both have the same values, and one of them is enough. Where they have not, the config is wrong about the
files: ``transformers`` from release 5 on leaves the two apart, with a remark in its log, and earlier ones take the
embedding for the head. The files count, and the config is put right.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from tmerge.models.checkpoint import read_safetensors_header
from tmerge.models.renaming import renamed

__all__ = ["stored_apart", "untie"]


def stored_apart(model: PreTrainedModel, weights: Sequence[Path]) -> tuple[str, str] | None:
    """Two tensors of the files that the model has as one, and that have other values.

    Args:
        model: On the meta device.
        weights: Its safetensors files.

    Returns:
        Their names in the files, the one that would be lost first; None where there are none.
    """
    tied: Mapping[str, str] = getattr(model, "all_tied_weights_keys", None) or {}
    if not tied:
        return None
    headers = {path: read_safetensors_header(path) for path in weights}
    names = renamed(model, {name: entry for header in headers.values() for name, entry in header.items()}) or {}
    stored = {name: as_stored for as_stored, (name, _) in names.items()}
    files = {name: path for path, header in headers.items() for name in header}

    def read(name: str) -> Tensor:
        with safe_open(files[name], "pt") as file:
            tensor: Tensor = file.get_tensor(name)
        return tensor

    for other, first in tied.items():
        if other in stored and first in stored and not torch.equal(read(stored[other]), read(stored[first])):
            return stored[other], stored[first]
    return None


def untie(config: PreTrainedConfig) -> None:
    """Have a config say that head and embedding are two."""
    for part in (config, config.get_text_config(decoder=True)):
        if getattr(part, "tie_word_embeddings", False):
            part.tie_word_embeddings = False
