"""The rivals of a plan: fitted maps against SciPy and NumPy, and that a merge takes them in the plan's place."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.transport.reference import feature_pair
from tmerge.recipe import Apart
from tmerge.transport import FeatureMap, Statistics, Transport
from tmerge.transport.rivals import procrustes, ridge, with_fitted_maps

_property = settings(max_examples=30, deadline=None, derandomize=True)
_seeds = st.integers(0, 2**31)


def _orthogonal(n, m, seed=0):
    """(n, m) with orthonormal rows, or columns where n > m."""
    generator = torch.Generator().manual_seed(seed)
    wide = torch.randn(max(n, m), min(n, m), generator=generator, dtype=torch.float64)
    columns = torch.linalg.qr(wide)[0]
    return columns if n >= m else columns.T


# -- procrustes ----------------------------------------------------------------------------------------------------


@_property
@given(st.integers(1, 12), _seeds)
def test_procrustes_finds_a_rotation_exactly(n, seed):
    target, _ = feature_pair("independent", n, 1, seed=seed)
    rotation = _orthogonal(n, n, seed)
    out, inwards = procrustes(target + 3.0, target @ rotation - 7.0)
    # The maps are kept in float32.
    torch.testing.assert_close(out.double(), rotation, rtol=0, atol=1e-6)
    assert inwards.equal(out.T) and out.dtype == torch.float32


@pytest.mark.parametrize("kind", ["independent", "factors", "copies"])
def test_procrustes_equals_scipy(kind):
    target, source = feature_pair(kind, 15, 15)
    centred = [(side - side.mean(0)).numpy() for side in (target, source)]
    wanted, _ = scipy.linalg.orthogonal_procrustes(centred[1], centred[0])
    np.testing.assert_allclose(procrustes(target, source)[0].numpy(), wanted.T, rtol=0, atol=1e-6)


@pytest.mark.parametrize("shape", [(8, 14), (14, 8)], ids=str)
def test_between_two_widths_it_is_semi_orthogonal_and_the_best_there_is(shape):
    target, source = feature_pair("factors", *shape)
    out, inwards = (found.double() for found in procrustes(target, source))
    assert out.shape == shape and inwards.equal(out.T)
    narrow = out @ out.T if shape[0] < shape[1] else out.T @ out
    torch.testing.assert_close(narrow, torch.eye(8).double(), rtol=0, atol=1e-6)
    # Of all such maps it has the largest inner product with the two models' covariance.
    covariance = (target - target.mean(0)).T @ (source - source.mean(0))
    best = float((out * covariance).sum())
    assert best == pytest.approx(float(torch.linalg.svdvals(covariance).sum()), rel=1e-6)
    assert all(float((_orthogonal(*shape, seed) * covariance).sum()) < best for seed in range(20))


# -- ridge ---------------------------------------------------------------------------------------------------------


def _augmented(given, wanted, penalty):
    """The same problem as plain least squares: a row for each feature that costs its size."""
    centred = [(side - side.mean(0)).numpy() for side in (given, wanted)]
    n = centred[0].shape[1]
    size = np.sqrt(penalty * np.mean(np.sum(centred[0] ** 2, axis=0)))
    rows = np.vstack([centred[0], size * np.eye(n)]), np.vstack([centred[1], np.zeros((n, centred[1].shape[1]))])
    return np.linalg.lstsq(*rows, rcond=None)[0].T


@pytest.mark.parametrize("shape", [(10, 10), (8, 14), (14, 8)], ids=str)
@pytest.mark.parametrize("penalty", [1e-6, 0.1, 10.0])
def test_ridge_equals_least_squares_with_rows_for_the_penalty(shape, penalty):
    target, source = feature_pair("factors", *shape)
    out, inwards = ridge(target + 2.0, source - 5.0, penalty)
    assert out.shape == shape and inwards.shape == shape[::-1] and out.dtype == torch.float32
    np.testing.assert_allclose(out.numpy(), _augmented(source, target, penalty), rtol=0, atol=1e-6)
    np.testing.assert_allclose(inwards.numpy(), _augmented(target, source, penalty), rtol=0, atol=1e-6)


def test_ridge_finds_a_linear_map_where_the_penalty_is_small():
    target, _ = feature_pair("independent", 6, 1)
    mixing = torch.randn(6, 9, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    _, inwards = ridge(target, target @ mixing, 1e-9)
    torch.testing.assert_close(inwards.double(), mixing.T, rtol=0, atol=1e-6)


@_property
@given(st.floats(-12, 12), _seeds)
def test_the_penalty_is_relative_to_the_features(exponent, seed):
    """In other units of a whole model, the same map between those units."""
    target, source = feature_pair("factors", 5, 7, seed=seed)
    scale = 2.0**exponent
    out, inwards = ridge(target, source, 0.1)
    scaled_out, scaled_in = ridge(target, source * scale, 0.1)
    torch.testing.assert_close(scaled_out * scale, out, rtol=0, atol=1e-6)
    torch.testing.assert_close(scaled_in / scale, inwards, rtol=0, atol=1e-6)


def test_more_features_than_texts_are_no_trouble():
    target, source = feature_pair("independent", 30, 40, texts=12)
    out, inwards = ridge(target, source, 0.1)
    assert out.isfinite().all() and inwards.isfinite().all()


# -- in the plan's place -------------------------------------------------------------------------------------------


def _solved(plan):
    """A transport all of whose plans are this one."""

    def build(layer, wanted):
        return {(key, other): FeatureMap(key, layer, other, plan, plan > 0, partial=True) for key, other in wanted}

    return Transport("none", {}, {}, build, True, lambda: Statistics({}, {}), {}, True)


@pytest.mark.parametrize("kind", ["procrustes", "ridge"])
def test_fitted_maps_take_the_place_of_those_of_the_plan_which_stays_for_the_record(kind):
    target, source = feature_pair("factors", 4, 6)
    other_source = feature_pair("factors", 4, 6, seed=1)[1]
    plan, sources = torch.full((4, 6), 1 / 24), {3: source, 5: other_source}
    solved, settings = _solved(plan), Apart(map=kind, ridge=0.1)
    fitted = with_fitted_maps(solved, lambda layer, key: target, lambda layer, key: sources[layer], settings)
    # A fitted map has no empty rows that would say anything.
    assert solved.matched and not fitted.matched
    for other in (3, 5):
        found, plain = fitted.feature_map(0, "q.post", other), solved.feature_map(0, "q.post", other)
        wanted = procrustes(target, sources[other]) if kind == "procrustes" else ridge(target, sources[other], 0.1)
        for scale in ("barycentric", "literal"):
            got = found.phi_out(scale), found.phi_in(scale)
            assert all(map(torch.equal, got, wanted))
            assert not got[0].equal(plain.phi_out(scale)) and not got[1].equal(plain.phi_in(scale))
        assert (found.key, found.target_layer, found.source_layer) == ("q.post", 0, other)
        assert found.plan.equal(plan) and found.survives.equal(plan > 0)


def test_plans_stay_as_they_are_where_nothing_is_fitted():
    solved = _solved(torch.full((4, 6), 1 / 24))
    assert with_fitted_maps(solved, solved.build, solved.build, Apart()) is solved
