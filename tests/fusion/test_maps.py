"""Phi_out and Phi_in, and Theorem 4.1: what a transported weight does to the target's features."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tmerge.fusion import transport_neurons, unit_factors
from tmerge.transport import FeatureStatistics, mutual_top, phi_in, phi_out, plan_from_potentials, sinkhorn

_property = settings(max_examples=50, deadline=None, derandomize=True)
_sizes = st.integers(1, 9)
_seeds = st.integers(0, 2**31)


def _generator(seed):
    return torch.Generator().manual_seed(seed)


def _plan(n, m, seed=0, epsilon=0.2):
    """A transport plan (n, m) of a random cost."""
    cost = 2 * torch.rand(n, m, generator=_generator(seed), dtype=torch.float64)
    result = sinkhorn(cost, epsilon, max_iterations=20_000, tolerance=1e-10)
    return plan_from_potentials(cost, result.f, result.g, epsilon)


def _permutation_plan(n, seed):
    """The plan of a one-to-one correspondence, with the order (n,) that it stands for."""
    order = torch.randperm(n, generator=_generator(seed))
    plan = torch.zeros(n, n, dtype=torch.float64)
    plan[torch.arange(n), order] = 1 / n
    return plan, order


# -- the maps ------------------------------------------------------------------------------------------------------


@_property
@given(_sizes, _sizes, st.integers(1, 10), _seeds, st.sampled_from(["barycentric", "row-norm"]))
def test_barycentric_maps_are_averages(n, m, kept, seed, scale):
    plan = _plan(n, m, seed)
    outwards, inwards = phi_out(plan, scale=scale, kept=kept), phi_in(plan, scale=scale, kept=kept)
    assert outwards.shape == (n, m) and inwards.shape == (m, n)
    for average in (outwards, inwards):
        assert (average >= 0).all()
        torch.testing.assert_close(average.sum(1), torch.ones(len(average)).double(), rtol=0, atol=1e-12)
    # A source neuron that is the same for all its target neurons comes over as it is.
    torch.testing.assert_close(outwards @ torch.full((m,), 3.5).double(), torch.full((n,), 3.5).double())


def test_dense_barycentric_maps_are_the_plan_times_the_number_of_neurons():
    plan = _plan(5, 7)
    torch.testing.assert_close(phi_out(plan, scale="barycentric", kept=7), 5 * plan, rtol=1e-9, atol=0)
    torch.testing.assert_close(phi_in(plan, scale="barycentric", kept=7), 7 * plan.T, rtol=1e-9, atol=0)


@_property
@given(_sizes, _sizes, st.integers(1, 10), _seeds)
def test_literal_maps_are_the_masked_plan(n, m, kept, seed):
    plan = _plan(n, m, seed)
    expected = plan * mutual_top(plan, kept)
    torch.testing.assert_close(phi_out(plan, scale="literal", kept=kept), expected, rtol=0, atol=0)
    torch.testing.assert_close(phi_in(plan, scale="literal", kept=kept), expected.T, rtol=0, atol=0)


@_property
@given(_sizes, _sizes, st.integers(1, 4), _seeds)
def test_sparsified_rows_keep_their_proportions(n, m, kept, seed):
    plan = _plan(n, m, seed)
    mask = mutual_top(plan, kept)
    average = phi_out(plan, scale="barycentric", kept=kept)
    for row in range(n):
        if mask[row].any():
            expected = torch.where(mask[row], plan[row], 0.0)
            torch.testing.assert_close(average[row], expected / expected.sum())
        else:
            assert average[row].nonzero().flatten().tolist() == [int(plan[row].argmax())]


def test_a_row_that_lost_every_vote_keeps_its_largest_entry():
    # The third row's best column prefers the first row, and the third row comes second in no column.
    plan = torch.tensor([[0.30, 0.05], [0.02, 0.28], [0.20, 0.15]])
    assert mutual_top(plan, 1).tolist() == [[True, False], [False, True], [False, False]]
    outwards = phi_out(plan, scale="barycentric", kept=1)
    assert outwards.tolist() == [[1.0, 0.0], [0.0, 1.0], [1.0, 0.0]]
    assert phi_in(plan, scale="barycentric", kept=1).tolist() == [[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]]
    # To the letter, it transports zeros.
    assert phi_out(plan, scale="literal", kept=1)[2].tolist() == [0.0, 0.0]


def test_a_row_left_with_zeros_alone_keeps_its_largest_entry():
    """At small eps a plan has exact zeros, and zeros that tie with the last entry kept stay in the mask."""
    plan = torch.tensor([[0.10, 0.0, 0.0], [0.20, 0.0, 0.0], [0.30, 0.0, 0.0], [0.0, 0.2, 0.2]])
    mask = mutual_top(plan, 2)
    assert mask[0].any() and not (plan[0] * mask[0]).any()
    outwards = phi_out(plan, scale="barycentric", kept=2)
    assert outwards[0].tolist() == [1.0, 0.0, 0.0]
    torch.testing.assert_close(outwards.sum(1), torch.ones(4))


def test_a_mask_that_is_there_already_is_used():
    plan = _plan(6, 5)
    mask = mutual_top(plan, 2)
    for build in (phi_out, phi_in):
        for scale in ("barycentric", "literal"):
            expected = build(plan, scale=scale, kept=2)
            assert build(plan, scale=scale, kept=99, mask=mask).equal(expected)


def test_maps_leave_the_plan_as_it_was():
    plan = torch.tensor([[0.30, 0.05], [0.02, 0.28], [0.20, 0.15]])
    before = plan.clone()
    for scale in ("barycentric", "literal"):
        phi_out(plan, scale=scale, kept=1)
        phi_in(plan, scale=scale, kept=1)
    assert plan.equal(before)


# -- Theorem 4.1 ---------------------------------------------------------------------------------------------------


@_property
@given(
    st.tuples(_sizes, _sizes, _sizes, _sizes), st.integers(1, 10), _seeds, st.sampled_from(["barycentric", "literal"])
)
def test_a_transported_layer_goes_there_applies_the_source_and_comes_back(sizes, kept, seed, scale):
    out_a, out_b, in_a, in_b = sizes
    generator = _generator(seed)
    weight = torch.randn(out_b, in_b, generator=generator, dtype=torch.float64)
    bias = torch.randn(out_b, generator=generator, dtype=torch.float64)
    back = phi_out(_plan(out_a, out_b, seed), scale=scale, kept=kept)
    there = phi_in(_plan(in_a, in_b, seed + 1), scale=scale, kept=kept)
    features = torch.randn(4, in_a, generator=generator, dtype=torch.float64)
    expected = torch.stack([back @ (weight @ (there @ x) + bias) for x in features])
    for projection, neurons in (("q", out_a), ("down", in_a)):
        moved, moved_bias = transport_neurons(weight, bias, back, there, projection, torch.arange(neurons))
        assert moved.shape == (out_a, in_a) and moved_bias.shape == (out_a,)
        torch.testing.assert_close(features @ moved.T + moved_bias, expected, rtol=1e-9, atol=1e-12)


@_property
@given(_sizes, _sizes, _seeds)
def test_between_models_of_one_shape_a_permutation_is_undone_exactly(n, m, seed):
    """Corollary 4.2: through invertible maps nothing is lost."""
    generator = _generator(seed)
    weight = torch.randn(n, m, generator=generator, dtype=torch.float64)
    bias = torch.randn(n, generator=generator, dtype=torch.float64)
    out_plan, out_order = _permutation_plan(n, seed)
    in_plan, in_order = _permutation_plan(m, seed + 1)
    rows = torch.arange(n)
    back, there = phi_out(out_plan, scale="barycentric", kept=3), phi_in(in_plan, scale="barycentric", kept=3)
    moved, moved_bias = transport_neurons(weight, bias, back, there, "q", rows)
    assert moved.equal(weight[out_order][:, in_order]) and moved_bias.equal(bias[out_order])
    # The same plans the other way round, target and source having changed places.
    back, there = phi_out(out_plan.T, scale="barycentric", kept=3), phi_in(in_plan.T, scale="barycentric", kept=3)
    home, home_bias = transport_neurons(moved, moved_bias, back, there, "q", rows)
    assert home.equal(weight) and home_bias.equal(bias)


def test_transport_is_linear_in_the_weight():
    """What makes a task vector's transport the difference of two transports."""
    generator = _generator(0)
    first, second = (torch.randn(6, 5, generator=generator, dtype=torch.float64) for _ in range(2))
    back, there = phi_out(_plan(4, 6), scale="barycentric", kept=3), phi_in(_plan(3, 5), scale="barycentric", kept=3)
    moved = [transport_neurons(w, None, back, there, "k", torch.arange(4))[0] for w in (first, second, first - second)]
    torch.testing.assert_close(moved[0] - moved[1], moved[2])


