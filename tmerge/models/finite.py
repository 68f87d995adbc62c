"""NaN and infinity among a model's weights: found as soon as it is in memory, and named by the tensor in its file.

A weight that is not finite makes every feature and every score NaN, far from where it came from. One pass over each
tensor without a copy finds it: NaN spreads through minimum and maximum, and an infinity is one of them.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator
from pathlib import Path

import gguf
import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor

from tmerge.errors import CheckpointError, DeviceError
from tmerge.models.reference import ModelReference

__all__ = ["check_finite", "gguf_tensors", "safetensors_tensors"]


def check_finite(
    reference: ModelReference,
    parameters: Iterable[tuple[str, Tensor]],
    stored: Callable[[], Iterable[tuple[str, Tensor]]],
) -> None:
    """Refuse weights that are not finite.

    Args:
        reference: Named in errors.
        parameters: By name, as they were loaded, in the dtype that they are to be computed with.
        stored: Gives (name, tensor) of what the model took from its file, one at a time; read only where something was
            found, to tell which tensor it is there, or that the values came out of range in the model's dtype alone.

    Raises:
        CheckpointError: They are not finite in the file.
        DeviceError: They are, but too large for the dtype.
    """
    spoilt = [(name, parameter) for name, parameter in parameters if not _finite(parameter)]
    if not spoilt:
        return
    if damaged := [(name, *_counts(tensor)) for name, tensor in stored() if not _finite(tensor)]:
        name, bad, total = damaged[0]
        raise CheckpointError(
            f"{reference.text!r}: {bad:,} of the {total:,} values of {name} are not finite (NaN or infinity)"
            f"{_more(len(damaged))}; the weights are damaged: download or convert the model again"
        )
    name, (bad, total) = spoilt[0][0], _counts(spoilt[0][1])
    dtype = spoilt[0][1].dtype
    remedy = "bfloat16 or float32" if dtype == torch.float16 else "float32"
    raise DeviceError(
        f"{reference.text!r}: {bad:,} of the {total:,} values of {name} are beyond the range of "
        f"{str(dtype).removeprefix('torch.')} (up to {torch.finfo(dtype).max:.5g}){_more(len(spoilt))}; set dtype: "
        f"{remedy}"
    )


def _finite(tensor: Tensor) -> bool:
    if not tensor.numel() or not tensor.is_floating_point():
        return True
    low, high = torch.aminmax(tensor.detach())
    return bool(torch.isfinite(low) & torch.isfinite(high))


def _counts(tensor: Tensor) -> tuple[int, int]:
    """Values that are not finite, and values in all."""
    return int((~torch.isfinite(tensor)).sum()), tensor.numel()


def _more(count: int) -> str:
    return "" if count == 1 else f", and so are some of {count - 1} other tensor{'s' if count > 2 else ''}"


def safetensors_tensors(files: Iterable[Path], left_out: Collection[str] = ()) -> Iterator[tuple[str, Tensor]]:
    """Name and values of every stored tensor, one in memory at a time.

    Args:
        files: To read.
        left_out: Names to pass over: a mask holds infinities by right, and a head beside the model spoils nothing.
    """
    for path in files:
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118 - not a mapping
                if name not in left_out:
                    yield name, file.get_tensor(name)


def gguf_tensors(path: Path) -> Iterator[tuple[str, Tensor]]:
    """Name and unpacked values of every tensor of a GGUF file, one in memory at a time."""
    for tensor in gguf.GGUFReader(path).tensors:
        with np.errstate(all="ignore"):  # NaN is what is looked for
            values = gguf.dequantize(tensor.data, tensor.tensor_type)
        yield tensor.name, torch.from_numpy(np.array(values, copy=True))
