"""What is in memory while a source is carried over."""

from __future__ import annotations

import threading
import weakref

import pytest
import torch

from tests.pico import pico_model
from tests.planted import pooled_features
from tmerge.fusion import FeatureStatistics, SolvedPairs, carry, couplings, layer_plans
from tmerge.models import describe
from tmerge.recipe import FusionSettings, TransportSettings
from tmerge.transport import solve_features


class _Counted:
    """Plans, and how many of them were there at once."""

    def __init__(self, pairs):
        self._pairs, self._lock = pairs, threading.Lock()
        self.seen, self.most = [], 0

    def of_layer(self, layer, wanted):
        read = self._pairs.of_layer(layer, wanted)
        with self._lock:
            self.seen += [weakref.ref(pair.plan) for pair in read.values()]
            self.most = max(self.most, sum(plan() is not None for plan in self.seen))
        return read

    def keep(self, used):
        self._pairs.keep(used)

    def tensors(self):
        return self._pairs.tensors()


def _carried(layers, workers):
    """The plans that were made of a target of so many layers, and how many at most were there at once."""
    tokens = torch.randint(3, 384, (40, 8), generator=torch.Generator().manual_seed(0))
    target, source = pico_model("llama", layers=layers), pico_model("llama", layers=2, seed=1)
    features = [pooled_features(model, tokens) for model in (target, source)]
    keys = list(dict.fromkeys(key for _, key in features[0]))
    plans = {
        key: solve_features(
            key,
            lambda layer, key=key: features[0][layer, key],
            lambda layer, key=key: features[1][layer, key],
            range(layers),
            range(2),
            epsilon=0.1,
        )
        for key in keys
    }
    settings = TransportSettings(layers_kept=2)
    counted = _Counted(SolvedPairs(plans, tuple(lambda *place, of=of: of[place] for of in features), 128))
    before = torch.get_num_threads()
    torch.set_num_threads(workers)
    try:
        carry(
            describe(target),
            describe(source),
            counted,
            couplings(describe(target).names, plans, layer_plans(plans, settings), 2),
            tuple({place: FeatureStatistics.of(values) for place, values in of.items()} for of in features),
            FusionSettings(alpha=0.5, top_k=4, projections=tuple(describe(target).names)),
            settings,
        )
    finally:
        torch.set_num_threads(before)
    return len(counted.seen), counted.most


@pytest.mark.parametrize("workers", [1, 2])
def test_the_peak_does_not_depend_on_the_number_of_layers(workers):
    (few, few_at_once), (many, many_at_once) = (_carried(layers, workers) for layers in (3, 12))
    a_layer = few // 3
    assert many == 12 * a_layer
    assert max(few_at_once, many_at_once) <= (workers + 1) * a_layer
