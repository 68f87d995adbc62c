"""On a device, where looking at what is computed means waiting for it: the same plans by a fourth of the looks."""

from __future__ import annotations

import importlib

import ot
import pytest
import torch

from tests.transport.reference import feature_pair
from tmerge.transport import correlation_cost, plan_from_potentials, sinkhorn, standardise
from tmerge.transport.sinkhorn import _looks_every

solver = importlib.import_module("tmerge.transport.sinkhorn")  # which the function of its name hides


@pytest.fixture
def as_on_a_device(monkeypatch):
    """The looks that a run takes, a list with an entry each, each told whether u and v had left their range."""
    looks, look = [], solver._look

    def seen(*words):
        found = look(*words)
        looks.append(found[1])
        return found

    monkeypatch.setattr(solver, "_look", seen)
    monkeypatch.setattr(solver, "_looks_every", lambda _, is_safe: _looks_every(torch.device("cuda"), is_safe))
    return looks


def _plan(cost, epsilon, **options):
    result = sinkhorn(cost, epsilon, max_iterations=2000, **options)
    assert bool(result.converged.all()) and float(result.marginal_error.max()) < 1e-6
    return plan_from_potentials(cost.double(), result.f.double(), result.g.double(), epsilon), result


@pytest.mark.parametrize(("epsilon", "dtype"), [(0.03, torch.float64), (0.005, torch.float64), (0.05, torch.float32)])
def test_where_c_transforms_are_needed_the_plan_is_pots(as_on_a_device, epsilon, dtype):
    target, source = (standardise(side, dtype) for side in feature_pair("factors", 90, 70, texts=300))
    # Spread out, so that the kernel needs c-transforms.
    cost = correlation_cost(target, source) * 3
    plan, result = _plan(cost, epsilon)
    assert len(as_on_a_device) <= int(result.iterations) // 4 + 1
    wanted = ot.sinkhorn(
        torch.full((90,), 1 / 90, dtype=torch.float64),
        torch.full((70,), 1 / 70, dtype=torch.float64),
        cost.double(),
        epsilon,
        method="sinkhorn_log",
        numItermax=100000,
        stopThr=1e-12,
    )
    assert float((plan - wanted).abs().sum()) < (1e-5 if dtype == torch.float64 else 1e-4)


def test_scalings_that_leave_their_range_between_two_looks_are_absorbed(as_on_a_device):
    """Rows and columns that are far from each other, as much as float32 holds and more."""
    draw = torch.Generator().manual_seed(0)
    far = torch.linspace(0, 6, 60, dtype=torch.float64)
    cost = (far.unsqueeze(1) - far.flip(0)[:40]).square() + torch.rand(60, 40, generator=draw, dtype=torch.float64)
    epsilon = 0.1
    plan, _ = _plan(cost, epsilon)
    assert any(as_on_a_device)
    one = torch.full((60,), 1 / 60, dtype=torch.float64), torch.full((40,), 1 / 40, dtype=torch.float64)
    wanted = ot.sinkhorn(*one, cost, epsilon, method="sinkhorn_log", numItermax=100000, stopThr=1e-12)
    assert float((plan - wanted).abs().sum()) < 1e-5


def test_a_processor_is_looked_at_in_every_sweep():
    assert _looks_every(torch.device("cpu"), False) == _looks_every(torch.device("cpu"), True) == 1
