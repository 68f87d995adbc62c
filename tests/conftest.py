"""Settings that every test shares: one thread, and quiet libraries."""

from __future__ import annotations

import gc
import os

# Before the libraries are imported. The Hub is not switched off here, as the loopback Hub's tests need the client.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")

import pytest  # noqa: E402
import torch  # noqa: E402

# A pico model's products are too small to share: where the cores are busy, two threads took seven times as long.
torch.set_num_threads(1)


@pytest.fixture
def quick_collection():
    """What is there already is no garbage: `gc.collect` looks at what the test itself makes, a thousandth of it."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()
