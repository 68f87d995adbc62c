"""The accelerator that is here, or that ``TMERGE_TESTED_DEVICE`` names; without one these tests skip, saying so."""

from __future__ import annotations

import pytest
import torch

from tests.device.accelerators import LACKING, accelerator_here


@pytest.fixture(scope="session")
def accelerator() -> torch.device:
    """Where everything is to run."""
    device = accelerator_here()
    if device is None:
        pytest.skip(LACKING)
    return device
