"""Strong scaling: one run by one process of one thread and by several, stage by stage.

    python -m tests.bench.processes --out FOLDER [--processes 2] [--repeats 2] [--memory] [RECIPE [--set KEY=VALUE ...]]

The demo if no recipe is named. By turns, the least seconds of each stage, from the runs' reports, and the most memory
of any process as it counts itself (files that it has mapped with it, which are there once for all). With ``--memory``
each runs once more, untimed, as looking takes a share of a processor and halts who is looked at: the most that one has
for itself alone, and the most that all have together, looked at every twentieth of a second. Prints one JSON document.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

# The stages whose work is shared out, and that come to the same whatever the scores are.
SHARED = ("target", "source", "transport", "fuse")


@dataclass
class Memory:
    """The most bytes that were seen.

    Attributes:
        own: Of a process, what it shares with none.
        together: Of all processes, what they share counted once.
    """

    own: int = 0
    together: int = 0

    def look(self, launcher: psutil.Process) -> None:
        """At the processes as they are now."""
        seen = []
        for process in [launcher, *launcher.children(recursive=True)]:
            with contextlib.suppress(psutil.Error):
                if "torch.distributed.run" not in process.cmdline():
                    seen.append(process.memory_full_info())
        self.own = max([self.own, *(memory.uss for memory in seen)])
        self.together = max(self.together, sum(memory.pss for memory in seen))


def run(words: list[str], processes: int, out: Path, memory: Memory | None = None) -> dict[str, Any]:
    """A run's report; what memory it took is looked at where it is asked for."""
    shutil.rmtree(out, ignore_errors=True)
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    command = [sys.executable, *(launcher if processes > 1 else []), "-m", "tmerge", *words, "--out", str(out)]
    quiet = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    nowhere = subprocess.DEVNULL
    with subprocess.Popen(command, env=os.environ | quiet, stdout=nowhere, stderr=nowhere) as begun:
        launcher = psutil.Process(begun.pid)
        while memory is not None and begun.poll() is None:
            with contextlib.suppress(psutil.Error):
                memory.look(launcher)
            time.sleep(0.05)
    if begun.returncode:
        raise SystemExit(f"it ended with {begun.returncode}: {' '.join(command)}")
    report: dict[str, Any] = json.loads((out / "tmerge/report.json").read_text(encoding="utf-8"))
    return report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--memory", action="store_true", help="and look at the memory, in runs of their own")
    asked, words = parser.parse_known_args()
    words = ["merge", *words] if words and not words[0].startswith("-") else ["demo", *words]
    seconds: dict[int, dict[str, float]] = {1: {}, asked.processes: {}}
    peaks: dict[int, int] = {}
    seen = {processes: Memory() for processes in seconds} if asked.memory else {}
    for _ in range(asked.repeats):
        for processes, least in seconds.items():
            report = run(words, processes, asked.out)
            for stage in report["stages"]:
                least[stage["name"]] = min(least.get(stage["name"], float("inf")), stage["seconds"])
                peaks[processes] = max(peaks.get(processes, 0), stage["peak_rss_bytes"])
    for processes, memory in seen.items():
        run(words, processes, asked.out, memory)
    one, several = (sum(least[stage] for stage in SHARED) for least in seconds.values())
    json.dump(
        {
            "run": " ".join(words),
            "processes": asked.processes,
            "seconds": {str(processes): least for processes, least in seconds.items()},
            "shared stages, one over several": round(one / several, 2),
            "peak memory of a process": {str(processes): peak for processes, peak in peaks.items()},
            "of which for itself alone": {str(processes): memory.own for processes, memory in seen.items()},
            "of all together": {str(processes): memory.together for processes, memory in seen.items()},
        },
        sys.stdout,
        indent=1,
    )
    sys.stdout.write("\n")


if __name__ == "__main__":
    main()
