"""The accelerator that is here, or that ``TMERGE_TESTED_DEVICE`` names; without one these tests skip, saying so."""

from __future__ import annotations

import os

import pytest
import torch


@pytest.fixture(scope="session")
def accelerator() -> torch.device:
    """Where everything is to run."""
    if named := os.environ.get("TMERGE_TESTED_DEVICE"):
        return torch.device(named)
    for kind, backend in (("cuda", torch.cuda), ("mps", torch.backends.mps)):
        if backend.is_available():
            return torch.device(kind)
    pytest.skip("there is no accelerator here; TMERGE_TESTED_DEVICE=cpu runs these tests without one")
