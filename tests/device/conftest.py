"""The accelerator that is here, or that ``TMERGE_TESTED_DEVICE`` names; without one these tests skip, saying so."""

from __future__ import annotations

import pytest
import torch

from tests.device.accelerators import accelerator_here


@pytest.fixture(scope="session")
def accelerator() -> torch.device:
    """Where everything is to run."""
    device = accelerator_here()
    assert device is not None  # without one no module that asks for it is collected
    return device
