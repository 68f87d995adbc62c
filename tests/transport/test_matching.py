"""Matching neurons: against SciPy's assignment and POT's plans, and what becomes of neurons that are left over."""

from __future__ import annotations

import numpy as np
import ot
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment

from tests.transport.reference import feature_pair, pot_plan, reference_cost
from tmerge.transport import Correspondence, Solver, correlation_cost, match, standardise

_property = settings(max_examples=50, deadline=None, derandomize=True)
_sizes = st.integers(1, 8)
_seeds = st.integers(0, 2**31)


def _random(n, m, seed=0):
    """Similarities (n, m) within [-1, 1), float64; ties have probability zero."""
    return 2 * torch.rand(n, m, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) - 1


def _correlations(target, source):
    return 1 - correlation_cost(standardise(target), standardise(source))


# -- one to one ----------------------------------------------------------------------------------------------------


@_property
@given(_sizes, _seeds)
def test_equals_scipy_where_both_are_as_wide(n, seed):
    similarity = _random(n, n, seed)
    rows, columns = linear_sum_assignment(-similarity.numpy())
    found = match(similarity)
    assert found.rows.tolist() == rows.tolist() and found.columns.tolist() == columns.tolist()
    assert found.values.tolist() == [1.0] * n and found.shape == (n, n)
    assert found.iterations == 0 and found.marginal_error == 0.0


@pytest.mark.parametrize("kind", ["independent", "factors", "copies"])
def test_is_pots_plan_without_regularisation(kind):
    cost = reference_cost(*feature_pair(kind, 12, 12))
    uniform = np.full(12, 1 / 12)
    matched = match(1 - torch.from_numpy(cost)).dense().numpy()
    np.testing.assert_allclose(matched, 12 * ot.emd(uniform, uniform, cost), rtol=0, atol=1e-12)


def test_is_what_pots_plan_becomes_as_eps_goes_to_zero():
    cost = reference_cost(*feature_pair("copies", 8, 8))
    uniform = np.full(8, 1 / 8)
    matched = match(1 - torch.from_numpy(cost)).dense().numpy()
    distances = []
    for epsilon in (0.5, 0.2, 0.02):
        plan = ot.sinkhorn(uniform, uniform, cost, epsilon, method="sinkhorn_log", stopThr=1e-9)
        distances.append(np.abs(8 * plan - matched).max())
    assert sorted(distances, reverse=True) == distances
    # Each falls as exp(-gap / eps).
    assert distances[0] > 0.1 and distances[-1] < 1e-12


@_property
@given(_sizes, _sizes, _seeds)
def test_order_of_the_neurons_does_not_matter(n, m, seed):
    similarity = _random(n, m, seed)
    generator = torch.Generator().manual_seed(seed)
    rows, columns = torch.randperm(n, generator=generator), torch.randperm(m, generator=generator)
    assert match(similarity[rows][:, columns]).dense().equal(match(similarity).dense()[rows][:, columns])


@_property
@given(_sizes, _sizes, _seeds)
def test_the_narrower_side_has_partners_and_pairs_are_scipys(n, m, seed):
    similarity = _random(n, m, seed)
    plan = match(similarity).dense()
    assert set(plan.unique().tolist()) <= {0.0, 1.0}
    rows, columns = linear_sum_assignment(-similarity.numpy())
    assert (plan[rows, columns] == 1).all()
    wide, narrow = (0, 1) if n <= m else (1, 0)
    assert (plan.sum(narrow) >= 1).all() and (plan.sum(wide) <= 1).all()
    # Neither model is the one that the other is matched with.
    assert match(similarity.T).dense().T.equal(plan)


# -- what is left over ---------------------------------------------------------------------------------------------


def test_exact_copies_join_and_strangers_stay_out():
    target, strangers = feature_pair("independent", 10, 7, texts=300)
    order = torch.randperm(27, generator=torch.Generator().manual_seed(0))
    source = torch.cat([target, 2 * target + 5, strangers], 1)[:, order]
    # Twice each target neuron, in its own units, and seven that have no counterpart.
    origin = torch.cat([torch.arange(10), torch.arange(10), torch.full((7,), -1)])[order]
    wanted = (origin == torch.arange(10).unsqueeze(1)).float()
    assert match(_correlations(target, source)).dense().equal(wanted)


