"""Leading directions and factors, against a full decomposition in float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tmerge.fusion.low_rank import factors, of_rank


def drawn(n, m, seed):
    return torch.randn(n, m, generator=torch.Generator().manual_seed(seed))


@given(n=st.integers(1, 60), m=st.integers(1, 60), rank=st.integers(0, 12), seed=st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_a_product_has_its_factors_back_at_its_own_rank(n, m, rank, seed):
    matrix = drawn(n, rank, seed) @ drawn(rank, m, seed + 1)
    up, down = factors(matrix)
    expected = int(torch.linalg.matrix_rank(matrix.double(), rtol=1e-6)) if rank else 0
    assert up.shape == (n, expected) and down.shape == (expected, m)
    assert torch.linalg.vector_norm(up @ down - matrix) <= 2e-6 * torch.linalg.vector_norm(matrix)
    torch.testing.assert_close(down @ down.T, torch.eye(expected), rtol=0, atol=1e-5)


@pytest.mark.parametrize("shape", [(64, 48), (24, 64), (5, 9), (130, 100)])
def test_of_full_rank_it_has_as_many_as_it_has_dimensions(shape):
    matrix = drawn(*shape, 0)
    up, down = factors(matrix)
    assert down.shape[0] == min(shape)
    torch.testing.assert_close(up @ down, matrix, rtol=1e-5, atol=1e-5)


@given(decay=st.floats(0, 2), rank=st.integers(1, 20), seed=st.integers(0, 99))
@settings(max_examples=30, deadline=None)
def test_no_matrix_of_that_rank_is_nearer(decay, rank, seed):
    matrix = drawn(70, 50, seed) * torch.arange(1, 51).float().pow(-decay)
    near = of_rank(matrix, rank)
    sizes = torch.linalg.svdvals(matrix.double())
    best = float(sizes[rank:].square().sum().sqrt())
    assert float(torch.linalg.vector_norm((matrix - near).double())) <= 1.001 * best
    assert torch.linalg.matrix_rank(near.double(), rtol=1e-6) <= rank


def test_a_rank_that_is_no_bound_changes_nothing():
    matrix = drawn(6, 9, 3)
    assert of_rank(matrix, 6) is matrix
