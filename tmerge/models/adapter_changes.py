"""What a LoRA adapter makes of its base's parameters, one at a time: never of a whole model.

Of a linear layer with weight W (out, in) and the factors A (r, in) and B (out, r):

    LoRA (arXiv 2106.09685)    W' = W + s B A                     s = alpha / r, or alpha / sqrt(r) (rsLoRA)
    DoRA (arXiv 2402.09353)    W' = m / |W + s B A| (W + s B A)   |.| and m (out,): of each output's row

An embedding's are stored as A (r, V) and B (n, r), and W' = W + s (B A)^T. Parameters that were trained whole
(``modules_to_save``, biases) are stored as they became. PEFT computes with the same W'.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from tmerge.errors import CheckpointError
from tmerge.models.adapter import Adapter
from tmerge.models.checkpoint import file_state

__all__ = ["AdapterChanges"]

_PREFIX = "base_model.model."
_FACTOR = re.compile(
    r"(?P<module>.+)\.lora_(?P<part>A|B|embedding_A|embedding_B|magnitude_vector)(\.(?!weight|bias)\w+)?"
    r"(\.(?P<kind>weight|bias))?"
)
_WHOLE = re.compile(r"(?P<module>.+?)(\.base_layer|\.modules_to_save(\.\w+)?)?\.(?P<kind>weight|bias)")


@dataclass(frozen=True)
class _LowRank:
    """How one module's weight is changed: the stored names of its factors.

    Attributes:
        down, up: Of A and of B.
        scale: s.
        magnitude: Of m, of a DoRA.
        transposed: Whether the base stores its weight as (in, out).
    """

    down: str
    up: str
    scale: float
    magnitude: str | None
    transposed: bool


@dataclass(frozen=True)
class _BiasOfUp:
    """A bias that B has, times s."""

    name: str
    scale: float


@dataclass(frozen=True)
class _Whole:
    """A parameter that was trained whole, by its stored name."""

    name: str


class AdapterChanges:
    """An adapter held against its base.

    Args:
        adapter: Whose.
        model: The base, on any device: modules and shapes decide whether it is one.
        base: As it is named in errors.

    Raises:
        CheckpointError: It was made for another model, or holds what is not read; one line.
    """

    def __init__(self, adapter: Adapter, model: PreTrainedModel, base: str) -> None:
        self.adapter, self._base = adapter, base
        self._modules = dict(model.named_modules())
        self._shapes = {name: tuple(each.shape) for name, each in model.named_parameters(remove_duplicate=False)}
        self._state = file_state(adapter.weights)
        self._changes = self._found()
        self._settle_ties(model)

    @property
    def parameters(self) -> list[str]:
        """Names of the base's parameters that are changed, sorted."""
        return sorted(self._changes)

    @cached_property
    def rank(self) -> int:
        """The highest of its low-rank changes; 0 where it has none."""
        downs = [change.down for change in self._changes.values() if isinstance(change, _LowRank)]
        return max((self._shape(down)[0] for down in downs), default=0)

    @property
    def reads_base(self) -> list[str]:
        """Parameters whose change cannot be told without the base's own values: of a DoRA, and those trained whole."""
        return [
            name
            for name in self.parameters
            if isinstance(change := self._changes[name], _Whole)
            or (isinstance(change, _LowRank) and change.magnitude is not None)
        ]

    def change(self, name: str, base: Callable[[], Tensor]) -> Tensor:
        """W' - W of a parameter, float32, on the CPU.

        Args:
            name: One of `parameters`.
            base: Gives the base's values; asked only of those of `reads_base`.

        Raises:
            CheckpointError: The adapter's file changed meanwhile, or holds what is not finite.
        """
        return self._finite(name, self._change(name, base))

    def _change(self, name: str, base: Callable[[], Tensor]) -> Tensor:
        change = self._changes[name]
        if isinstance(change, _Whole):
            return self._read(change.name) - _plain(base())
        if isinstance(change, _BiasOfUp):
            return change.scale * self._read(change.name)
        product = change.scale * (self._read(change.up) @ self._read(change.down))
        if change.magnitude is not None:
            own = _plain(base())
            own = own.T if change.transposed else own
            moved = own + product
            length = torch.linalg.vector_norm(moved, dim=1, keepdim=True)
            product = self._read(change.magnitude).reshape(-1, 1) / length * moved - own
        return product.T.contiguous() if change.transposed else product

    def joined(self, name: str, base: Tensor) -> Tensor:
        """W' of a parameter, summed in float32 and rounded to the base's dtype, on its device; W of any other."""
        if name not in self._changes:
            return base
        change, own = self._changes[name], _plain(base)
        joined = self._read(change.name) if isinstance(change, _Whole) else own + self.change(name, lambda: own)
        return self._finite(name, joined.to(base.dtype)).to(base.device)

    def _finite(self, name: str, tensor: Tensor) -> Tensor:
        if torch.isfinite(tensor).all():
            return tensor
        dtype = str(tensor.dtype).removeprefix("torch.")
        raise self._amiss(
            f"with it, {name} of {self._base} has values beyond the range of {dtype}; set dtype: float32, or download "
            "the adapter again"
        )

    def __contains__(self, name: object) -> bool:
        return name in self._changes

    def _read(self, name: str) -> Tensor:
        path = self.adapter.weights
        try:
            with safe_open(path, "pt") as file:
                tensor: Tensor = file.get_tensor(name).float()
            changed = file_state(path) != self._state
        except (OSError, SafetensorError):
            changed = True
        if changed:
            raise CheckpointError(f"{str(path)!r} changed while it was read; start again when it is written")
        if not torch.isfinite(tensor).all():
            raise self._amiss(f"{name} has values that are not finite (NaN or infinity); download the adapter again")
        return tensor

    def _found(self) -> dict[str, _LowRank | _BiasOfUp | _Whole]:
        """Parameter -> its change."""
        factors: dict[str, dict[str, str]] = {}
        changes: dict[str, _LowRank | _BiasOfUp | _Whole] = {}
        for stored in sorted(self.adapter.headers):
            name = stored.removeprefix(_PREFIX)
            if ".original_module." in name:
                continue  # the base's own, as older releases of PEFT stored it beside what it became
            if (factor := _FACTOR.fullmatch(name)) is not None:
                part = factor["part"] + ("_bias" if factor["kind"] == "bias" else "")
                factors.setdefault(factor["module"], {})[part] = stored
            elif ".lora_" not in name and (whole := _WHOLE.fullmatch(name)) is not None:
                self._module(whole["module"])
                self._hold(stored, f"{whole['module']}.{whole['kind']}", self._shape(stored))
                changes[f"{whole['module']}.{whole['kind']}"] = _Whole(stored)
            else:
                raise self._amiss(
                    f"{stored} is of no kind that is read; merge it into its base (peft: merge_and_unload), and give "
                    "the merged model's folder"
                )
        for module, parts in factors.items():
            changes |= self._low_rank(module, parts)
        if not changes:
            raise self._amiss("there is nothing in it; download the adapter again")
        return changes

    def _low_rank(self, module: str, parts: Mapping[str, str]) -> dict[str, _LowRank | _BiasOfUp]:
        """Of one module."""
        own, config = self._module(module), self.adapter.config
        embedded = "embedding_A" in parts
        names = ("embedding_A", "embedding_B") if embedded else ("A", "B")
        if missing := [name for name in names if name not in parts]:
            raise self._amiss(f"lora_{missing[0]} of {module} is missing; download the adapter again")
        kinds: tuple[type[nn.Module], ...] = (nn.Embedding,) if embedded else (nn.Linear, Conv1D)
        if not isinstance(own, kinds):
            raise self._amiss(f"it changes {module}, which in {self._base} is a {type(own).__name__}, and is not read")
        unknown = set(parts) - {*names, "magnitude_vector", "B_bias"}
        if unknown or (embedded and len(parts) > len(names)):
            raise self._amiss(f"{sorted(parts.values())[-1]} is of no kind that is read")
        down, up = (parts[name] for name in names)
        rank = config.rank(module)
        if self._shape(down)[:1] != (rank,) or self._shape(up)[1:] != (rank,):
            raise self._amiss(
                f"{module} has factors of the shapes {self._shape(down)} and {self._shape(up)}, and its rank is {rank} "
                "by adapter_config.json; download the adapter again"
            )
        product = self._shape(up)[:1] + self._shape(down)[1:]
        transposed = embedded or isinstance(own, Conv1D)
        self._hold(module, f"{module}.weight", product[::-1] if transposed else product)
        if config.use_dora and not embedded and "magnitude_vector" not in parts:
            raise self._amiss(f"lora_magnitude_vector of {module} is missing, and it is a DoRA; download it again")
        magnitude = parts.get("magnitude_vector") if config.use_dora else None
        if magnitude is not None and self._shape(magnitude) not in (product[:1], (product[0], 1), (1, product[0])):
            raise self._amiss(f"{magnitude} has the shape {self._shape(magnitude)}, and {product[:1]} is expected")
        scale = config.scale(module)
        found: dict[str, _LowRank | _BiasOfUp] = {
            f"{module}.weight": _LowRank(down, up, scale, magnitude, transposed),
        }
        if "B_bias" in parts:
            self._hold(parts["B_bias"], f"{module}.bias", self._shape(parts["B_bias"]))
            found[f"{module}.bias"] = _BiasOfUp(parts["B_bias"], scale)
        return found

    def _settle_ties(self, model: PreTrainedModel) -> None:
        """Of an embedding that is the head too, what is learned of one of them would part them."""
        ends = [model.get_input_embeddings(), model.get_output_embeddings()]
        matrices = [getattr(end, "weight", None) for end in ends]
        if matrices[0] is None or matrices[0] is not matrices[1]:
            return
        named = {id(module): name for name, module in self._modules.items()}
        names = [f"{named[id(end)]}.weight" for end in ends]
        changed = [name for name in names if name in self._changes]
        if not changed:
            return
        if not self.adapter.config.ensure_weight_tying:
            raise self._amiss(
                f"it changes {changed[0]}, which {self._base} has as one with {names[1 - names.index(changed[0])]}: it "
                "would part them; merge it into its base (peft: merge_and_unload), untied, and give that folder"
            )
        change = self._changes[changed[0]]
        self._changes = {name: each for name, each in self._changes.items() if name not in names} | {names[0]: change}

    def _module(self, name: str) -> nn.Module:
        if name not in self._modules:
            raise self._amiss(f"it changes {name}, which {self._base} has not; {self._other}")
        return self._modules[name]

    def _hold(self, what: str, parameter: str, shape: tuple[int, ...]) -> None:
        """Refuse a change of another shape than the parameter's."""
        own = self._shapes.get(parameter)
        if own is None:
            raise self._amiss(f"it changes {parameter}, which {self._base} has not; {self._other}")
        if own != shape:
            raise self._amiss(
                f"{what} is for a weight of the shape {shape}, and {parameter} of {self._base} has {own}; {self._other}"
            )

    @property
    def _other(self) -> str:
        """What to do where it is another model's."""
        named = self.adapter.config.base_model_name_or_path
        return "name the base that it was trained on" + (f" ({named})" if named else "")

    def _shape(self, stored: str) -> tuple[int, ...]:
        return self.adapter.headers[stored].shape

    def _amiss(self, words: str) -> CheckpointError:
        return CheckpointError(f"the adapter {self.adapter.reference.text!r}: {words}")


def _plain(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", torch.float32)
