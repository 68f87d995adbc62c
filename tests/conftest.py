"""What every test shares: one thread, quiet libraries, a heap that is not searched again, pictures drawn once."""

from __future__ import annotations

import gc
import os
import signal
from pathlib import Path
from typing import Any

# Before the libraries are imported. The Hub is not switched off here, as the loopback Hub's tests need the client.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")

import pytest  # noqa: E402
import torch  # noqa: E402

# A suite that a shell runs behind it inherits its deafness to Ctrl-C, and so would each command that a test stops.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# A pico model's products are too small to share: where the cores are busy, two threads took seven times as long.
torch.set_num_threads(1)


def pytest_collection_finish() -> None:
    """Before the first test: what every run would pay for again."""
    from tmerge.plots import stills

    drawn: dict[str, bytes] = {}
    draw = stills.write_stills

    def once(folder: Path, report: Any, record: Any) -> list[Path]:
        """The card's pictures, a second's work: of the first run drawn, of the others those (tests/test_stills.py)."""
        if not drawn:
            drawn.update({path.name: path.read_bytes() for path in draw(folder, report, record)})
        folder.mkdir(parents=True, exist_ok=True)
        for name, picture in drawn.items():
            (folder / name).write_bytes(picture)
        return [folder / name for name in drawn]

    stills.write_stills = once
    # A run looks for garbage where it lets a model go: not among the libraries, which takes half a second.
    gc.collect()
    gc.freeze()


@pytest.fixture
def quick_collection():
    """What is there already is no garbage: `gc.collect` looks at what the test itself makes, a thousandth of it."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()
