"""Neurons' statistics against float64, and the memory that they take."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tmerge.transport.statistics import FeatureStatistics, measured


@given(st.integers(0, 1000), st.integers(1, 60), st.integers(1, 40), st.integers(1, 2000), st.sampled_from([0, 1e4]))
@settings(max_examples=40, deadline=None)
def test_they_are_those_of_float64_however_many_rows_the_buffer_holds(seed, rows, width, room, mean):
    features = torch.randn(rows, width, generator=torch.Generator().manual_seed(seed)) + mean
    found = FeatureStatistics.of(features, torch.empty(room, dtype=torch.float64))
    exact = features.double().numpy()
    np.testing.assert_allclose(found.mean.numpy(), exact.mean(0), rtol=1e-6, atol=1e-7)
    np.testing.assert_allclose(found.magnitude.numpy(), np.abs(exact).mean(0), rtol=1e-6, atol=1e-7)
    np.testing.assert_allclose(found.deviation.numpy(), exact.std(0), rtol=1e-5, atol=1e-9 * (1 + mean))
    for buffer in (None, torch.empty(1, dtype=torch.float64)):
        assert FeatureStatistics.of(features, buffer).mean.shape == (width,)


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="resident memory is told apart on Linux only")
def test_memory_does_not_grow_with_the_number_of_layers():
    """A copy of every feature, between the numbers that stay, left the allocator holes that fitted none of the next."""
    features = torch.rand(2600, 1536)  # in float64 just below where the allocator asks the system each time
    del_later = torch.empty(31 * 2**20, dtype=torch.uint8)  # once let go, that is so up to its size
    del del_later
    before = psutil.Process().memory_info().rss
    found = measured(lambda layer, key: features, {"down.pre": tuple(range(16))})
    assert len(found) == 16
    assert psutil.Process().memory_info().rss - before < 64e6
