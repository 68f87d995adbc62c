"""Strong scaling: one run by one process of one thread and by several, stage by stage.

    python -m tests.bench.processes --out FOLDER [--processes 2] [--repeats 2] [RECIPE [--set KEY=VALUE ...]]

The demo if no recipe is named. By turns, the least seconds of each stage, from the runs' reports; the most memory of
any process. Prints one JSON document.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

# The stages whose work is shared out, and that come to the same whatever the scores are.
SHARED = ("target", "source", "transport", "fuse")


def run(words: list[str], processes: int, out: Path) -> dict[str, Any]:
    """A run's report."""
    shutil.rmtree(out, ignore_errors=True)
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    command = [sys.executable, *(launcher if processes > 1 else []), "-m", "tmerge", *words, "--out", str(out)]
    quiet = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    subprocess.run(command, env=os.environ | quiet, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    report: dict[str, Any] = json.loads((out / "tmerge/report.json").read_text(encoding="utf-8"))
    return report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=2)
    asked, words = parser.parse_known_args()
    words = ["merge", *words] if words and not words[0].startswith("-") else ["demo", *words]
    seconds: dict[int, dict[str, float]] = {1: {}, asked.processes: {}}
    memory: dict[int, int] = {}
    for _ in range(asked.repeats):
        for processes, least in seconds.items():
            report = run(words, processes, asked.out)
            for stage in report["stages"]:
                least[stage["name"]] = min(least.get(stage["name"], float("inf")), stage["seconds"])
                memory[processes] = max(memory.get(processes, 0), stage["peak_rss_bytes"])
    one, several = (sum(least[stage] for stage in SHARED) for least in seconds.values())
    json.dump(
        {
            "run": " ".join(words),
            "processes": asked.processes,
            "seconds": {str(processes): least for processes, least in seconds.items()},
            "shared stages, one over several": round(one / several, 2),
            "peak memory of a process": {str(processes): peak for processes, peak in memory.items()},
        },
        sys.stdout,
        indent=1,
    )
    sys.stdout.write("\n")


if __name__ == "__main__":
    main()
