"""What is in memory while a source is carried over."""

from __future__ import annotations

import gc
import threading
import weakref
from dataclasses import replace

import pytest
import torch

from tests.pico import pico_model
from tests.planted import pooled_features
from tmerge.fusion import carry, projection
from tmerge.models import describe
from tmerge.recipe import Apart, Weights
from tmerge.transport import apart_transport, solve_features


class _Counted:
    """A transport's feature maps, and how many of their plans were there at once."""

    def __init__(self, build):
        self._build, self._lock = build, threading.Lock()
        self.seen, self.most = [], 0

    def __call__(self, layer, wanted):
        maps = self._build(layer, wanted)
        with self._lock:
            self.seen += [weakref.ref(found.plan) for found in maps.values()]
            self.most = max(self.most, sum(plan() is not None for plan in self.seen))
        return maps


def _pair(layers):
    """A target of so many layers and a source, and the transport between them."""
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
    names = describe(target).names
    reads = (lambda layer, key, of=of: of[layer, key] for of in features)
    transport = apart_transport(plans, *reads, names, Apart(layers_kept=2))
    return describe(target), describe(source), transport, Weights(alpha=0.5, top_k=4, projections=tuple(names))


def _carried(layers, workers, keep=None):
    """The plans that were made of a target of so many layers, and how many at most were there at once."""
    target, source, transport, fusion = _pair(layers)
    counted = _Counted(transport.build)
    before = torch.get_num_threads()
    torch.set_num_threads(workers)
    try:
        carry(target, source, replace(transport, build=counted), fusion, keep=keep)
    finally:
        torch.set_num_threads(before)
    return len(counted.seen), counted.most


@pytest.mark.parametrize("workers", [1, 2])
def test_the_peak_does_not_depend_on_the_number_of_layers(workers):
    (few, few_at_once), (many, many_at_once) = (_carried(layers, workers) for layers in (3, 12))
    a_layer = few // 3
    assert many == 12 * a_layer
    # Plans do not leave the worker that built them.
    assert max(few_at_once, many_at_once) <= workers * a_layer


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2])
def test_neurons_that_are_handed_over_do_not_stay(workers, quick_collection):
    def most_at_once(layers):
        seen, most = [], 0

        def keep(transported, permuted):
            nonlocal most
            assert len({item.layer for item in transported}) == 1 and not permuted
            seen.extend(weakref.ref(item.weight) for item in transported)
            gc.collect()
            most = max(most, sum(weight() is not None for weight in seen))

        _carried(layers, workers, keep)
        return len(seen), most

    (few, few_at_once), (many, many_at_once) = most_at_once(3), most_at_once(12)
    assert many == 4 * few
    # Those of the layer that is handed over, and of the one before, whose last item a loop's variable still names.
    assert max(few_at_once, many_at_once) <= few // 3 + 1


def test_what_has_no_room_on_a_device_is_carried_on_the_processor(monkeypatch):
    pair, notes, device = _pair(2), [], torch.device("meta")
    wanted = carry(*pair).transported
    transport_neurons, tried = projection.transport_neurons, []

    def crowded(*words):
        tried.append(words[-1].type)
        if words[-1] == device:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return transport_neurons(*words)

    monkeypatch.setattr(projection, "transport_neurons", crowded)
    found = carry(*pair, device=device, note=notes.append).transported
    assert tried[:2] == ["meta", "cpu"] and tried.count("meta") == tried.count("cpu")
    assert all(one.weight.equal(other.weight) for one, other in zip(found, wanted, strict=True)) and found
    # The same each time, so that a stage says it once.
    assert set(notes) == {"meta has no room for some weights and their maps: carried on the processor"}


def test_another_fault_there_is_not_taken_for_that(monkeypatch):
    def broken(*_):
        raise RuntimeError("an illegal memory access")

    monkeypatch.setattr(projection, "transport_neurons", broken)
    with pytest.raises(RuntimeError, match="illegal"):
        carry(*_pair(2), device=torch.device("meta"))
