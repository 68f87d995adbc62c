"""The closed-form fit against an independent least squares in float64, and the reduced rank against a search."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tmerge.errors import FusionError
from tmerge.fusion.ridge import Regression


def problem(seed, rows=200, inputs=12, outputs=7):
    draw = torch.Generator().manual_seed(seed)
    inputs_ = torch.randn(rows, inputs, generator=draw) * torch.linspace(0.5, 2, inputs) + 0.3
    lack = inputs_ @ torch.randn(inputs, outputs, generator=draw) + torch.randn(rows, outputs, generator=draw) + 0.7
    return inputs_, lack, 0.1 + torch.rand(rows, generator=draw)


def fitted(inputs, lack, weights, ridge, *, has_bias=False, rank=None, pieces=3):
    found = Regression(inputs.shape[1], lack.shape[1], has_bias=has_bias)
    for part in torch.arange(len(inputs)).chunk(pieces):
        found.add(inputs[part], lack[part], lack[part] + 1, None if weights is None else weights[part])
    return found.solve(ridge, rank)


def augmented(inputs, lack, weights, ridge, has_bias):
    """The same as one ordinary least-squares problem: rows that hold the weight back, none for the bias."""
    x, e = inputs.double().numpy(), lack.double().numpy()
    w = np.ones(len(x)) if weights is None else weights.double().numpy()
    held = np.sqrt(ridge * np.mean(np.sum((x * w[:, None]) ** 2, 0)))
    x = np.concatenate([x, np.ones((len(x), 1))], 1) if has_bias else x
    back = held * np.eye(x.shape[1])[: inputs.shape[1]]
    return np.concatenate([x * w[:, None], back]), np.concatenate([e * w[:, None], np.zeros((len(back), e.shape[1]))])


@given(st.integers(0, 1000), st.sampled_from([0.001, 0.1, 1.0]), st.booleans(), st.booleans())
@settings(max_examples=25, deadline=None)
def test_it_is_the_least_squares_solution(seed, ridge, has_bias, weighted):
    inputs, lack, weights = problem(seed)
    weights = weights if weighted else None
    fit = fitted(inputs, lack, weights, ridge, has_bias=has_bias)
    expected = np.linalg.lstsq(*augmented(inputs, lack, weights, ridge, has_bias), rcond=None)[0]
    np.testing.assert_allclose(fit.weight.T.numpy(), expected[: inputs.shape[1]], atol=2e-5)
    if has_bias:
        np.testing.assert_allclose(fit.bias.numpy(), expected[-1], atol=5e-5)
    else:
        assert fit.bias is None
    left = lack - inputs @ fit.weight.T - (fit.bias if has_bias else 0)
    w = torch.ones(len(inputs)) if weights is None else weights
    wanted = ((lack + 1) * w[:, None]).double().square().sum()
    assert fit.before == pytest.approx(float((lack * w[:, None]).double().square().sum() / wanted), rel=1e-5)
    assert fit.after == pytest.approx(float((left * w[:, None]).double().square().sum() / wanted), rel=1e-4)


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("rank", [1, 2, 4])
def test_no_change_of_that_rank_is_better(rank, has_bias):
    inputs, lack, weights = problem(3)
    x, e = augmented(inputs, lack, weights, 0.1, has_bias)

    def objective(weight, bias):
        change = np.concatenate([weight.T, bias[None]]) if has_bias else weight.T
        return float(np.square(e - x @ change).sum())

    fit = fitted(inputs, lack, weights, 0.1, has_bias=has_bias, rank=rank)
    weight = fit.weight.double().numpy()
    assert np.linalg.matrix_rank(weight, tol=1e-4 * np.linalg.norm(weight)) == rank
    bias = fit.bias.double().numpy() if has_bias else np.zeros(0)
    found = objective(weight, bias)
    # A search from there, over the two factors and the bias, by alternating least squares: it goes nowhere.
    u, s, v = np.linalg.svd(weight, full_matrices=False)
    down = v[:rank]
    for _ in range(60):
        read = np.concatenate([x[:, : inputs.shape[1]] @ down.T, x[:, inputs.shape[1] :]], 1)
        up = np.linalg.lstsq(read, e, rcond=None)[0]
        left = e - x[:, inputs.shape[1] :] @ up[rank:]
        up = up[:rank]
        full = np.linalg.lstsq(x[:, : inputs.shape[1]], left @ np.linalg.pinv(up), rcond=None)[0]
        down = full.T
    best = float(np.square(left - x[:, : inputs.shape[1]] @ down.T @ up).sum())
    assert found <= best * (1 + 1e-4)
    # And there is a worse one: the best of all weights cut to the rank by its own singular values.
    plain = fitted(inputs, lack, weights, 0.1, has_bias=has_bias)
    u, s, v = np.linalg.svd(plain.weight.double().numpy(), full_matrices=False)
    cut = (u[:, :rank] * s[:rank]) @ v[:rank]
    assert found <= objective(cut, plain.bias.double().numpy() if has_bias else np.zeros(0)) + 1e-6


def test_the_full_rank_is_the_full_solution():
    inputs, lack, weights = problem(5)
    plain, ranked = fitted(inputs, lack, weights, 0.1), fitted(inputs, lack, weights, 0.1, rank=7)
    assert plain.weight.equal(ranked.weight)


@pytest.mark.parametrize(
    ("inputs", "words"),
    [
        (torch.ones(10, 4), "4 inputs and 10 rows .* raise fusion.ridge, or give more texts"),
        (torch.full((10, 4), torch.inf), "not finite; set dtype: float32"),
    ],
    ids=["one input four times", "infinite"],
)
def test_equations_without_a_solution_are_one_line(inputs, words):
    found = Regression(4, 2, has_bias=False)
    found.add(inputs, torch.ones(10, 2), torch.ones(10, 2))
    with pytest.raises(FusionError, match=words) as caught:
        found.solve(1e-30)
    assert "\n" not in str(caught.value) and caught.value.exit_code == 2


def test_where_nothing_is_read_no_weight_changes_and_a_bias_is_what_lacks():
    for has_bias in (False, True):
        found = Regression(4, 2, has_bias=has_bias)
        found.add(torch.zeros(10, 4), torch.full((10, 2), 3.0), torch.ones(10, 2))
        fit = found.solve(0.1)
        assert not fit.weight.any()
        assert fit.bias is None if not has_bias else torch.allclose(fit.bias, torch.tensor([3.0, 3.0]))
