"""What goes of the runs that are over, so that there is room for the next ones: by their age, and by their size."""

from __future__ import annotations

import contextlib
import os
import shutil
import stat
import time
from collections.abc import Iterable
from pathlib import Path

from tmerge.ui.server.limits import AppSettings
from tmerge.ui.server.visitor_run import VisitorRun

__all__ = ["goes_now", "may_go", "to_go"]

_OLD = "nobody has looked for some hours"
_ROOM = "the room on the disk was needed for other runs"

# Who has opened a page of a run, or asked anything of it, may be reading it for so long.
_READING_SECONDS = 600.0


def to_go(runs: Iterable[VisitorRun], settings: AppSettings, root: Path) -> dict[str, str]:
    """Which are to be removed, and what is said of it to who comes back: id -> a line.

    Those that nobody reads go first, the oldest first. However much room is needed, the last one stays, or a model that
    is larger than all that is free would be gone as soon as it is there; and none goes while it is being pushed.

    Args:
        runs: Of which those that are over may go.
        settings: How long they are kept, and how much room they may take.
        root: The folder that all runs' folders are in.
    """
    now = time.time()
    over = [run for run in runs if may_go(run)]
    gone = {run.id: _OLD for run in over if now - max(run.looked_at, run.ended or now) > settings.runs_kept_seconds}
    # One that has failed has left nothing.
    kept = [run for run in over if run.id not in gone and run.folder.parent.exists()]
    kept.sort(key=lambda run: (now - run.looked_at < _READING_SECONDS, run.ended or now))
    held = _bytes_of(kept)
    most = settings.runs_kept_share * (shutil.disk_usage(root).free + held)
    while held > most and len(kept) > 1:
        gone[kept.pop(0).id] = _ROOM
        held = _bytes_of(kept)
    return gone


def may_go(run: VisitorRun) -> bool:
    """Whether a run is over, and nothing of it is being pushed, or read by one who takes what is sent."""
    read = run.reading and time.time() - run.looked_at < _READING_SECONDS
    return run.over and not read and (run.push is None or run.push.state != "pushing")


def goes_now(run: VisitorRun) -> bool:
    """Whether a run is to be removed now, as `may_go` says; if so, nobody begins to read it any more."""
    with run.turn:
        run.removed = may_go(run)
        return run.removed


def _bytes_of(runs: Iterable[VisitorRun]) -> int:
    """Of all their files; one that several of them have, as a training has its merge's, counts once."""
    sizes: dict[tuple[int, int], int] = {}
    # Any of it may be going, as a push's own files do; who walks so passes over a folder that has gone.
    for folder, _, names in (entry for run in runs for entry in os.walk(run.folder.parent)):
        for name in names:
            with contextlib.suppress(OSError):
                found = os.lstat(os.path.join(folder, name))
                if stat.S_ISREG(found.st_mode):
                    sizes[found.st_dev, found.st_ino] = found.st_size
    return sum(sizes.values())
