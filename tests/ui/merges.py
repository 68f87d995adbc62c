"""Merges that do one thing each, for runs' processes to call: they are found there by their names.

Nothing heavy is imported, so that such a process is there in a moment.
"""

import os
import time
from types import SimpleNamespace

from tmerge.errors import DatasetError

HELD = 300_000_000


def step(what, done=1, row=None, stage="target"):
    """As a `tmerge.stages.step.Step`."""
    return SimpleNamespace(stage=stage, what=what, done=done, total=1000, unit="texts", row=row)


def stepping(recipe, folder, *, listener):
    """Never ends, and takes steps."""
    folder.mkdir(parents=True, exist_ok=True)
    while True:
        listener(step("reading"))
        time.sleep(0.01)


def holding(recipe, folder, *, listener):
    """Never ends, takes no steps, holds much memory, and lets no exception through; says which process it is."""
    held = bytearray(os.urandom(1000)) * (HELD // 1000)
    listener(step(str(os.getpid())))
    while held:
        try:
            time.sleep(10)
        except BaseException:  # noqa: BLE001 - as libraries may
            held[0] = 1


def leaving(recipe, folder, *, listener):
    """Its process ends in the midst of it."""
    os._exit(7)


def done(recipe, folder, *, listener):
    """Ends well at once."""
    folder.mkdir(parents=True)
    return {"verdict": "helps"}


def named(recipe, folder, *, listener):
    """Says which process it ran in."""
    return {"process": os.getpid()}


def mistaken(recipe, folder, *, listener):
    """Meets what its user can mend."""
    raise DatasetError(f"dataset 'x' in {folder} is empty; choose another")


def at_fault(recipe, folder, *, listener):
    """Meets what is ours to mend."""
    raise ZeroDivisionError("secret detail")


def on_a_full_disk(recipe, folder, *, listener):
    """A real one."""
    import shutil

    from tmerge.stages.merge import merge

    usage = shutil.disk_usage(folder.parent)
    shutil.disk_usage = lambda path: usage._replace(free=10)
    return merge(recipe, folder, listener=listener)


def failing_with_files(recipe, folder, *, listener):
    """Leaves files, says which texts it read, and fails."""
    folder.mkdir()
    (folder / "features").write_bytes(b"x" * 1000)
    listener(step(recipe.calibration.dataset))
    raise DatasetError("no such column")


def complaining(recipe, folder, *, listener):
    """Says which texts it reads whenever it says anything."""
    dataset = recipe.calibration.dataset
    listener(step(f"{dataset} has few texts", stage="note"))
    listener(step(f"reading {dataset}"))
    raise DatasetError(f"dataset {dataset!r} changed; see {folder.parent / 'data.json'}")


def hasty(recipe, folder, *, listener):
    """Takes more steps in a second than anyone looks at, ten of which bring a row of costs."""
    began = time.monotonic()
    for i in range(20_000):
        row = ("q.post", i // 2000, _Costs([i * 0.5])) if i % 2000 == 0 else None
        listener(step("solving", i, row, "transport"))
    return time.monotonic() - began


class _Costs(list):
    def tolist(self):
        return list(self)
