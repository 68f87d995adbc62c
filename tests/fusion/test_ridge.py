"""The closed-form fit against an independent least squares in float64, and the reduced rank against a search."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.meeting import Together
from tmerge.errors import FusionError
from tmerge.fusion.ridge import Linear, Regression
from tmerge.processes import ALONE


def problem(seed, rows=200, inputs=12, outputs=7):
    draw = torch.Generator().manual_seed(seed)
    inputs_ = torch.randn(rows, inputs, generator=draw) * torch.linspace(0.5, 2, inputs) + 0.3
    lack = inputs_ @ torch.randn(inputs, outputs, generator=draw) + torch.randn(rows, outputs, generator=draw) + 0.7
    return inputs_, lack, 0.1 + torch.rand(rows, generator=draw)


def fitted(inputs, lack, weights, ridge, *, has_bias=False, rank=None, pieces=3):
    """The fit of a sublayer that lacks `lack`, and what it should give."""
    draw = torch.Generator().manual_seed(9)
    weight = torch.randn(lack.shape[1], inputs.shape[1], generator=draw)
    bias = torch.randn(lack.shape[1], generator=draw) if has_bias else None
    wanted = lack + inputs @ weight.T + (bias if has_bias else 0)
    found = Regression(inputs.shape[1], [lack.shape[1]], has_bias=has_bias)
    for part in torch.arange(len(inputs)).chunk(pieces):
        found.add(inputs[part], [wanted[part]], None if weights is None else weights[part])
    return found.solve([Linear(weight, bias)], [ridge], rank)[0], wanted


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
    fit, goals = fitted(inputs, lack, weights, ridge, has_bias=has_bias)
    expected = np.linalg.lstsq(*augmented(inputs, lack, weights, ridge, has_bias), rcond=None)[0]
    np.testing.assert_allclose(fit.weight.T.numpy(), expected[: inputs.shape[1]], atol=2e-5)
    if has_bias:
        np.testing.assert_allclose(fit.bias.numpy(), expected[-1], atol=5e-5)
    else:
        assert fit.bias is None
    left = lack - inputs @ fit.weight.T - (fit.bias if has_bias else 0)
    w = torch.ones(len(inputs)) if weights is None else weights
    wanted = (goals * w[:, None]).double().square().sum()
    assert fit.before == pytest.approx(float((lack * w[:, None]).double().square().sum() / wanted), rel=1e-5)
    assert fit.after == pytest.approx(float((left * w[:, None]).double().square().sum() / wanted), rel=1e-4)


@pytest.mark.parametrize("outputs", [7, 17], ids=["fewer outputs", "more outputs"])
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("rank", [1, 2, 4])
def test_no_change_of_that_rank_is_better(rank, has_bias, outputs):
    inputs, lack, weights = problem(3, outputs=outputs)
    x, e = augmented(inputs, lack, weights, 0.1, has_bias)

    def objective(weight, bias):
        change = np.concatenate([weight.T, bias[None]]) if has_bias else weight.T
        return float(np.square(e - x @ change).sum())

    fit, _ = fitted(inputs, lack, weights, 0.1, has_bias=has_bias, rank=rank)
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
    plain, _ = fitted(inputs, lack, weights, 0.1, has_bias=has_bias)
    u, s, v = np.linalg.svd(plain.weight.double().numpy(), full_matrices=False)
    cut = (u[:, :rank] * s[:rank]) @ v[:rank]
    assert found <= objective(cut, plain.bias.double().numpy() if has_bias else np.zeros(0)) + 1e-6


def test_the_full_rank_is_the_full_solution():
    inputs, lack, weights = problem(5)
    (plain, _), (ranked, _) = fitted(inputs, lack, weights, 0.1), fitted(inputs, lack, weights, 0.1, rank=7)
    assert plain.weight.equal(ranked.weight)


@pytest.mark.parametrize(
    ("inputs", "words"),
    [
        (torch.ones(10, 4), "4 inputs and 10 rows .* raise fusion.ridge .* or give more texts"),
        (torch.full((10, 4), torch.inf), "not finite; set dtype: float32"),
    ],
    ids=["one input four times", "infinite"],
)
def test_equations_without_a_solution_are_one_line(inputs, words):
    found = Regression(4, [2], has_bias=False)
    found.add(inputs, [torch.ones(10, 2)])
    with pytest.raises(FusionError, match=words) as caught:
        found.solve([Linear(torch.zeros(2, 4))], [1e-30])
    assert "\n" not in str(caught.value) and caught.value.exit_code == 2


def test_where_nothing_is_read_no_weight_changes_and_a_bias_is_what_lacks():
    for has_bias in (False, True):
        found = Regression(4, [2], has_bias=has_bias)
        found.add(torch.zeros(10, 4), [torch.full((10, 2), 4.0)])
        (fit,) = found.solve([Linear(torch.ones(2, 4), torch.ones(2) if has_bias else None)], [0.1])
        assert not fit.weight.any()
        assert fit.bias is None if not has_bias else torch.allclose(fit.bias, torch.tensor([3.0, 3.0]))


@pytest.mark.parametrize("biases", [(True, True), (False, False), (True, False)], ids=str)
def test_sublayers_that_read_the_same_are_fitted_as_each_would_be_alone(biases):
    inputs, _, weights = problem(4)
    draw = torch.Generator().manual_seed(1)
    layers = [
        Linear(torch.randn(count, 12, generator=draw), torch.randn(count, generator=draw) if biased else None)
        for count, biased in zip((5, 20), biases, strict=True)
    ]
    goals = [torch.randn(len(inputs), len(layer.weight), generator=draw) for layer in layers]
    together = Regression(12, [5, 20], has_bias=any(biases))
    together.add(inputs, goals, weights)
    for layer, goal, fit in zip(layers, goals, together.solve(layers, [0.1]), strict=True):
        alone = Regression(12, [len(goal.T)], has_bias=layer.bias is not None)
        alone.add(inputs, [goal], weights)
        (expected,) = alone.solve([layer], [0.1])
        torch.testing.assert_close(fit.weight, expected.weight, atol=1e-6, rtol=1e-5)
        assert (fit.bias is None) == (expected.bias is None)
        assert fit.before == pytest.approx(expected.before) and fit.after == pytest.approx(expected.after)


@pytest.mark.parametrize("has_bias", [False, True])
def test_each_sublayer_takes_the_lambda_that_does_best_on_rows_kept_from_it(has_bias):
    """One's goal is all noise, so that it is held back most; the other's is exact, and is held back least."""
    draw = torch.Generator().manual_seed(4)
    inputs, others = torch.randn(40, 12, generator=draw), torch.randn(500, 12, generator=draw)
    exact = torch.randn(12, 3, generator=draw)
    layers = [Linear(torch.zeros(3, 12), torch.zeros(3) if has_bias else None) for _ in range(2)]
    sums, kept_away = (Regression(12, [3, 3], has_bias=has_bias) for _ in range(2))
    for found, rows in ((sums, inputs), (kept_away, others)):
        found.add(rows, [torch.randn(len(rows), 3, generator=draw), rows @ exact])
    ridges = [0.01, 0.1, 1.0, 10.0]
    noise, learned = sums.solve(layers, ridges, kept_away=kept_away)
    assert (noise.ridge, learned.ridge) == (10.0, 0.01)
    # It is the very fit of that lambda.
    for place, fit in enumerate((noise, learned)):
        again = Regression(12, [3, 3], has_bias=has_bias)
        draw.manual_seed(4)
        torch.randn(40, 12, generator=draw), torch.randn(500, 12, generator=draw), torch.randn(12, 3, generator=draw)
        again.add(inputs, [torch.randn(40, 3, generator=draw), inputs @ exact])
        assert again.solve(layers, [fit.ridge])[place].weight.equal(fit.weight)


def test_without_rows_kept_away_the_largest_lambda_is_taken():
    inputs, lack, _ = problem(1)
    sums, none = (Regression(12, [7], has_bias=False) for _ in range(2))
    sums.add(inputs, [lack])
    (fit,) = sums.solve([Linear(torch.zeros(7, 12))], [0.1, 0.5], kept_away=none)
    assert fit.ridge == 0.5


def test_a_lambda_that_cannot_be_solved_with_is_passed_over():
    sums, kept_away = (Regression(4, [2], has_bias=False) for _ in range(2))
    row = torch.tensor([[1.0, 2.0, 3.0, 4.0]])
    for found in (sums, kept_away):
        found.add(row, [torch.ones(1, 2)])
    (fit,) = sums.solve([Linear(torch.zeros(2, 4))], [1e-30, 0.1], kept_away=kept_away)
    assert fit.ridge == 0.1


def test_rows_that_choose_and_are_not_finite_are_said():
    sums, kept_away = (Regression(4, [2], has_bias=False) for _ in range(2))
    sums.add(torch.randn(9, 4), [torch.ones(9, 2)])
    kept_away.add(torch.full((1, 4), float("inf")), [torch.ones(1, 2)])
    with pytest.raises(FusionError, match="not finite"):
        sums.solve([Linear(torch.zeros(2, 4))], [0.1, 1.0], kept_away=kept_away)


@pytest.mark.parametrize("count", [2, 3, 5])
def test_processes_share_rows_and_lambdas_and_all_have_the_fits(count):
    draw = torch.Generator().manual_seed(3)
    inputs = torch.randn(60, 12, generator=draw)
    goals = [torch.randn(60, 7, generator=draw), inputs @ torch.randn(12, 5, generator=draw)]
    layers = [Linear(torch.zeros(7, 12)), Linear(torch.randn(5, 12, generator=draw), torch.ones(5))]

    def solved(processes):
        both = []
        for start, end in ((0, 40), (40, 60)):
            sums = Regression(12, [7, 5], has_bias=True)
            mine = processes.mine(range(start, end))
            sums.add(inputs[mine], [goal[mine] for goal in goals])
            sums.add_others(processes)
            assert sums.rows == end - start
            both.append(sums)
        return both[0].solve(layers, [1e-6, 1e-3, 10.0], kept_away=both[1], processes=processes)

    alone, together = solved(ALONE), Together(count).run(solved)
    assert [fit.ridge for fit in alone] == [10.0, 1e-6]
    for fits in together:
        for fit, first, expected in zip(fits, together[0], alone, strict=True):
            assert fit.ridge == expected.ridge and fit.weight.equal(first.weight)
            torch.testing.assert_close(fit.weight, expected.weight, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close((fit.before, fit.after), (expected.before, expected.after), rtol=1e-4, atol=1e-5)
