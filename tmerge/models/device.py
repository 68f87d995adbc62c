"""Where a model goes and in which number format, and whether it fits there."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import psutil
import torch

from tmerge.errors import DeviceError, NotEnoughMemoryError
from tmerge.quantities import bytes_words

__all__ = [
    "DEVICE_VARIABLE",
    "DTYPES",
    "SLOW_VARIABLE",
    "available_memory",
    "check_memory",
    "fits",
    "give_back_memory",
    "held_dtype",
    "is_out_of_memory",
    "memory_errors",
    "multiplies_fast",
    "out_of_memory_as",
    "pick_device",
    "pick_dtype",
    "wait_for",
]

DEVICE_VARIABLE = "TMERGE_DEVICE"
"""An environment variable that says what ``auto`` is, where torch cannot be believed: on ZeroGPU torch says that there
is a GPU in a process that has none. It enters no recipe and no key of a stage: ``auto`` stays ``auto``."""

SLOW_VARIABLE = "TMERGE_SLOW_DTYPES"
"""An environment variable that names, with commas between, dtypes that a CPU counts as slow in whatever its flags say:
where several processes work together, what one of them is slow in (`tmerge.models.agreed`)."""

DTYPES: dict[str, torch.dtype] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}

# dtype -> the processor's flags (x86, then ARM) any of which multiplies in it, and what says that oneDNN, which does
# torch's products on a CPU, knows how.
_INSTRUCTIONS: dict[torch.dtype, tuple[tuple[str, ...], str]] = {
    torch.bfloat16: (("avx512_bf16", "amx_bf16", "bf16", "sve_bf16"), "_is_mkldnn_bf16_supported"),
    torch.float16: (("avx512_fp16", "amx_fp16", "fp16_arith"), "_is_mkldnn_fp16_supported"),
}

# Of the memory that is free, what a model may take: features, logits and another model go beside it.
_OF_WHAT_IS_FREE = 0.6

# Where the system shows the groups that limit processes, and which of them this process is in.
_CGROUP, _OWN_GROUPS = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")
# Of a group, version 2 and 1: the limit, what is used, and of what kinds.
_LIMIT_FILES = (
    ("memory.max", "memory.current", "memory.stat"),
    ("memory.limit_in_bytes", "memory.usage_in_bytes", "memory.stat"),
)
_CACHED = ("active_file", "inactive_file")


def pick_device(device: str | torch.device) -> torch.device:
    """The device by name.

    Args:
        device: ``auto`` (what `DEVICE_VARIABLE` says, else CUDA, else MPS, else CPU),
            ``cpu``, ``cuda``, ``cuda:1``, ``mps`` and so on.

    Raises:
        DeviceError: No such device, or it is not on this machine.
    """
    cuda, mps = torch.cuda.is_available(), torch.backends.mps.is_available()
    if str(device) == "auto":
        named = os.environ.get(DEVICE_VARIABLE, "auto")
        if named != "auto":
            return pick_device(named)
        return torch.device("cuda" if cuda else "mps" if mps else "cpu")
    here = ", ".join(["auto", "cpu"] + ["cuda"] * cuda + ["mps"] * mps)
    try:
        chosen = torch.device(device)
    except RuntimeError:
        raise DeviceError(f"device {str(device)!r} is none that torch knows; on this machine: {here}") from None
    there = {"cpu": True, "cuda": cuda, "mps": mps}.get(chosen.type, False)
    if chosen.type == "cuda" and cuda and chosen.index is not None:
        there = chosen.index < torch.cuda.device_count()
        here = f"{here} (0 to {torch.cuda.device_count() - 1})"
    if not there:
        raise DeviceError(
            f"device {str(device)!r} is not on this machine, or this torch is not built for it; use {here}"
        )
    return chosen


def pick_dtype(dtype: str | torch.dtype, stored: torch.dtype) -> torch.dtype:
    """The dtype by name; ``auto`` is the one that the checkpoint is stored in.

    Raises:
        DeviceError: Not a dtype that models are computed in.
    """
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype == "auto":
        return stored
    if dtype not in DTYPES:
        raise DeviceError(f"dtype {dtype!r} is none that tmerge computes in; use auto, {', '.join(DTYPES)}")
    return DTYPES[dtype]


def held_dtype(asked: str | torch.dtype, dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """In which weights of a dtype are held: float32 where none was asked for and the device is slow in theirs.

    Args:
        asked: As the recipe says it.
        dtype: What `pick_dtype` makes of it.
        device: Where they are.
    """
    return torch.float32 if asked == "auto" and not multiplies_fast(dtype, device) else dtype


def multiplies_fast(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether a device has instructions for products in a dtype.

    A CPU without them takes three to seventy times as long as for float32. Read from the processor's own flags, which
    are the same in every run: oneDNN's word alone counts what it emulates (bfloat16 on any AVX-512), and a measurement
    would vary with whatever else the machine does, so that one recipe would not give the same weights twice. Where
    this torch does not tell the flags (before `torch.cpu.get_capabilities`), a CPU counts as having none.
    """
    if device.type != "cpu" or dtype not in _INSTRUCTIONS:
        return True
    if str(dtype).removeprefix("torch.") in os.environ.get(SLOW_VARIABLE, "").split(","):
        return False
    flags, onednn = _INSTRUCTIONS[dtype]
    capabilities: Mapping[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    used = getattr(torch.ops.mkldnn, onednn, None)
    return any(capabilities.get(flag) for flag in flags) and used is not None and bool(used())


def available_memory(device: torch.device) -> int:
    """Bytes that can still be taken on a device: a container's limit counts, swap does not."""
    if device.type == "cuda":
        # What torch has freed it keeps for the next tensor, and the system counts it as taken.
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + cached
    free = int(psutil.virtual_memory().available)
    for folder in _groups():
        for limit, used, stat in _LIMIT_FILES:
            with contextlib.suppress(OSError, ValueError):
                counts = dict(line.split() for line in (folder / stat).read_text().splitlines())
                # Pages of files that were read count as used, and are given up when memory is asked for; so do those
                # of the groups inside it, which version 1 counts apart.
                cached = sum(int(counts.get(f"total_{kind}", counts.get(kind, 0))) for kind in _CACHED)
                free = min(free, int((folder / limit).read_text()) - int((folder / used).read_text()) + cached)
    return max(free, 0)


def _groups() -> list[Path]:
    """Folders of the groups that limit this process: its own, as a scheduler gives it, and those around it."""
    tops, own = [_CGROUP, _CGROUP / "memory"], []
    with contextlib.suppress(OSError, ValueError):
        for line in _OWN_GROUPS.read_text().splitlines():
            number, kinds, path = line.split(":", 2)
            if (number == "0" or "memory" in kinds.split(",")) and path.strip("/"):
                own.append(path.strip("/"))
    inside = [top / path for top in tops for path in own]
    around = [parent for folder in inside for parent in folder.parents if parent.is_relative_to(_CGROUP)]
    return list(dict.fromkeys([*tops, *inside, *around]))


def fits(needed: int, device: torch.device, beside: int = 0, free: int | None = None) -> bool:
    """Whether a model leaves room on a device for what is computed with it.

    Args:
        needed: Its bytes.
        device: Where.
        beside: Bytes that will have been taken by then.
        free: Bytes that can be taken there; None asks the device.
    """
    return needed <= _OF_WHAT_IS_FREE * ((available_memory(device) if free is None else free) - beside)


def give_back_memory() -> None:
    """Give back what is not in use any more: the garbage, the accelerator's blocks, and the C library's."""
    gc.collect()
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.empty_cache()
    if torch.backends.mps.is_available():
        torch.mps.empty_cache()
    trim: Callable[[int], int] | None = None
    with contextlib.suppress(OSError, AttributeError):
        trim = ctypes.CDLL("libc.so.6").malloc_trim
    if trim is not None:
        trim(0)


def wait_for(device: torch.device) -> None:
    """Let a device do all that it was given, so that what follows can be timed."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def check_memory(what: str, needed: int, device: torch.device) -> None:
    """Refuse what cannot fit before any of it is loaded.

    Args:
        what: Named in the message.
        needed: Bytes.
        device: Where they would go.

    Raises:
        NotEnoughMemoryError: More than there is.
    """
    free = available_memory(device)
    if needed > free:
        raise NotEnoughMemoryError(
            f"{what} needs {bytes_words(needed)} on {device}, where {bytes_words(free)} are free; use a smaller model, "
            "dtype: bfloat16, or a machine with more memory"
        )


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a device, or the host, ran out of memory: the CPU's allocator and Apple's have no class of their own."""
    said = "can't allocate memory" in str(error) or "out of memory" in str(error).lower()
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or (isinstance(error, RuntimeError) and said)


@contextlib.contextmanager
def out_of_memory_as(error_of: Callable[[], Exception]) -> Iterator[None]:
    """Raise another error where a device, or the host, runs out of memory inside.

    Args:
        error_of: Makes it, when the first error's traceback keeps nothing alive any more.
    """
    try:
        yield
        return
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
    raise error_of()


def memory_errors(what: str, device: torch.device) -> contextlib.AbstractContextManager[None]:
    """Within it running out of memory is a `NotEnoughMemoryError`."""
    return out_of_memory_as(
        lambda: NotEnoughMemoryError(
            f"{what} does not fit in memory on {device} ({bytes_words(available_memory(device))} free); "
            "use a smaller model, dtype: bfloat16, or a machine with more memory"
        )
    )
