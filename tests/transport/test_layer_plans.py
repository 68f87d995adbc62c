"""Layer plans: the couplings of layers over the costs of their features, and how they are read."""

from __future__ import annotations

import numpy as np
import ot
import pytest
import torch

from tests.transport.reference import assert_same_plan, pot_plan
from tmerge.errors import TransportError
from tmerge.transport import (
    LayerPlan,
    couple_layers,
    effective_weights,
    keep_layers,
    solve_layers,
)

# -- layer plans ---------------------------------------------------------------------------------------------------


def _layer_cost(rows=5, columns=7, seed=0):
    """Costs as they come: within a tenth of each other."""
    return 0.8 + 0.1 * torch.rand(rows, columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _median_scaled(cost):
    """As NumPy sees it; of an even number of entries PyTorch's median is the lower of the two in the middle."""
    shifted = cost.numpy() - cost.numpy().min()
    median = np.sort(shifted, axis=None)[(shifted.size - 1) // 2]
    return shifted / median, median


@pytest.mark.parametrize("shape", [(5, 7), (6, 6), (7, 3), (1, 4), (4, 1)], ids=str)
@pytest.mark.parametrize("eta", [0.5, 0.1])
def test_a_median_scaled_balanced_plan_is_pots(shape, eta):
    cost = _layer_cost(*shape)
    scaled, median = _median_scaled(cost)
    plan = solve_layers(cost, eta, max_iterations=100_000, tolerance=1e-12)
    assert plan.converged and plan.marginal_error < 1e-12 and plan.iterations > 0
    assert plan.eta == eta
    assert plan.median == pytest.approx(median, rel=1e-12)
    assert_same_plan(plan.plan, pot_plan(scaled, eta), 1e-8)


@pytest.mark.parametrize("shape", [(5, 7), (7, 3)], ids=str)
def test_a_plain_balanced_plan_is_pots(shape):
    cost = _layer_cost(*shape)
    plan = solve_layers(cost, 0.1, scaling="plain", tolerance=1e-12)
    assert plan.median == 1.0
    assert_same_plan(plan.plan, pot_plan(cost.numpy(), 0.1), 1e-8)


@pytest.mark.parametrize("scaling", ["median-scaled", "plain"])
@pytest.mark.parametrize("shape", [(5, 7), (7, 3), (1, 4)], ids=str)
def test_a_semi_relaxed_plan_fixes_the_targets_marginal_alone(shape, scaling):
    cost = _layer_cost(*shape)
    scaled = _median_scaled(cost)[0] if scaling == "median-scaled" else cost.numpy()
    plan = solve_layers(cost, 0.1, scaling=scaling, marginals="semi-relaxed")
    weights = np.exp(-scaled / 0.1)
    assert_same_plan(plan.plan, weights / weights.sum(1, keepdims=True) / shape[0], 1e-10)
    # POT's unbalanced plan comes to it, as the source's marginal is asked for less and less; its entropy is
    # relative to the product of the marginals, which are uniform.
    unbalanced = ot.unbalanced.sinkhorn_unbalanced(
        np.full(shape[0], 1 / shape[0]),
        np.full(shape[1], 1 / shape[1]),
        scaled,
        reg=0.1,
        reg_m=(1e6, 1e-9),
        reg_type="kl",
        stopThr=1e-14,
        numItermax=10_000,
    )
    assert_same_plan(plan.plan, unbalanced, 1e-5)


def test_semi_relaxed_is_balanced_where_all_source_layers_are_alike():
    cost = _layer_cost(4, 1).expand(4, 3)
    torch.testing.assert_close(
        solve_layers(cost, 0.1, marginals="semi-relaxed").plan, solve_layers(cost, 0.1).plan, rtol=1e-8, atol=0
    )


@pytest.mark.parametrize("marginals", ["balanced", "semi-relaxed"])
def test_median_scaling_sees_neither_units_nor_shifts(marginals):
    cost = _layer_cost()
    plan = solve_layers(cost, 0.1, marginals=marginals).plan
    torch.testing.assert_close(solve_layers(40 * cost + 3, 0.1, marginals=marginals).plan, plan, rtol=1e-6, atol=0)
    flat = solve_layers(cost, 0.1, scaling="plain", marginals=marginals).plan
    assert flat.max() / flat.min() < plan.max() / plan.min()


def test_marginals_of_layer_plans():
    plan = solve_layers(_layer_cost(5, 7), 0.1).plan
    assert plan.dtype == torch.float64
    torch.testing.assert_close(plan.sum(1), torch.full((5,), 0.2, dtype=torch.float64), rtol=1e-8, atol=0)
    torch.testing.assert_close(plan.sum(0), torch.full((7,), 1 / 7, dtype=torch.float64), rtol=1e-8, atol=0)
    loose = solve_layers(_layer_cost(5, 7), 0.1, marginals="semi-relaxed").plan
    torch.testing.assert_close(loose.sum(1), torch.full((5,), 0.2, dtype=torch.float64), rtol=1e-8, atol=0)
    assert (loose.sum(0) - 1 / 7).abs().max() > 1e-3


def test_eta_is_raised_where_the_cost_passes_a_thousand():
    cost = 20_000 * (_layer_cost() - 0.8)  # 0 .. 2000
    largest = float(cost.max())
    assert largest > 1000
    plan = solve_layers(cost, 0.5, scaling="plain", max_iterations=20_000)
    assert plan.eta == pytest.approx(0.5 * largest / 1000)
    assert_same_plan(plan.plan, pot_plan(cost.numpy(), plan.eta), 1e-6)
    assert solve_layers(cost / largest * 999, 0.5, scaling="plain", max_iterations=1).eta == 0.5
    # What counts is the cost as it is used: after the scaling.
    assert solve_layers(cost, 0.5).eta == 0.5
    outlier = _layer_cost()
    outlier[0, 0] += 1e3
    scaled = _median_scaled(outlier)[0].max()
    assert solve_layers(outlier, 0.1, max_iterations=10).eta == pytest.approx(0.1 * scaled / 1000)


@pytest.mark.parametrize("marginals", ["balanced", "semi-relaxed"])
@pytest.mark.parametrize("scaling", ["median-scaled", "plain"])
def test_equal_costs_give_a_flat_plan(scaling, marginals):
    plan = solve_layers(torch.full((3, 5), 0.7), 0.1, scaling=scaling, marginals=marginals)
    torch.testing.assert_close(plan.plan, torch.full((3, 5), 1 / 15, dtype=torch.float64), rtol=1e-12, atol=0)
    # More than half of the costs at the minimum: the median is zero, and the cost is taken as it is.
    mostly = torch.full((3, 5), 0.7)
    mostly[1, 1] = 0.9
    plan = solve_layers(mostly, 0.1, scaling=scaling, marginals=marginals)
    assert plan.plan.isfinite().all() and plan.median == 1.0
    assert plan.plan[1, 1] < plan.plan[1, 0]


def test_a_layer_plan_that_did_not_converge_says_so():
    plan = solve_layers(_layer_cost(6, 6), 0.01, max_iterations=2)
    assert not plan.converged and plan.iterations == 2 and plan.marginal_error > 1e-9


def test_a_layer_cost_that_is_not_finite_is_refused():
    cost = _layer_cost()
    cost[2, 2] = float("nan")
    with pytest.raises(TransportError):
        solve_layers(cost, 0.1)


# -- reading layer plans -------------------------------------------------------------------------------------------


def test_effective_weights_are_geometric_means():
    pre, post = torch.tensor([[0.25, 0.0], [0.09, 0.16]]), torch.tensor([[0.04, 0.5], [0.25, 0.16]])
    expected = torch.tensor([[0.1, 0.0], [0.15, 0.16]])
    torch.testing.assert_close(effective_weights(pre, post), expected)
    torch.testing.assert_close(effective_weights(post, pre), expected)


def test_the_strongest_layers_are_kept():
    weights = torch.tensor([[0.1, 0.4, 0.2, 0.3], [0.9, 0.0, 0.5, 0.1]])
    indices, values = keep_layers(weights, 2)
    assert indices.tolist() == [[1, 3], [0, 2]]
    torch.testing.assert_close(values, torch.tensor([[0.4, 0.3], [0.9, 0.5]]))
    for more in (4, 10):
        indices, values = keep_layers(weights, more)
        assert indices.shape == (2, 4)
        torch.testing.assert_close(values, weights.sort(1, descending=True).values, rtol=0, atol=0)


def test_coupling_is_the_effective_weights_and_what_is_kept_of_them():
    pre, post = (
        LayerPlan(torch.rand(3, 4, generator=torch.Generator().manual_seed(seed)), 0.1, 1.0, True, 1, 0.0)
        for seed in range(2)
    )
    weights, indices, values = couple_layers(pre, post, 2)
    torch.testing.assert_close(weights, (pre.plan * post.plan).sqrt())
    for row in range(3):
        assert indices[row].tolist() == weights[row].argsort(descending=True)[:2].tolist()
        torch.testing.assert_close(values[row], weights[row][indices[row]])
