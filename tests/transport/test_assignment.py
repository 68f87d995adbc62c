"""The assignment on candidates against SciPy's dense solver: as good to the last digit, whatever the problem."""

import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment

from tmerge.transport import assignment
from tmerge.transport.assignment import assign


def total(similarity, rows, columns):
    return float(similarity.double()[rows, columns].sum())


def best(similarity):
    return total(similarity, *linear_sum_assignment(similarity.double().numpy(), maximize=True))


def planted(n, m, rows, noise, share=1.0, seed=0):
    """Correlations of n neurons, `share` of which have a counterpart, with m; and the counterparts."""
    generator = torch.Generator().manual_seed(seed)
    source = torch.randn(rows, m, generator=generator)
    origin = torch.randperm(m, generator=generator)[:n]
    target = source[:, origin] + noise * torch.randn(rows, n, generator=generator)
    strangers = round(n * (1 - share))
    target[:, n - strangers :] = torch.randn(rows, strangers, generator=generator)
    target, source = ((part - part.mean(0)) / part.std(0) / rows**0.5 for part in (target, source))
    return target.T @ source, origin


@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.integers(1, 40), st.integers(1, 40), st.integers(0, 2**31), st.booleans(), st.booleans())
def test_no_assignment_is_better(n, m, seed, ties, double):
    generator = torch.Generator().manual_seed(seed)
    similarity = torch.rand(n, m, generator=generator, dtype=torch.float64 if double else torch.float32) * 2 - 1
    if ties:
        similarity = (similarity * 2).round() / 2
    before = similarity.clone()
    rows, columns = assign(similarity, large=0)
    assert similarity.equal(before)
    assert len(rows) == len(set(rows.tolist())) == len(set(columns.tolist())) == min(n, m)
    assert total(similarity, rows, columns) == pytest.approx(best(similarity), abs=1e-6)


@pytest.mark.parametrize(
    ("n", "m", "noise", "share"),
    [(300, 500, 0.5, 1), (300, 500, 1.5, 0.8), (400, 400, 4, 1), (400, 420, 1.5, 0.3), (400, 400, 1.5, 0)],
)
def test_it_is_scipys_own_from_clear_counterparts_to_none(n, m, noise, share):
    similarity, _ = planted(n, m, 200, noise, share)
    rows, columns = linear_sum_assignment(similarity.double().numpy(), maximize=True)
    wanted = dict(zip(rows.tolist(), columns.tolist(), strict=True))
    found = dict(zip(*(side.tolist() for side in assign(similarity, large=0)), strict=True))
    assert found == wanted
    # Whichever side is the narrower.
    columns, rows = assign(similarity.T, large=0)
    assert dict(zip(rows.tolist(), columns.tolist(), strict=True)) == wanted


def test_half_of_a_published_size_is_exact_and_finds_what_was_planted():
    similarity, origin = planted(2048, 3584, 500, 1.5)
    assert similarity.numel() >= assignment._LARGE  # as it is solved in a run
    rows, columns = assign(similarity)
    assert total(similarity, rows, columns) == pytest.approx(best(similarity), abs=1e-9)
    assert columns.equal(origin)


def test_too_many_candidates_leave_it_to_the_dense_solver(monkeypatch):
    similarity, _ = planted(60, 60, 200, 4)
    monkeypatch.setattr(assignment, "_ROUNDS", 0)
    assert total(similarity, *assign(similarity, large=0)) == pytest.approx(best(similarity), abs=1e-9)


@pytest.mark.slow
def test_a_published_size_takes_seconds():
    similarity, origin = planted(8192, 14336, 1000, 1.5)
    began = time.perf_counter()
    rows, columns = assign(similarity)
    # On a busy machine too; about 1 s in one thread (docs/performance.md).
    assert time.perf_counter() - began < 20
    assert columns.equal(origin) and rows.equal(torch.arange(8192))
