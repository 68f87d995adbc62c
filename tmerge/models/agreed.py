"""What processes that read the same models together agree on, so that none decides it by its own machine.

A model that one of them has no room for is read by blocks in all, and a dtype that one is slow in is float32 in all.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from tmerge.errors import DeviceError
from tmerge.models.device import DTYPES, SLOW_VARIABLE, available_memory, multiplies_fast, pick_device
from tmerge.processes import Processes, on_this_machine

__all__ = ["computing_alike", "least_share", "own_share", "sharers"]


def sharers(device: torch.device) -> int:
    """How many of a run's processes on this machine share a device: of cards each has one, where there are enough."""
    count = on_this_machine()
    return math.ceil(count / torch.cuda.device_count()) if device.type == "cuda" else count


def own_share(device: torch.device) -> int | None:
    """Bytes that this process can take on a device that it shares; None of a single one, whom the device tells."""
    count = sharers(device)
    return None if count == 1 else available_memory(device) // count


def least_share(device: torch.device, processes: Processes) -> int | None:
    """Bytes that each of the processes can take: what the one with the least can; called by all of them.

    None of a single one, which asks the device when it has to know.
    """
    if processes.count == 1:
        return None
    return min(processes.gathered(available_memory(device) // sharers(device)))


@contextmanager
def computing_alike(device: str, processes: Processes) -> Iterator[None]:
    """While open, all processes compute in the same number formats; entered by all of them.

    Args:
        device: As the recipe says it.
        processes: Of the run.

    Raises:
        DeviceError: They would compute on devices of several kinds, which round otherwise.
    """
    if processes.count == 1:
        yield
        return
    here, before = pick_device(device), os.environ.get(SLOW_VARIABLE)
    kinds = processes.gathered(here.type)
    for rank, kind in enumerate(kinds):
        if kind != kinds[0]:
            raise DeviceError(
                f"device {device!r} is {kinds[0]} in process 0 and {kind} in process {rank} of {len(kinds)}; set "
                "device: cpu, or begin them on machines that are alike"
            )
    slow = [name for name, dtype in DTYPES.items() if not multiplies_fast(dtype, here)]
    of_all = sorted({name for names in processes.gathered(slow) for name in names})
    os.environ[SLOW_VARIABLE] = ",".join(of_all)
    try:
        yield
    finally:
        if before is None:
            os.environ.pop(SLOW_VARIABLE, None)
        else:
            os.environ[SLOW_VARIABLE] = before
