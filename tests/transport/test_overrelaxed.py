"""Overrelaxed scaling: fewer sweeps to the same plan, and no harm where nothing converges."""

from __future__ import annotations

import math

import pytest
import torch

from tests.transport.reference import feature_pair
from tmerge.transport import correlation_cost, plan_from_potentials, sinkhorn, standardise


@pytest.mark.parametrize(("epsilon", "most"), [(0.03, 0.5), (0.01, 0.4)])
def test_overrelaxing_takes_a_fraction_of_the_plain_sweeps(epsilon, most):
    target, source = (standardise(side, torch.float64) for side in feature_pair("factors", 300, 200, texts=925))
    cost = correlation_cost(target, source)
    kernel, u, sweeps = torch.exp(-cost / epsilon), torch.ones(300, dtype=torch.float64), 0
    error = 1.0
    while error >= 1e-6:  # the textbook's
        v = (1 / 200) / (kernel.T @ u)
        u = (1 / 300) / (kernel @ v)
        error = float((v * (kernel.T @ u) * 200 - 1).abs().max())
        sweeps += 1
    result = sinkhorn(cost, epsilon)
    assert result.converged and int(result.iterations) < most * sweeps
    plan = plan_from_potentials(cost, result.f, result.g, epsilon)
    torch.testing.assert_close(plan, u.unsqueeze(1) * kernel * v, rtol=1e-4, atol=0)


def test_where_nothing_converges_overrelaxing_does_no_harm():
    """Exact copies of some neurons among strangers, at an eps that would take thousands of sweeps."""
    draw = torch.Generator().manual_seed(0)
    target = torch.randn(512, 400, generator=draw, dtype=torch.float64)
    source = torch.cat([target[:, :300], torch.randn(512, 100, generator=draw, dtype=torch.float64)], 1)
    cost = correlation_cost(standardise(target, torch.float64), standardise(source, torch.float64))
    sweeps = 100
    f, g = torch.zeros(400, dtype=torch.float64), torch.zeros(400, dtype=torch.float64)
    for _ in range(sweeps):
        g = -0.02 * (((f.unsqueeze(1) - cost) / 0.02).logsumexp(0) + math.log(400))
        f = -0.02 * (((g - cost) / 0.02).logsumexp(1) + math.log(400))
    plain = float((torch.exp((f.unsqueeze(1) + g - cost) / 0.02).sum(0) * 400 - 1).abs().max())
    result = sinkhorn(cost, 0.02, max_iterations=sweeps)
    assert float(result.marginal_error) < plain


@pytest.mark.parametrize("epsilon", [0.05, 0.02, 0.01])
def test_rounding_is_not_blown_up_where_the_kernel_is_float32(epsilon):
    """Near the tolerance steps are rounding, of which no rate may be told: this never ended once."""
    draw = torch.Generator().manual_seed(0)
    causes = torch.randn(512, 6, generator=draw)
    sides = [causes @ torch.randn(6, 1500, generator=draw) + torch.randn(512, 1500, generator=draw) for _ in range(2)]
    dtype = torch.float32 if epsilon >= 0.05 else torch.float64
    result = sinkhorn(correlation_cost(*(standardise(side, dtype) for side in sides)), epsilon)
    assert result.converged and result.iterations < 300


def test_problems_of_a_batch_are_relaxed_each_by_its_own():
    """An easy problem that is done early stays done while a hard one goes on."""
    draw = torch.Generator().manual_seed(0)
    easy = torch.rand(40, 50, generator=draw, dtype=torch.float64) * 0.05
    hard = torch.rand(40, 50, generator=draw, dtype=torch.float64)
    together = sinkhorn(torch.stack([easy, hard]), 0.01, max_iterations=2000)
    assert bool(together.converged.all()) and int(together.iterations[0]) < int(together.iterations[1]) / 2
    for number, cost in enumerate((easy, hard)):
        plan = plan_from_potentials(cost, together.f[number], together.g[number], 0.01)
        for side, size in ((1, 40), (0, 50)):
            wanted = torch.full((size,), 1 / size, dtype=torch.float64)
            torch.testing.assert_close(plan.sum(side), wanted, rtol=1.5e-6, atol=0)


def test_marginals_of_very_different_sizes_are_met_all_the_same():
    """What float32 loses of a kernel may be needed then: it is solved again with one in float64."""
    draw = torch.Generator().manual_seed(1)
    for _ in range(60):
        order = torch.randperm(8, generator=draw)
        cost = torch.rand(8, 8, generator=draw, dtype=torch.float64) * 0.5 + 0.5
        cost[torch.arange(8), order] = 0.0
        sides = [torch.rand(8, generator=draw, dtype=torch.float64) ** 3 + 1e-3 for _ in range(2)]
        a, b = (side / side.sum() for side in sides)
        result = sinkhorn(cost, 0.02, a=a, b=b, max_iterations=400)
        plan = plan_from_potentials(cost, result.f, result.g, 0.02)
        torch.testing.assert_close(plan.sum(1), a, rtol=1e-5, atol=0)
        error = ((plan.sum(0) - b).abs() / b).max()
        torch.testing.assert_close(result.marginal_error, error, rtol=1e-2, atol=1e-6)
