"""What fusing takes, as the system counts it."""

from __future__ import annotations

import sys

import pytest

from tests import forked

_FUSING = """
import sys
import tempfile
from pathlib import Path

import torch

from tests.peak import Peak
from tests.pico import pico_model
from tmerge.fusion import NeuronWriter, carry
from tmerge.models import describe
from tmerge.recipe import Apart, Weights
from tmerge.transport import apart_transport, solve_features

layers, rows, projections = int(sys.argv[1]), 24, ("q", "o", "up")
sizes = {"hidden_size": 256, "intermediate_size": 768}
target, source = (describe(pico_model("llama", layers=count, **sizes)) for count in (layers, 3))


def read(described):
    widths = {(tap.layer, tap.key): tap.features for tap in described.taps(projections)}
    return lambda layer, key: torch.randn(rows, widths[layer, key], generator=torch.Generator().manual_seed(layer))


torch.set_num_threads(2)
mine, theirs = read(target), read(source)
keys = dict.fromkeys(tap.key for tap in target.taps(projections))
plans = {}
for key in keys:
    reads = (lambda layer, key=key: mine(layer, key), lambda layer, key=key: theirs(layer, key))
    plans[key] = solve_features(key, *reads, range(layers), range(3), epsilon=0.1)
transport = apart_transport(plans, mine, theirs, projections, Apart(layers_kept=3))
fusion = Weights(alpha=0.5, top_k=64, projections=projections)
with tempfile.TemporaryDirectory() as folder:
    writer = NeuronWriter(Path(folder) / "n", "key")
    (Path(folder) / "r").mkdir()
    peak = Peak()
    carry(
        target, source, transport, fusion, keep=lambda found, permuted: writer.add(found), scratch=Path(folder) / "r"
    )
    print(peak.grown())
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux for the peak of a process")
def test_fusing_takes_no_more_for_more_layers():
    peaks = []
    for layers in (4, 16):
        process = forked.run([layers], _FUSING)
        assert process.returncode == 0, process.stderr
        peaks.append(float(process.stdout))
    assert peaks[1] < 1.25 * peaks[0] + 8e6  # two workers do not always meet at their widest
