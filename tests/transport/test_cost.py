"""The correlation cost against NumPy, and what must not matter to it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.transport.reference import feature_pair, reference_cost
from tmerge.errors import TransportError
from tmerge.transport import correlation_cost, standardise

_property = settings(max_examples=50, deadline=None, derandomize=True)


def _cost(target, source, dtype=torch.float64):
    return correlation_cost(standardise(target, dtype), standardise(source, dtype))


@pytest.mark.parametrize("shape", [(20, 20), (7, 30), (30, 7), (1, 5), (5, 1), (1, 1)], ids=str)
@pytest.mark.parametrize("kind", ["independent", "factors", "copies"])
def test_equals_numpy(kind, shape):
    target, source = feature_pair(kind, *shape)
    cost = _cost(target, source)
    assert cost.shape == shape
    torch.testing.assert_close(cost, torch.from_numpy(reference_cost(target, source)), rtol=0, atol=1e-14)
    assert (cost >= 0).all() and (cost <= 2).all()


# Features of each dtype, the reference from the same numbers in float64; 1e-6 is some ten roundings of float32.
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_float32_arithmetic_equals_numpy(dtype):
    target, source = (features.to(dtype) for features in feature_pair("factors", 40, 30, texts=925))
    cost = _cost(target, source, torch.float32)
    assert cost.dtype == torch.float32
    wanted = torch.from_numpy(reference_cost(target, source)).float()
    torch.testing.assert_close(cost, wanted, rtol=0, atol=1e-6)


def test_large_means_do_not_drown_the_deviations():
    """Massive activations: a mean a thousand times the deviation costs float32 features three digits, not all."""
    target, source = feature_pair("factors", 10, 12)
    target, source = (target + 1000).float(), (source - 5000).float()
    wanted = torch.from_numpy(reference_cost(target, source))
    torch.testing.assert_close(_cost(target, source), wanted, rtol=0, atol=1e-12)


@_property
@given(st.integers(0, 2**31), st.integers(-20, 20), st.floats(-100, 100))
def test_units_of_a_feature_do_not_matter(seed, exponent, shift):
    target, source = feature_pair("factors", 5, 6, texts=30, seed=seed)
    scale = 2.0**exponent
    cost = _cost(target, source)
    # A shift of up to 100 deviations, scaled down by 2^-20, leaves eight digits of the deviations or more.
    torch.testing.assert_close(_cost(target * scale + shift, source), cost, rtol=0, atol=1e-7)
    torch.testing.assert_close(_cost(target, source * scale), cost, rtol=0, atol=1e-13)
    torch.testing.assert_close(_cost(-target, source), 2 - cost, rtol=0, atol=1e-13)
    order = torch.randperm(30, generator=torch.Generator().manual_seed(seed))
    torch.testing.assert_close(_cost(target[order], source[order]), cost, rtol=0, atol=1e-13)


def test_the_same_features_cost_nothing_and_opposite_ones_two():
    target, _ = feature_pair("factors", 8, 1)
    cost = _cost(target, torch.cat([3 * target + 1, -target], 1))
    torch.testing.assert_close(cost[:, :8].diagonal(), torch.zeros(8).double(), rtol=0, atol=1e-14)
    torch.testing.assert_close(cost[:, 8:].diagonal(), torch.full((8,), 2.0).double(), rtol=0, atol=1e-14)
    single = _cost(target, torch.cat([target, -target], 1), torch.float32)
    assert (single >= 0).all() and (single <= 2).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("value", [0.0, 1.0, 0.1, -123.456, 1e6, 1e-30])
def test_a_constant_feature_costs_exactly_one(value, dtype):
    target, source = (features.to(dtype) for features in feature_pair("factors", 6, 7))
    target[:, 2] = value
    source[:, 4] = value
    cost = _cost(target, source, torch.float32)
    assert (cost[2] == 1).all() and (cost[:, 4] == 1).all()
    left = torch.ones(6, 7, dtype=torch.bool)
    left[2] = left[:, 4] = False
    assert (cost[left] != 1).all()


def test_rounding_around_a_constant_is_no_variation():
    """A mean over tokens of one and the same value differs in its last bit from text to text."""
    target, source = feature_pair("factors", 3, 3)
    generator = torch.Generator().manual_seed(0)
    target = target.float()
    target[:, 0] = 0.3 + 2**-25 * torch.randint(-1, 2, (200,), generator=generator)
    assert target[:, 0].unique().numel() > 1
    assert (_cost(target, source)[0] == 1).all()
    # And a small variation that float32 does hold is one.
    target[:, 0] = 0.3 + 1e-4 * source[:, 0].float()
    assert _cost(target, source)[0, 0] < 1e-3


def test_standardised_columns_have_mean_zero_and_norm_one():
    features, _ = feature_pair("factors", 9, 1)
    features[:, 3] = 4.0
    standard = standardise(features * 5 + 2, torch.float64)
    norms = torch.ones(9).double()
    norms[3] = 0.0
    torch.testing.assert_close(standard.mean(0), torch.zeros(9).double(), rtol=0, atol=1e-15)
    torch.testing.assert_close(standard.norm(dim=0), norms, rtol=0, atol=1e-14)
    assert standardise(features).dtype == torch.float32
    before = features.clone()
    standardise(features, torch.float64)
    assert features.equal(before)


def test_a_batch_of_sources_is_its_layers_one_by_one():
    target, _ = feature_pair("factors", 6, 1)
    sources = [feature_pair("factors", 6, 8, seed=seed)[1] for seed in range(3)]
    batch = torch.stack([standardise(source, torch.float64) for source in sources])
    costs = correlation_cost(standardise(target, torch.float64), batch)
    assert costs.shape == (3, 6, 8)
    for cost, source in zip(costs, sources, strict=True):
        torch.testing.assert_close(cost, _cost(target, source), rtol=0, atol=1e-14)


def test_two_texts_are_enough():
    cost = _cost(torch.tensor([[0.0, 1.0], [1.0, 0.0]]), torch.tensor([[2.0], [5.0]]))
    torch.testing.assert_close(cost, torch.tensor([[0.0], [2.0]]).double(), rtol=0, atol=1e-15)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_features_that_are_not_finite_are_refused(value):
    features = torch.randn(10, 3)
    features[4, 1] = value
    with pytest.raises(TransportError, match="not finite.*float32"):
        standardise(features)


@pytest.mark.parametrize("shape", [(1, 5), (0, 5), (5,), (2, 3, 4)], ids=str)
def test_features_of_another_shape_are_refused(shape):
    with pytest.raises(TransportError, match="at least two texts"):
        standardise(torch.zeros(shape))


def test_models_that_read_unequal_numbers_of_texts_are_refused():
    with pytest.raises(TransportError, match="10 texts and source features 11.*same texts"):
        correlation_cost(standardise(torch.randn(10, 3)), standardise(torch.randn(11, 3)))