# -- units ---------------------------------------------------------------------------------------------------------


def _statistics(*columns):
    return FeatureStatistics.of(torch.tensor(columns).T)


def test_statistics_equal_one_pass_over_the_features():
    features = torch.randn(50, 7, generator=_generator(0)) * 3 + 1000
    statistics = FeatureStatistics.of(features.bfloat16())
    exact = features.bfloat16().double()
    torch.testing.assert_close(statistics.mean, exact.mean(0).float())
    torch.testing.assert_close(statistics.deviation, ((exact - exact.mean(0)) ** 2).mean(0).sqrt().float())
    torch.testing.assert_close(statistics.magnitude, exact.abs().mean(0).float())
    assert statistics.root_mean_square == pytest.approx(float(exact.square().mean().sqrt()), rel=1e-6)
    assert all(values.dtype == torch.float32 for values in (statistics.mean, statistics.deviation))


def test_units_none_leave_everything():
    a, b = unit_factors(_statistics([0.0, 2.0], [1.0, 9.0]), _statistics([0.0, 4.0]), "none")
    assert a.tolist() == [1.0, 1.0] and b.tolist() == [1.0]


def test_units_by_layer_are_one_ratio_of_root_mean_squares():
    target, source = _statistics([3.0, -3.0], [3.0, 3.0]), _statistics([6.0, 6.0], [-6.0, 6.0], [6.0, -6.0])
    a, b = unit_factors(target, source, "layer")
    torch.testing.assert_close(a, torch.tensor([0.5, 0.5]))
    assert b.tolist() == [1.0, 1.0, 1.0]
    a, _ = unit_factors(target, _statistics([0.0, 0.0]), "layer")
    assert a.tolist() == [1.0, 1.0]


