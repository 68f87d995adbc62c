"""What counts as a linear module that can be read and written as it is: ``Linear`` and ``Conv1D``, unquantised."""

from __future__ import annotations

import torch
from torch import nn
from transformers.models.falcon.modeling_falcon import FalconLinear
from transformers.pytorch_utils import Conv1D

from tmerge.errors import UnsupportedModelError

__all__ = ["check_linear", "features_of"]

_PLAIN_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
# Forward passes that compute y = W x + b from `weight` and `bias` and nothing else. A subclass that overrides
# forward (every quantised Linear does) computes something else, whatever it is called.
_PLAIN_FORWARDS = (nn.Linear.forward, Conv1D.forward, FalconLinear.forward)


def check_linear(module: nn.Module, name: str) -> None:
    """Make sure that a module computes y = W x + b from a plain floating-point weight.

    Args:
        module: What was found under a projection's name.
        name: Its qualified name, for the message.

    Raises:
        UnsupportedModelError: It is quantised, an adapter, re-parametrised, or of another kind.
    """
    kind = type(module).__name__
    if hasattr(module, "base_layer"):
        raise UnsupportedModelError(
            f"{name} is wrapped in an adapter ({kind}): merge the adapter into the model first (merge_and_unload)"
        )
    if hasattr(module, "parametrizations"):
        raise UnsupportedModelError(f"{name} is re-parametrised ({kind}): remove the parametrisation first")
    weight = getattr(module, "weight", None)
    if (
        isinstance(module, (nn.Linear, Conv1D))
        and type(module).forward in _PLAIN_FORWARDS
        and type(weight) is nn.Parameter
        and type(weight.data) is torch.Tensor
        and weight.dim() == 2
        and weight.dtype in _PLAIN_DTYPES
    ):
        return
    if not isinstance(weight, torch.Tensor):
        held = ", ".join([key for key, _ in (*module.named_parameters(), *module.named_buffers())][:4]) or "no weights"
    else:
        held = f"a weight of {str(weight.dtype).removeprefix('torch.')}"
    raise UnsupportedModelError(
        f"{name} is a {kind} with {held}, not a plain floating-point Linear or Conv1D: if it is quantised, load an "
        "unquantised checkpoint of the model, or a GGUF file, which tmerge dequantises"
    )


def features_of(module: nn.Module) -> tuple[int, int]:
    """Outputs and inputs ``(out, in)`` of a module that `check_linear` accepts; the class gives the orientation."""
    first, second = module.get_parameter("weight").shape
    return (second, first) if isinstance(module, Conv1D) else (first, second)
