"""Settings that every test shares: one thread, quiet libraries, and which tests stay in one process."""

from __future__ import annotations

import os

import pytest

# Before the libraries are imported. The Hub is not switched off here, as the loopback Hub's tests need the client.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")

import torch  # noqa: E402

# A pico model's products are too small to share: where the cores are busy, two threads took seven times as long.
torch.set_num_threads(1)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """Where there are several processes, a file's tests stay in one, since they share its models and runs.

    So do all tests that drive a browser: two of these on two cores keep each other waiting.
    """
    for item in items:
        browser = "/ui/" in item.path.as_posix() or item.path.name in {"test_plots_page.py"}
        item.add_marker(pytest.mark.xdist_group("browser" if browser else item.path.as_posix()))
