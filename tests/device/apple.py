"""An accelerator that calls itself ``mps`` and, as Apple's do, has no float64: torch's ``meta``, under that name.

What lies on the CPU is real and keeps its values, so that whole steps of a merge run as they are. A float64 tensor on
the device raises, however it came to be, and so does one that becomes float64 on its way to the CPU: the device is what
converts it (torch's ``copy_from_mps_``). What is moved from the device is ones, and a value read of it is one.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

APPLE = torch.device("mps")

_META = torch.device("meta")
_DEVICE_OF = Tensor.device.__get__  # type: ignore[attr-defined]
_ATEN = torch.ops.aten


class _Named(TorchFunctionMode):
    """Who asks where a tensor of ``meta`` lies hears ``mps``, and what is put there goes to ``meta``."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func == _DEVICE_OF:
            return APPLE if args[0].is_meta else func(*args)
        return func(*tree_map(_real, args), **tree_map(_real, kwargs or {}))


def _real(value: Any) -> Any:
    return _META if isinstance(value, (str, torch.device)) and str(value).partition(":")[0] == "mps" else value


class _Float32Only(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # Torch's own code, and this, hear where tensors really lie.
        with torch._C.DisableTorchFunction():
            if torch.is_inference_mode_enabled():
                # Operations that are made of others come whole there.
                with self:
                    made = func.decompose(*args, **(kwargs or {}))
                if made is not NotImplemented:
                    return made
            out = _done(func, args, kwargs or {})
            leaves = [value for value in tree_leaves(out) if isinstance(value, Tensor)]
            came_from_it = any(value.is_meta for value in tree_leaves(args) if isinstance(value, Tensor))
            copies = func in (_ATEN._to_copy.default, _ATEN.copy_.default)
            for value in leaves:
                if value.dtype in (torch.float64, torch.complex128) and (value.is_meta or (copies and came_from_it)):
                    raise TypeError(f"{func} makes a tensor of {value.dtype} of {APPLE}, which has none")
        return out


def _done(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """What an operation gives; ones where it takes values from the device."""
    if func is _ATEN._local_scalar_dense.default and args[0].is_meta:
        return {torch.bool: True}.get(args[0].dtype, 1.0 if args[0].is_floating_point() else 1)
    if func is _ATEN._to_copy.default and args[0].is_meta and kwargs.get("device", _META) != _META:
        return torch.ones(args[0].shape, dtype=kwargs.get("dtype") or args[0].dtype)
    if func is _ATEN.copy_.default and args[1].is_meta and not args[0].is_meta:
        return args[0].fill_(1)
    return func(*args, **kwargs)


@contextmanager
def apple() -> Iterator[None]:
    """Within it `APPLE` is there."""
    with _Float32Only(), _Named():
        yield