def test_a_copy_joins_only_where_it_is_as_near_as_the_partner():
    similarity = torch.tensor([[0.9, 0.895, 0.2], [0.1, 0.2, 0.8]])
    # Within a hundredth of the partner's own similarity.
    assert match(similarity).dense().tolist() == [[1, 1, 0], [0, 0, 1]]
    similarity[0, 1] = 0.88
    assert match(similarity).dense().tolist() == [[1, 0, 0], [0, 0, 1]]


def test_what_resembles_nothing_is_no_copy():
    similarity = torch.tensor([[-0.2, -0.3], [-0.4, -0.9]])
    assert match(similarity[:, :1].T).dense().tolist() == [[1, 0]]
    assert match(torch.zeros(2, 3)).dense().sum() == 2


def test_a_wider_targets_leftovers_have_a_partner_only_as_copies():
    similarity = torch.tensor([[0.9, 0.1], [0.895, 0.3], [0.2, 0.7], [0.3, -0.1]])
    found = match(similarity)
    assert found.dense().tolist() == [[1, 0], [1, 0], [0, 1], [0, 0]]
    assert found.partner().tolist() == [0, 0, 1, -1]
    target, source = feature_pair("independent", 6, 1)
    wide = torch.cat([target, target, target], 1)[:, torch.randperm(18, generator=torch.Generator().manual_seed(1))]
    found = match(_correlations(wide, target))
    assert _correlations(wide, target).argmax(1).equal(found.partner())
    assert found.dense().sum(0).tolist() == [3.0] * 6


# -- regularised ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(12, 12), (9, 14), (14, 9)], ids=str)
@pytest.mark.parametrize("epsilon", [0.1, 0.03])
def test_with_eps_it_equals_pot(shape, epsilon):
    cost = reference_cost(*feature_pair("factors", *shape))
    wanted = torch.from_numpy(shape[0] * pot_plan(cost, epsilon))
    found = Solver(epsilon, 20_000, 1e-12)(1 - torch.from_numpy(cost))
    assert found.iterations > 1 and found.marginal_error <= 1e-12
    # Entries below 1e-4 of the largest of their row and of their column are left out.
    large = (wanted >= 1e-4 * wanted.amax(1, keepdim=True)) | (wanted >= 1e-4 * wanted.amax(0, keepdim=True))
    got = found.dense().double()
    assert (got > 0).equal(large)
    # Values are kept in float32.
    torch.testing.assert_close(got, torch.where(large, wanted, 0.0), rtol=1e-6, atol=0)


def test_without_eps_it_matches():
    similarity = _random(6, 9)
    assert Solver()(similarity).dense().equal(match(similarity).dense())


def test_a_plan_that_is_cut_short_says_how_far_it_is():
    similarity = 1 - torch.from_numpy(reference_cost(*feature_pair("factors", 12, 12)))
    found = Solver(0.01, 2)(similarity)
    assert found.iterations == 2 and found.marginal_error > 1e-6


# -- correspondences -----------------------------------------------------------------------------------------------


def test_signs_are_those_of_the_similarity():
    similarity = torch.tensor([[0.1, -0.9], [-0.8, 0.2], [0.3, 0.7]])
    found = match(similarity.abs()).signed(similarity)
    assert found.dense().tolist() == [[0, -1], [-1, 0], [0, 0]]
    assert found.partner().tolist() == [1, 0, -1]
    # A second time changes nothing, and a plan's entries keep their size.
    assert found.signed(similarity).dense().equal(found.dense())
    plan = Solver(0.1, tolerance=1e-12)(similarity.abs())
    assert plan.signed(similarity).dense().abs().equal(plan.dense())
    assert plan.signed(similarity).dense().sign().equal(similarity.sign() * (plan.dense() > 0))


@_property
@given(_sizes, _sizes, _seeds)
def test_a_correspondence_is_its_dense_plan(n, m, seed):
    plan = _random(n, m, seed).float()
    plan = torch.where(plan.abs() > 0.5, plan, 0.0)
    found = Correspondence.of(plan, 3, 0.5)
    assert found.dense().equal(plan)
    assert (found.iterations, found.marginal_error, found.shape) == (3, 0.5, (n, m))
