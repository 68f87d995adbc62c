"""Writing a LoRA adapter as PEFT writes it: ``PeftModel.from_pretrained(base, folder)`` reads it, and the like.

Of each changed module B and A are stored with the scale 1 (``lora_alpha = r``), and a changed bias as it became. PEFT
itself is not needed. `verify_adapter` proves that base and adapter are the model that was scored.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from tmerge.errors import CheckpointError, SavedModelMismatchError
from tmerge.models.adapter import Adapter
from tmerge.models.adapter_changes import AdapterChanges
from tmerge.models.adapter_config import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from tmerge.models.loading import LoadedModel
from tmerge.models.reference import ModelReference
from tmerge.store import Pieces, write_tensors

__all__ = ["ModuleChange", "AdapterSize", "save_adapter", "verify_adapter"]

_PREFIX = "base_model.model."
# Of a change's largest entry, how far the product of its factors may be off.
_FACTORED = 1e-5


@dataclass(frozen=True)
class ModuleChange:
    """Of one linear module.

    Attributes:
        module: Its name in the model.
        up: (out, r) B, float32.
        down: (r, in) A, float32; the weight (out, in) is changed by B A. r may be 0.
        bias: (out,) as it became; None where it stays, or there is none.
    """

    module: str
    up: Tensor
    down: Tensor
    bias: Tensor | None


@dataclass(frozen=True)
class AdapterSize:
    """How large an adapter is.

    Attributes:
        rank: The highest of its modules'.
        modules: How many it changes.
        parameters: Numbers in its file.
    """

    rank: int
    modules: int
    parameters: int


def save_adapter(
    folder: Path, changes: Iterable[ModuleChange], model: PreTrainedModel, base: ModelReference, commit: str
) -> AdapterSize:
    """Write adapter_config.json and adapter_model.safetensors.

    Args:
        folder: Made if it is not there; what else is in it is left. The caller renames it into place when all is well.
        changes: Of the modules, taken one at a time; they are gathered on disk. Modules that do not change are left
            out, unless none does.
        model: That they are of: its modules tell what names are enough.
        base: How it is named.
        commit: What identifies it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    pieces = Pieces(folder)
    ranks, unchanged, biased = dict[str, int](), dict[str, tuple[int, int]](), False
    for change in changes:
        rank = change.down.shape[0]
        if rank == 0 and change.bias is None:
            unchanged[change.module] = change.up.shape[0], change.down.shape[1]
            continue
        # PEFT has no module of rank 0.
        ranks[change.module] = _add(pieces, change.module, change.up, change.down)
        if change.bias is not None:
            biased = True
            pieces.add(f"{_PREFIX}{change.module}.base_layer.bias", change.bias)
    if not ranks:
        for name, (outputs, inputs) in unchanged.items():
            ranks[name] = _add(pieces, name, torch.zeros(outputs, 0), torch.zeros(0, inputs))
    tensors = pieces.joined()
    write_tensors(folder / ADAPTER_WEIGHTS, tensors, {"format": "pt"})
    parameters = sum(tensor.numel() for tensor in tensors.values())
    del tensors
    for path in folder.glob("*.pieces"):
        path.unlink()
    config = _config(ranks, biased, model, base, commit)
    (folder / ADAPTER_CONFIG).write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return AdapterSize(max(ranks.values()), len(ranks), parameters)


def _add(pieces: Pieces, module: str, up: Tensor, down: Tensor) -> int:
    if down.shape[0] == 0:
        up, down = torch.zeros(up.shape[0], 1), torch.zeros(1, down.shape[1])
    pieces.add(f"{_PREFIX}{module}.lora_A.weight", down)
    pieces.add(f"{_PREFIX}{module}.lora_B.weight", up)
    return int(down.shape[0])


def _config(
    ranks: dict[str, int], biased: bool, model: PreTrainedModel, base: ModelReference, commit: str
) -> dict[str, Any]:
    """As ``peft.LoraConfig`` writes itself, of what is not at its default or makes a difference."""
    modules = dict(model.named_modules())
    usual = Counter(ranks.values()).most_common(1)[0][0]
    others = {name: rank for name, rank in ranks.items() if rank != usual}
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base.repo or base.text,
        "revision": None if commit.startswith("sha256:") else commit,
        "inference_mode": True,
        "init_lora_weights": True,
        "r": usual,
        "lora_alpha": usual,
        "lora_dropout": 0.0,
        "rank_pattern": others,
        "alpha_pattern": others,
        "target_modules": _enough(list(ranks), list(modules)),
        "modules_to_save": None,
        # What is stored of biases is put in the base's place whichever this says; "none" would say there are none.
        "bias": "all" if biased else "none",
        "fan_in_fan_out": all(isinstance(modules[name], Conv1D) for name in ranks),
        "use_rslora": False,
        "use_dora": False,
    }


def _enough(changed: Sequence[str], modules: Sequence[str]) -> list[str]:
    """Their last names where those say which they are, as adapters are usually written; else whole names."""
    last = sorted({name.rpartition(".")[2] for name in changed})
    meant = {name for name in modules if name.rpartition(".")[2] in last}
    return last if meant == set(changed) else sorted(changed)


def verify_adapter(
    folder: Path, loaded: LoadedModel, parts: Iterable[tuple[Sequence[str], Callable[[], None]]]
) -> None:
    """Read a saved adapter again, and hold base and adapter against the fused weights, which are made on the way.

    They may differ by how a sum is rounded: twice the last digit of the dtype that the model is stored in.

    Args:
        folder: As `save_adapter` wrote it.
        loaded: The base in memory; it is the fused model afterwards.
        parts: Names of some parameters, and what fuses them in memory.

    Raises:
        SavedModelMismatchError: They differ, or the adapter cannot be read.
    """
    try:
        changes = AdapterChanges(
            Adapter.within(ModelReference.parse(str(folder)), folder), loaded.model, repr(loaded.reference.text)
        )
    except CheckpointError as error:
        raise SavedModelMismatchError(f"{folder.name}: {error}") from error
    digit = torch.finfo(loaded.dtype).eps
    for names, fuse in parts:
        before = {name: loaded.model.get_parameter(name).detach().clone() for name in names}
        fuse()
        for name, base in before.items():
            joined, fused = changes.joined(name, base).float(), loaded.model.get_parameter(name).detach().float()
            apart, moved = (joined - fused).abs(), (fused - base.float()).abs().max()
            allowed = 2 * digit * torch.maximum(joined.abs(), fused.abs()) + _FACTORED * moved
            if not bool((apart <= allowed).all()):
                raise SavedModelMismatchError(
                    f"{folder.name}: read again and joined to its base, {name} differs from that of the fused model by "
                    f"up to {float(apart.max()):.3g}"
                )
