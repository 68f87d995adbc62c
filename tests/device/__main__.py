"""`make device`: the tests of an accelerator, then what merging takes there. Without one, a line that says so."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tests.device.accelerators import LACKING, accelerator_here


def main() -> int:
    """The exit status: of the tests, or of the measurement after them."""
    device = accelerator_here()
    if device is None:
        sys.stdout.write(f"{LACKING}\n")
        return 0
    tests = sorted(map(str, Path(__file__).parent.glob("test_accelerator*.py")))
    small = ["--small"] if device.type == "cpu" else []
    # The slow tests too. Each in a process of its own: pytest wants to come before all imports.
    for words in (["pytest", "-rs", "-m", "", *tests], ["tests.bench.device", "--device", str(device), *small]):
        failed = subprocess.run([sys.executable, "-m", *words], check=False).returncode
        if failed:
            return failed
    return 0


if __name__ == "__main__":
    sys.exit(main())
