"""What solving takes, as the system counts it: what the C library keeps of what was let go is taken too."""

from __future__ import annotations

import sys

import pytest

from tests import forked

_SOLVING = """
import sys

import torch

from tests.peak import Peak
from tmerge.transport import solve_features

layers, wide, wider, rows = int(sys.argv[1]), 1024, 1536, 24


def features(width):
    drawn = torch.Generator().manual_seed(width)
    return lambda layer: torch.randn(rows, width, generator=drawn)


def solve(layers):
    solve_features("q.post", features(wide), features(wider), range(layers), range(12), epsilon=0.1)


torch.set_num_threads(2)
solve(2)  # what is made once
peak = Peak()
solve(layers)
print(peak.grown() / (4 * wide * wider))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux for the peak of a process")
def test_solving_takes_a_problem_a_worker_whatever_the_number_of_layers():
    for layers in (8, 32):
        process = forked.run([layers], _SOLVING)
        assert process.returncode == 0, process.stderr
        # A cost and a kernel for each of two workers, and what starts and sums take beside them; it was 20 and more.
        assert float(process.stdout) < 12
