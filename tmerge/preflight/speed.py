"""How fast this machine is: a few short timings, taken once when it is calm and kept with their date.

An estimate made of what the machine happens to do at that moment would be another one at every look. So the fastest of
several short calls counts, on a processor in one thread alone: beside other work a short call still has a core to
itself now and then, and a call that all cores share waits for the slowest. It is kept in tmerge's cache, and taken
again (the faster one stays) only where something else was busy when it was measured, until two tries agree: in a
container the neighbours of the whole host are seen, who may never rest. Whoever wants it anew deletes
``speed.json`` there.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import math
import platform
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil
import torch

from tmerge.models.demo import cache_folder
from tmerge.store import write_text

__all__ = ["SPEED_FILE", "Timing", "timing_of"]

SPEED_FILE = "speed.json"
"""In tmerge's cache folder; it can be deleted at any time."""

# How long one thing is timed, in calls after a first that warms up.
_AT_LEAST = 0.25
# Of all processors, what others may take while the machine still counts as calm; looked at for so long.
_CALM_PERCENT = 20.0
_LOOK_SECONDS = 0.1
# A process that has measured beside something busy answers alike for so long before it tries again.
_ALIKE_SECONDS = 600.0
# Tries, so long or a process apart, that settle a timing beside something busy, and what they may differ by.
_AGREEING = 2
_AGREE_WITHIN = 0.1

_asked: dict[tuple[Path, str], tuple[float, Timing]] = {}


@dataclass(frozen=True)
class Timing:
    """One timing.

    Attributes:
        seconds: Of one call, the fastest of several.
        measured: Date (ISO 8601) of it.
        calm: Whether nothing else was busy then.
        agreeing: How many tries came to about the same seconds, this one included.
    """

    seconds: float
    measured: str
    calm: bool
    agreeing: int = 1

    @property
    def settled(self) -> bool:
        """Whether it need not be measured again."""
        return self.calm or self.agreeing >= _AGREEING


def timing_of(
    what: str,
    prepare: Callable[[], Callable[[], Any]],
    device: torch.device,
    dtype: torch.dtype,
) -> Timing:
    """How long something takes here, on a processor in one thread: as it was kept, or measured now.

    Args:
        what: Names it, with all its sizes; the same name has to be the same work.
        prepare: Makes what is called; itself called only where something is measured.
        device: That it runs on.
        dtype: That it computes in.

    Returns:
        The same at every call, and in every process, of this machine; but for faster ones that replace what was
        measured beside something busy.
    """
    path, key = cache_folder() / SPEED_FILE, _key(what, device, dtype)
    asked, known = _asked.get((path, key), (-math.inf, None))
    if known is not None and time.monotonic() - asked < _ALIKE_SECONDS:
        return known
    kept = _read(path).get(key)
    if kept is None or not kept.settled:
        calm = _busy_percent() < _CALM_PERCENT
        with _one_thread():
            fastest = _fastest(prepare())
        timing = Timing(fastest, datetime.datetime.now(datetime.timezone.utc).date().isoformat(), calm)
        agrees = kept is not None and abs(timing.seconds - kept.seconds) <= _AGREE_WITHIN * kept.seconds
        # Whatever else the machine does can only slow a call down: the faster of two is the better one.
        if kept is None or timing.seconds < kept.seconds or calm or agrees:
            fastest = timing.seconds if kept is None else min(timing.seconds, kept.seconds)
            agreeing = kept.agreeing + 1 if kept is not None and agrees else 1
            kept = Timing(fastest, timing.measured, calm, agreeing)
            _keep(path, key, kept)
    _asked[path, key] = time.monotonic(), kept
    return kept


def _key(what: str, device: torch.device, dtype: torch.dtype) -> str:
    """What decides a timing: another processor, torch or dtype has another one."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else _processor()
    return ", ".join((what, device.type, name, f"torch {torch.__version__}", str(dtype).removeprefix("torch.")))


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _processor() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _busy_percent() -> float:
    """Of all processors, while this thread does nothing."""
    return psutil.cpu_percent(interval=_LOOK_SECONDS)


def _fastest(action: Callable[[], Any]) -> float:
    """Seconds of the fastest call."""
    action()
    fastest, until = math.inf, time.perf_counter() + _AT_LEAST
    while (began := time.perf_counter()) < until:
        action()
        fastest = min(fastest, time.perf_counter() - began)
    return fastest


def _read(path: Path) -> dict[str, Timing]:
    """What is kept. A file that cannot be read, or entries that are no timings, are as if they were not there."""
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    timings = {}
    for key, entry in stored.items() if isinstance(stored, dict) else ():
        with contextlib.suppress(TypeError, ValueError):
            timing = Timing(**entry)
            datetime.date.fromisoformat(timing.measured)
            if 0 < float(timing.seconds) < math.inf and isinstance(timing.calm, bool) and type(timing.agreeing) is int:
                timings[key] = timing
    return timings


def _keep(path: Path, key: str, timing: Timing) -> None:
    """Add to the file; where nothing can be written, the process alone remembers it."""
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        kept = {**_read(path), key: timing}
        # Two processes may write at once; the last one's file stays, and is whole.
        write_text(path, json.dumps({name: asdict(entry) for name, entry in kept.items()}, indent=1), shared=True)
