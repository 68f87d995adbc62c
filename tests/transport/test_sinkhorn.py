"""The solver against POT, and what holds of every entropic transport problem."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.transport.reference import assert_same_plan, feature_pair, pot_plan, reference_cost, reference_plan
from tmerge.errors import TransportError
from tmerge.transport import correlation_cost, plan_from_potentials, sinkhorn, standardise, working_dtype

_EPSILONS = (0.5, 0.1, 0.05, 0.03, 0.01, 0.005)
# What float32 can be asked for; in float64 the last digit that matters is ten below.
_TOLERANCE = {torch.float32: 3e-7, torch.float64: 1e-12}

epsilons = pytest.mark.parametrize("epsilon", _EPSILONS)


def _solved_plan(target, source, epsilon):
    dtype = working_dtype(epsilon)
    cost = correlation_cost(standardise(target, dtype), standardise(source, dtype))
    result = sinkhorn(cost, epsilon, max_iterations=100_000, tolerance=_TOLERANCE[dtype])
    assert result.converged
    return plan_from_potentials(cost, result.f, result.g, epsilon)


# Seeds are those whose problem at eps 0.005 converges within some 5,000 sweeps, POT being the slow one.
_PROBLEMS = {
    "square": ("independent", 20, 20, 1),
    "wide": ("factors", 16, 24, 0),
    "tall": ("factors", 24, 16, 2),
    "copies": ("copies", 24, 16, 2),
    "one row": ("factors", 1, 24, 0),
    "one column": ("factors", 24, 1, 0),
    "one entry": ("factors", 1, 1, 0),
}


@epsilons
@pytest.mark.parametrize("problem", _PROBLEMS)
def test_agrees_with_pot(problem, epsilon):
    kind, n, m, seed = _PROBLEMS[problem]
    target, source = feature_pair(kind, n, m, seed=seed)
    assert_same_plan(_solved_plan(target, source, epsilon), reference_plan(target, source, epsilon))


@epsilons
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_agrees_with_pot_on_rounded_features(dtype, epsilon):
    target, source = (features.to(dtype) for features in feature_pair("factors", 16, 24, seed=0))
    assert_same_plan(_solved_plan(target, source, epsilon), reference_plan(target, source, epsilon))


@epsilons
def test_agrees_with_pot_on_constant_features(epsilon):
    target, source = feature_pair("factors", 16, 24, seed=0)
    target[:, 3], target[:, 11] = 0.0, 7.5
    source[:, 5] = -2.0
    assert_same_plan(_solved_plan(target, source, epsilon), reference_plan(target, source, epsilon))


@epsilons
def test_agrees_with_pot_on_duplicated_features(epsilon):
    target, source = feature_pair("factors", 8, 12, seed=1)
    # Twins on each side, scaled, shifted, and one of them flipped.
    target = torch.cat([target, 3 * target + 1], 1)
    source = torch.cat([source, -0.5 * source], 1)
    plan = _solved_plan(target, source, epsilon)
    assert_same_plan(plan, reference_plan(target, source, epsilon))
    # 1e-5: what working_dtype promises of a plan; twins differ by the rounding of their correlations.
    torch.testing.assert_close(plan[:8], plan[8:], rtol=1e-5, atol=0)


@pytest.mark.parametrize("epsilon", [0.1, 0.05])
def test_default_stopping_is_as_good_as_the_tolerance(epsilon):
    """With the settings a merge uses, and not only with those of these tests."""
    target, source = feature_pair("factors", 48, 64, texts=400, seed=3)
    cost = correlation_cost(standardise(target), standardise(source))
    result = sinkhorn(cost, epsilon)
    assert result.converged and result.marginal_error < 1e-6
    # A marginal error of 1e-6 leaves the potentials about as far from converged, times 1 / (1 - contraction).
    plan = plan_from_potentials(cost, result.f, result.g, epsilon)
    assert_same_plan(plan, reference_plan(target, source, epsilon), 3e-5)


def _large_problem(n, m):
    target, source = feature_pair("factors", n, m, texts=925, seed=0)
    return target, source, correlation_cost(standardise(target), standardise(source))


@pytest.mark.parametrize("shape", [(4096, 512), pytest.param((4096, 4096), marks=pytest.mark.slow)], ids=str)
def test_agrees_with_pot_at_full_width(shape):
    target, source, cost = _large_problem(*shape)
    result = sinkhorn(cost, 0.1, tolerance=3e-7)
    assert result.converged
    wanted = pot_plan(reference_cost(target, source), 0.1, method="sinkhorn")
    assert_same_plan(plan_from_potentials(cost, result.f, result.g, 0.1), wanted)


@pytest.mark.parametrize("shape", [(4096, 512), (512, 6144), (4100, 300)], ids=str)
def test_float32_meets_the_tolerance_at_full_width(shape):
    """One running float32 sum over 4096 rows is good to 3e-6 only, and would never be seen to converge."""
    _, _, cost = _large_problem(*shape)
    result = sinkhorn(cost, 0.05)
    assert result.converged
    exact = sinkhorn(cost.double(), 0.05)
    assert result.iterations <= exact.iterations + 2
    plan = plan_from_potentials(cost.double(), result.f.double(), result.g.double(), 0.05)
    # Both marginals in exact sums: eps 0.05 makes 1.2e-6 of a potential's last bit.
    for side, size in ((1, shape[0]), (0, shape[1])):
        expected = torch.full((size,), 1 / size, dtype=torch.float64)
        torch.testing.assert_close(plan.sum(side), expected, rtol=5e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("epsilon", [1e-3, 1e-2])
@pytest.mark.parametrize("scale", [1.0, 1e3])
@pytest.mark.parametrize("kind", ["uniform", "heavy", "binary", "ladder", "line", "single"])
def test_small_eps_and_huge_costs_never_underflow(kind, scale, epsilon, dtype):
    """Costs a million times eps: exp(-C/eps) is zero in any dtype, in whole rows and columns."""
    generator = torch.Generator().manual_seed(0)
    n, m = 17, 11
    cost = torch.rand(n, m, generator=generator, dtype=torch.float64)
    if kind == "heavy":
        cost = (4 * torch.randn(n, m, generator=generator, dtype=torch.float64)).exp()
    elif kind == "binary":
        cost = (cost > 0.5).double()
    elif kind == "ladder":
        cost = cost + 10 * torch.arange(n).unsqueeze(1)
    elif kind == "line":
        cost = (torch.arange(n).unsqueeze(1) / n - torch.arange(m) / m).double().square()
    elif kind == "single":
        cost = torch.zeros(n, m).double()
        cost[3, 4] = 1.0
    cost = (cost / cost.max() * scale).to(dtype)
    a, b = (torch.randn(size, generator=generator, dtype=torch.float64).mul(2).softmax(0) for size in (n, m))
    result = sinkhorn(cost, epsilon, a=a, b=b)
    plan = plan_from_potentials(cost, result.f, result.g, epsilon)
    for values in (result.f, result.g, result.marginal_error, result.transport_cost, plan):
        assert values.isfinite().all()
    # The last step was the rows': they hold to the rounding of (f + g - C) / eps and of the kernel, which is float32,
    # whether it converged or not.
    rounding = 10 * torch.finfo(dtype).eps * (scale / epsilon + 10) + 4e-7
    torch.testing.assert_close(plan.sum(1), a.to(dtype), rtol=rounding, atol=0)
    assert bool(result.converged) == (float(result.marginal_error) < 1e-6)


def test_float64_agrees_with_pot_where_the_plain_kernel_underflows():
    generator = torch.Generator().manual_seed(4)
    cost = 2 * torch.rand(9, 13, generator=generator, dtype=torch.float64)
    cost[2] += 5.0  # at eps 0.005 this row of exp(-C/eps) is exp(-1000) everywhere
    assert not torch.exp(-cost / 0.005)[2].any()
    a, b = (torch.rand(size, generator=generator, dtype=torch.float64) + 0.2 for size in cost.shape)
    a, b = a / a.sum(), b / b.sum()
    result = sinkhorn(cost, 0.005, a=a, b=b, max_iterations=100_000, tolerance=1e-12)
    wanted = pot_plan(cost.numpy(), 0.005, a=a.numpy(), b=b.numpy())
    assert_same_plan(plan_from_potentials(cost, result.f, result.g, 0.005), wanted)


def test_small_eps_comes_to_the_assignment():
    """As eps falls, the plan of equal marginals comes to the cheapest permutation (SciPy's Hungarian method)."""
    from scipy.optimize import linear_sum_assignment

    cost = torch.rand(12, 12, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    rows, columns = linear_sum_assignment(cost.numpy())
    result = sinkhorn(cost, 5e-4, max_iterations=20_000)
    plan = plan_from_potentials(cost, result.f, result.g, 5e-4)
    assert plan.argmax(1).tolist() == columns.tolist()
    assert float(result.transport_cost) == pytest.approx(cost.numpy()[rows, columns].mean(), abs=1e-3)


# -- properties: small random problems of float64, solved to the last digits --------------------------------------

_problems = st.builds(
    lambda n, m, seed: torch.rand(n, m, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 2,
    st.integers(1, 9),
    st.integers(1, 9),
    st.integers(0, 2**31),
)
# No deadline: these machines are shared. No chance: what fails here fails everywhere.
_property = settings(max_examples=50, deadline=None, derandomize=True)
_eps = st.floats(0.15, 2.0)
_seeds = st.integers(0, 2**31)


def _solve(cost, epsilon, **options):
    result = sinkhorn(cost, epsilon, max_iterations=50_000, tolerance=1e-12, **options)
    assert result.converged.all()
    return result, plan_from_potentials(cost, result.f, result.g, epsilon)


def _marginals(cost, seed):
    generator = torch.Generator().manual_seed(seed)
    sides = [torch.rand(size, generator=generator, dtype=torch.float64) + 0.05 for size in cost.shape]
    return [side / side.sum() for side in sides]


@_property
@given(_problems, _eps, _seeds)
def test_marginals_hold(cost, epsilon, seed):
    a, b = _marginals(cost, seed)
    _, plan = _solve(cost, epsilon, a=a, b=b)
    torch.testing.assert_close(plan.sum(1), a, rtol=1e-11, atol=0)
    torch.testing.assert_close(plan.sum(0), b, rtol=1e-11, atol=0)
    assert (plan > 0).all()
    _, uniform = _solve(cost, epsilon)
    for side, size in ((1, cost.shape[0]), (0, cost.shape[1])):
        torch.testing.assert_close(
            uniform.sum(side), torch.full((size,), 1 / size, dtype=torch.float64), rtol=1e-11, atol=0
        )


@_property
@given(_problems, _eps, _seeds)
def test_permuting_neurons_permutes_the_plan(cost, epsilon, seed):
    generator = torch.Generator().manual_seed(seed)
    rows, columns = (torch.randperm(size, generator=generator) for size in cost.shape)
    result, plan = _solve(cost, epsilon)
    moved, moved_plan = _solve(cost[rows][:, columns].contiguous(), epsilon)
    torch.testing.assert_close(moved_plan, plan[rows][:, columns], rtol=1e-9, atol=0)
    torch.testing.assert_close(moved.transport_cost, result.transport_cost, rtol=1e-9, atol=0)


@_property
@given(_problems, _eps, st.floats(-50, 50))
def test_a_constant_added_to_the_cost_moves_nothing(cost, epsilon, shift):
    result, plan = _solve(cost, epsilon)
    shifted, shifted_plan = _solve(cost + shift, epsilon)
    torch.testing.assert_close(shifted_plan, plan, rtol=1e-9, atol=0)
    total = (shifted.f.unsqueeze(1) + shifted.g) - (result.f.unsqueeze(1) + result.g)
    torch.testing.assert_close(total, torch.full_like(total, shift), rtol=0, atol=1e-9)
    torch.testing.assert_close(shifted.transport_cost, result.transport_cost + shift, rtol=0, atol=1e-9)


@_property
@given(_problems, _eps, _seeds)
def test_row_and_column_shifts_of_the_cost_go_into_the_potentials(cost, epsilon, seed):
    generator = torch.Generator().manual_seed(seed)
    rows, columns = (3 * torch.randn(size, generator=generator, dtype=torch.float64) for size in cost.shape)
    result, plan = _solve(cost, epsilon)
    shifted, shifted_plan = _solve(cost + rows.unsqueeze(1) + columns, epsilon)
    torch.testing.assert_close(shifted_plan, plan, rtol=1e-9, atol=0)
    # Potentials are unique up to a constant moved from f to g, so it is f + g that is compared.
    got = (shifted.f - rows).unsqueeze(1) + (shifted.g - columns)
    torch.testing.assert_close(got, result.f.unsqueeze(1) + result.g, rtol=0, atol=1e-9)


@_property
@given(_problems, _eps, _seeds)
def test_transposing_the_problem_transposes_the_plan(cost, epsilon, seed):
    a, b = _marginals(cost, seed)
    result, plan = _solve(cost, epsilon, a=a, b=b)
    other, other_plan = _solve(cost.T.contiguous(), epsilon, a=b, b=a)
    torch.testing.assert_close(other_plan.T, plan, rtol=1e-9, atol=0)
    torch.testing.assert_close(other.transport_cost, result.transport_cost, rtol=1e-9, atol=0)


@_property
@given(_problems, _eps)
def test_the_transport_cost_is_the_cost_under_the_plan(cost, epsilon):
    result, plan = _solve(cost, epsilon)
    torch.testing.assert_close(result.transport_cost, (cost * plan).sum(), rtol=1e-10, atol=0)


@_property
@given(st.integers(1, 5), _problems, _eps, _seeds)
def test_a_batch_is_its_problems_one_by_one(size, cost, epsilon, seed):
    generator = torch.Generator().manual_seed(seed)
    batch = cost + torch.rand(size, *cost.shape, generator=generator, dtype=torch.float64)
    together, plans = _solve(batch, epsilon)
    for index, single in enumerate(batch):
        alone, plan = _solve(single, epsilon)
        torch.testing.assert_close(plans[index], plan, rtol=1e-9, atol=0)
        torch.testing.assert_close(together.transport_cost[index], alone.transport_cost, rtol=1e-9, atol=0)
        # A problem's own sweeps are counted, not those that it waited for the others.
        assert together.iterations[index] == pytest.approx(int(alone.iterations), abs=1)


@_property
@given(st.integers(1, 3), st.integers(1, 3), _eps, _seeds)
def test_a_batch_may_have_any_number_of_dimensions(first, second, epsilon, seed):
    cost = torch.rand(first, second, 4, 6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    result, plan = _solve(cost, epsilon)
    _, flat = _solve(cost.flatten(0, 1), epsilon)
    assert result.converged.shape == result.transport_cost.shape == (first, second)
    torch.testing.assert_close(plan.flatten(0, 1), flat, rtol=1e-9, atol=0)


def test_wide_float32_batches_are_their_problems_one_by_one():
    """Wide enough for the sums in blocks, with rows left over."""
    cost = torch.rand(3, 200, 150, generator=torch.Generator().manual_seed(0))
    together = sinkhorn(cost, 0.1)
    for index, single in enumerate(cost):
        alone = sinkhorn(single, 0.1)
        plan = plan_from_potentials(single, alone.f, alone.g, 0.1)
        # Two summation orders of float32, through an exponential of (f + g - C) / 0.1.
        found = plan_from_potentials(single, together.f[index], together.g[index], 0.1)
        torch.testing.assert_close(found, plan, rtol=1e-5, atol=0)


def test_a_hard_problem_does_not_spoil_its_batch():
    generator = torch.Generator().manual_seed(0)
    easy = torch.rand(6, 6, generator=generator, dtype=torch.float64)
    hard = 1e3 * torch.rand(6, 6, generator=generator, dtype=torch.float64)
    together = sinkhorn(torch.stack([easy, hard]), 0.05, max_iterations=100)
    alone = sinkhorn(easy, 0.05, max_iterations=100)
    assert together.converged.tolist() == [True, False]
    assert together.iterations[1] == 100 > together.iterations[0]
    plan = plan_from_potentials(easy, together.f[0], together.g[0], 0.05)
    torch.testing.assert_close(plan, plan_from_potentials(easy, alone.f, alone.g, 0.05), rtol=1e-5, atol=0)


# -- results and errors --------------------------------------------------------------------------------------------


def test_a_problem_that_did_not_converge_says_so_and_what_to_do():
    cost = torch.rand(10, 10, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    result = sinkhorn(cost, 0.005, max_iterations=3)
    assert not result.converged and result.iterations == 3
    assert result.marginal_error > 1e-6
    assert f"{float(result.marginal_error):.1e}" in result.remedy
    assert "transport.max_iterations" in result.remedy and "transport.epsilon" in result.remedy
    assert sinkhorn(cost, 0.5).remedy == ""


def test_the_marginal_error_is_relative_to_the_marginal():
    cost = torch.rand(5, 50, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    result = sinkhorn(cost, 0.05, max_iterations=2, tolerance=1e-12)
    plan = plan_from_potentials(cost, result.f, result.g, 0.05)
    expected = ((plan.sum(0) - 1 / 50).abs() * 50).max()
    torch.testing.assert_close(result.marginal_error, expected, rtol=1e-9, atol=0)


def test_potentials_of_a_block_give_the_block():
    cost = torch.rand(6, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    result, plan = _solve(cost, 0.1)
    rows, columns = torch.tensor([4, 1]), torch.tensor([0, 7, 3])
    block = plan_from_potentials(cost[rows][:, columns], result.f[rows], result.g[columns], 0.1)
    torch.testing.assert_close(block, plan[rows][:, columns], rtol=0, atol=0)


def test_the_cost_is_left_as_it_was():
    cost = torch.rand(6, 8, generator=torch.Generator().manual_seed(0))
    before = cost.clone()
    sinkhorn(cost, 0.1)
    assert cost.equal(before)


_GOOD = torch.rand(3, 4, dtype=torch.float64)


@pytest.mark.parametrize(
    ("cost", "epsilon", "options", "said"),
    [
        (_GOOD, 0.0, {}, "epsilon is 0.0"),
        (_GOOD, -0.1, {}, "epsilon is -0.1"),
        (_GOOD, float("nan"), {}, "epsilon is nan"),
        (_GOOD, float("inf"), {}, "epsilon is inf"),
        (_GOOD[0], 0.1, {}, "shape (4,)"),
        (_GOOD[:0], 0.1, {}, "shape (0, 4)"),
        (_GOOD.half(), 0.1, {}, "torch.float16"),
        (_GOOD.bfloat16(), 0.1, {}, "torch.bfloat16"),
        ((_GOOD * 10).long(), 0.1, {}, "torch.int64"),
        (_GOOD.clone().fill_diagonal_(float("nan")), 0.1, {}, "not finite"),
        (_GOOD.clone().fill_diagonal_(float("inf")), 0.1, {}, "not finite"),
        (_GOOD, 0.1, {"a": torch.ones(3)}, "marginal a"),
        (_GOOD, 0.1, {"a": torch.full((4,), 0.25)}, "marginal a"),
        (_GOOD, 0.1, {"b": torch.tensor([0.5, 0.5, 0.0, 0.0])}, "marginal b"),
        (_GOOD, 0.1, {"b": torch.tensor([0.5, 0.6, 0.1, -0.2])}, "marginal b"),
        (_GOOD, 0.1, {"b": torch.tensor([0.5, 0.5, float("nan"), 0.1])}, "marginal b"),
    ],
)
def test_bad_input_is_refused_in_one_line(cost, epsilon, options, said):
    with pytest.raises(TransportError) as refused:
        sinkhorn(cost, epsilon, **options)
    assert said in str(refused.value) and "\n" not in str(refused.value)


def test_costs_of_any_finite_size_are_taken():
    """The sum of this cost is infinite in float32, its entries are not."""
    cost = torch.full((4, 4), 2e38)
    cost[0, 0] = 1e38
    result = sinkhorn(cost, 1e38)
    assert result.converged
    plan = plan_from_potentials(cost, result.f, result.g, 1e38)
    assert_same_plan(plan, pot_plan((cost.double() / 1e38).numpy(), 1.0))


def test_memory_that_is_lent_is_worked_in_and_changes_nothing():
    target, source = (standardise(features) for features in feature_pair("factors", 70, 90))
    cost, lent = torch.empty(70, 90), torch.full((70, 90), -1.0)
    assert correlation_cost(target, source, out=cost) is cost
    assert cost.equal(correlation_cost(target, source))
    mine, theirs = sinkhorn(cost, 0.1), sinkhorn(cost, 0.1, kernel=lent)
    assert mine.f.equal(theirs.f) and mine.g.equal(theirs.g) and mine.transport_cost == theirs.transport_cost
    assert (lent >= 0).all()
