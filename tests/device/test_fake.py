"""What can be told of an accelerator without one: no tensors of two devices meet, and it is hardly ever waited for."""

from __future__ import annotations

import sys
from dataclasses import replace

import pytest
import torch

from tests.device.fake import DEVICE, fake_device, fake_pico
from tests.pico import pico_model
from tmerge.calibration.capture import _Pool
from tmerge.evaluation.likelihood import _bits_of
from tmerge.fusion.merge import transport_neurons
from tmerge.models import describe
from tmerge.transport import correlation_cost, plans, sinkhorn, solve_features, standardise

solver = sys.modules[sinkhorn.__module__]
FAMILIES = ["llama", "gpt2", "gemma3", "phi3", "falcon"]


def test_a_fake_device_is_one():
    with fake_device() as waits:
        there, here = torch.randn(3, 4, device=DEVICE), torch.randn(3, 4)
        with pytest.raises(RuntimeError, match="device"):
            there + here
        assert waits.reads == 0 and bool((there > 0).all()) and waits.reads == 1
        assert there.cpu().device.type == "cpu" and waits.moves == 1
        assert bool((here > 0).all()) and waits.reads == 1


def test_the_solver_looks_at_the_device_once_in_eight_sweeps(monkeypatch):
    looks, sweeps, times = [], [], solver._times
    monkeypatch.setattr(solver, "_look", lambda *_: looks.append(len(sweeps)) or (False, False))
    monkeypatch.setattr(solver, "_times", lambda *given: sweeps.append(1) or times(*given))
    with fake_device():
        target, source = (standardise(torch.randn(20, width)).to(DEVICE) for width in (70, 90))
        sinkhorn(correlation_cost(target, source), 0.3, max_iterations=40)
    # One product before the first sweep, one in each but the last, and one after it.
    assert len(sweeps) == 41 and looks == [8, 16, 24, 32, 40]


@pytest.mark.parametrize("epsilon", [0.3, 0.01])
def test_a_batch_of_problems_waits_for_the_device_a_few_times(epsilon):
    with fake_device() as waits:
        target = standardise(torch.randn(20, 70)).to(DEVICE)
        sources = torch.stack([standardise(torch.randn(20, 90)).to(DEVICE)] * 3)
        result = sinkhorn(correlation_cost(target, sources), epsilon)
        assert result.f.device == DEVICE and result.f.shape == (3, 70)
    # Is the cost finite, how far does it reach, is everything done, is the end finite.
    assert waits.reads + waits.moves == 4


def test_a_row_of_problems_is_solved_there_and_comes_back(monkeypatch):
    heard = []

    def here(work, items, workers, take):
        for item in items:
            take(item, work(item))

    monkeypatch.setattr(plans, "in_turn", here)  # fake tensors are a thread's own
    with fake_device() as waits:
        solved = solve_features(
            "q.post",
            lambda layer: torch.randn(20, 70),
            lambda layer: torch.randn(20, 90),
            range(2),
            range(5),
            epsilon=0.3,
            device=DEVICE,
            at_once=2,
            solved=lambda layer, costs: heard.append((layer, costs.shape, costs.device.type)),
        )
        assert solved.f.shape == (2, 5, 70) and solved.f.device.type == "cpu"
    assert heard == [(0, (5,), "cpu"), (1, (5,), "cpu")]
    # For each of three groups a row: four times in the solver; then six fields of the row.
    assert waits.reads + waits.moves == 2 * (3 * 4 + 6)


@pytest.mark.parametrize("projection", ["q", "down"])
def test_weights_meet_dense_maps_there_and_come_back(projection):
    with fake_device() as waits:
        weight, bias, maps = torch.randn(9, 7), torch.randn(9), (torch.randn(5, 9), torch.randn(7, 4))
        given = (weight, bias, *maps, projection, torch.tensor([0, 2]))
        carried, carried_bias = transport_neurons(*given, DEVICE)
        shapes = ((5, 2), (5,)) if projection == "down" else ((2, 4), (2,))
        assert (carried.shape, carried_bias.shape) == shapes
        assert carried.device.type == carried_bias.device.type == "cpu" and waits.moves == 2 and waits.reads == 0


def test_a_matching_moves_neurons_where_they_are():
    maps = torch.eye(3).to_sparse(), torch.eye(4).to_sparse()
    # What would be moved to a device without values could not come back.
    weight, bias = transport_neurons(torch.ones(3, 4), torch.ones(3), *maps, "q", torch.tensor([1]), DEVICE)
    assert weight.equal(torch.ones(1, 4)) and bias.equal(torch.ones(1))


class _Writer:
    """Takes rows as a `FeatureWriter` does."""

    def __init__(self) -> None:
        self.shapes: dict[tuple[int, str], tuple[int, ...]] = {}

    def write(self, rows, features):
        self.shapes |= {feature: tuple(values.shape) for feature, values in features.items()}


@pytest.mark.parametrize("positions", [None, [[0, 2], [1], [3]]], ids=["texts", "tokens"])
@pytest.mark.parametrize("family", FAMILIES)
def test_reading_features_moves_each_batch_once(family, positions, monkeypatch):
    # The rows are written in the texts' order, which fake tensors do not have.
    monkeypatch.setattr(_Pool, "write", lambda self: None)
    real = pico_model(family)
    names = {module: name for name, module in real.named_modules()}
    described = describe(real).taps(["q", "k", "v", "o", "up", "down"])
    with fake_device() as waits:
        loaded = fake_pico(family)
        taps = [replace(tap, module=loaded.model.get_submodule(names[tap.module])) for tap in described]
        pool = _Pool(loaded, taps, [5, 5, 4], _Writer(), positions)
        pool.begin([0, 1, 2])
        waits.reads = waits.moves = 0
        mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 1, 1], [1, 1, 1, 1, 0]]).to(DEVICE)
        with pool.hooked(), torch.no_grad():
            loaded.base(input_ids=torch.zeros(3, 5, dtype=torch.int64).to(DEVICE), attention_mask=mask, use_cache=False)
        read_by_the_model = waits.reads
        pool.end(None)
        rows = 3 if positions is None else 4
        found = {feature: rows_of for feature, [(_, rows_of)] in pool._waiting.items()}
        assert len(found) == len({(tap.layer, tap.key) for tap in taps})
        assert all(values.shape[0] == rows and values.device.type == "cpu" for values in found.values())
    assert waits.moves == 1 and waits.reads == read_by_the_model


@pytest.mark.parametrize("family", FAMILIES)
def test_scoring_a_batch_moves_its_sums_alone(family):
    with fake_device() as waits:
        loaded = fake_pico(family)
        waits.reads = waits.moves = 0
        loaded.model(input_ids=torch.zeros(2, 4, dtype=torch.int64).to(DEVICE), use_cache=False)
        read_by_the_model, waits.reads = waits.reads, 0
        with torch.no_grad():
            bits = _bits_of(loaded.model, [[1, 2, 3, 4], [5, 6, 7, 8]], DEVICE)
        assert bits.shape == (2,) and bits.device.type == "cpu"
    assert waits.moves == 1 and waits.reads <= read_by_the_model
