"""`make device`: the tests of an accelerator, then what merging takes there. Without one, a line that says so."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from tests.device.accelerators import LACKING, accelerator_here


def main() -> int:
    """The exit status: of the tests, or of the measurement after them."""
    device = accelerator_here()
    if device is None:
        sys.stdout.write(f"{LACKING}\n")
        return 0
    tests = sorted(map(str, Path(__file__).parent.glob("test_accelerator*.py")))
    # The demo models too, which are marked slow.
    failed = pytest.main(["-rs", "-m", "", *tests])
    if failed:
        return int(failed)
    from tests.bench import device as measured

    measured.main(["--device", str(device)] + ["--small"] * (device == torch.device("cpu")))
    return 0


if __name__ == "__main__":
    sys.exit(main())