def test_units_by_feature_turn_the_sources_deviations_into_the_targets():
    target, source = _statistics([0.0, 2.0], [5.0, 11.0]), _statistics([0.0, 4.0], [7.0, 7.0], [1.0, 2.0])
    a, b = unit_factors(target, source, "feature")
    assert a.tolist() == [1.0, 3.0]
    # The second source neuron never varies: nothing of it is carried, rather than infinitely much.
    assert b.tolist() == [0.5, 0.0, 2.0]
    back, forth = unit_factors(source, target, "feature")
    assert back.tolist() == [2.0, 0.0, 0.5] and forth.tolist() == [1.0, pytest.approx(1 / 3)]


@pytest.mark.parametrize("units", ["layer", "feature"])
def test_units_make_a_rescaled_twin_the_same_neuron(units):
    """The source is the target in other units: the factors and a one-to-one plan bring its features back."""
    features = torch.randn(40, 6, generator=_generator(1), dtype=torch.float64)
    scale = torch.full((6,), 7.0) if units == "layer" else torch.tensor([0.1, 1.0, 2.0, 30.0, 5.0, 0.5])
    plan, order = _permutation_plan(6, 2)
    theirs = torch.empty_like(features)
    theirs[:, order] = features * scale
    a, b = unit_factors(FeatureStatistics.of(features), FeatureStatistics.of(theirs), units)
    carry_back = a.double().unsqueeze(1) * phi_out(plan, scale="barycentric", kept=6) * b.double()
    # The factors are kept in float32.
    torch.testing.assert_close(theirs @ carry_back.T, features, rtol=1e-6, atol=1e-6)
