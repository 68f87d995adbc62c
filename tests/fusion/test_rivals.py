"""The rivals of a plan: fitted maps against SciPy and NumPy, and that a merge takes them in the plan's place."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.transport.reference import feature_pair
from tmerge.fusion import phi_in, phi_out
from tmerge.fusion.pairs import PlanPair
from tmerge.fusion.rivals import MappedPairs, procrustes, ridge

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


class _Solved:
    """Pairs whose plans are known."""

    def __init__(self):
        self.kept = []

    def of_layer(self, layer, wanted):
        plan = torch.full((4, 6), 1 / 24)
        return {(key, other): PlanPair(key, layer, other, plan, plan > 0, torch.ones(14)) for key, other in wanted}

    def keep(self, used):
        self.kept += used

    def tensors(self):
        return {"mass.q.post": torch.ones(1)}


@pytest.mark.parametrize("kind", ["procrustes", "ridge"])
def test_mapped_pairs_keep_their_plan_for_the_record_and_take_fitted_maps(kind):
    target, source = feature_pair("factors", 4, 6)
    other_source = feature_pair("factors", 4, 6, seed=1)[1]
    solved = _Solved()
    sources = {3: source, 5: other_source}
    pairs = MappedPairs(solved, (lambda layer, key: target, lambda layer, key: sources[layer]), kind, 0.1)
    found = pairs.of_layer(0, [("q.post", 3), ("q.post", 5)])
    for (key, other), pair in found.items():
        wanted = procrustes(target, sources[other]) if kind == "procrustes" else ridge(target, sources[other], 0.1)
        assert pair.maps is not None and all(map(torch.equal, pair.maps, wanted))
        assert key == pair.key and (pair.row, pair.column) == (0, other) and pair.plan.equal(torch.full((4, 6), 1 / 24))
        assert not pair.maps[0].equal(phi_out(pair.plan, scale="barycentric", kept=6))
        assert not pair.maps[1].equal(phi_in(pair.plan, scale="barycentric", kept=6))
    pairs.keep(list(found.values()))
    assert solved.kept == list(found.values()) and pairs.tensors().keys() == {"mass.q.post"}
