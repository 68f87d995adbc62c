"""Feature plans of layer pairs, layer plans over them, and how both are read."""

from __future__ import annotations

import numpy as np
import ot
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.transport.reference import assert_same_plan, feature_pair, pot_plan, reference_cost, reference_plan
from tmerge.errors import Cancelled, TransportError
from tmerge.transport import (
    LayerPlan,
    couple_layers,
    effective_weights,
    feature_plan,
    keep_layers,
    load_plans,
    mutual_top,
    plans,
    save_plans,
    solve_features,
    solve_layers,
    standardise,
    working_dtype,
)

_property = settings(max_examples=60, deadline=None, derandomize=True)

# Layer numbers with gaps: a mixture of experts has no dense MLP in some.
_TARGET_LAYERS, _SOURCE_LAYERS = (0, 2, 5), (1, 2, 3, 7)


@pytest.fixture(scope="module")
def features():
    """(target, source): layer -> features of widths 14 and 20."""
    pairs = {layer: feature_pair("factors", 14, 20, seed=layer) for layer in range(8)}
    return {layer: pair[0].float() for layer, pair in pairs.items()}, {
        layer: pair[1].float() for layer, pair in pairs.items()
    }


def _solve(features, epsilon=0.1, **options):
    target, source = features
    return solve_features(
        "q.post", target.__getitem__, source.__getitem__, _TARGET_LAYERS, _SOURCE_LAYERS, epsilon=epsilon, **options
    )


def _plan(features, solved, row, column):
    mine = standardise(features[0][_TARGET_LAYERS[row]], solved.f.dtype)
    theirs = standardise(features[1][_SOURCE_LAYERS[column]], solved.f.dtype)
    return feature_plan(mine, theirs, solved.f[row, column], solved.g[row, column], solved.epsilon)


# -- feature plans -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("epsilon", [0.1, 0.03])
def test_every_layer_pair_is_pots_plan_and_cost(features, epsilon):
    tolerance = 3e-7 if working_dtype(epsilon) == torch.float32 else 1e-12
    solved = _solve(features, epsilon, max_iterations=20_000, tolerance=tolerance)
    assert (solved.key, solved.epsilon) == ("q.post", epsilon)
    assert (solved.target_layers, solved.source_layers) == (_TARGET_LAYERS, _SOURCE_LAYERS)
    assert solved.converged.all() and (solved.marginal_error < tolerance).all() and (solved.iterations > 0).all()
    for row, layer in enumerate(_TARGET_LAYERS):
        for column, other in enumerate(_SOURCE_LAYERS):
            wanted = reference_plan(features[0][layer], features[1][other], epsilon)
            assert_same_plan(_plan(features, solved, row, column), wanted)
            cost = (reference_cost(features[0][layer], features[1][other]) * wanted).sum()
            assert float(solved.cost[row, column]) == pytest.approx(cost, rel=1e-6)


@pytest.mark.parametrize("at_once", [2, 3, 4, 9])
@pytest.mark.parametrize("epsilon", [0.1, 0.03])
def test_problems_solved_together_are_those_solved_alone(features, epsilon, at_once):
    alone, together = _solve(features, epsilon), _solve(features, epsilon, at_once=at_once)
    assert together.f.shape == alone.f.shape and together.converged.all()
    torch.testing.assert_close(together.cost, alone.cost, rtol=1e-5, atol=0)
    for row in range(len(_TARGET_LAYERS)):
        for column in range(len(_SOURCE_LAYERS)):
            mine, theirs = (_plan(features, solved, row, column) for solved in (together, alone))
            torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-7)


def test_where_there_is_no_room_for_so_many_at_once_half_of_them_are(features, monkeypatch):
    sizes, notes, solve = [], [], plans.sinkhorn

    def solved(cost, epsilon, **options):
        sizes.append(len(cost) if cost.dim() == 3 else 1)
        if sizes[-1] > 1:
            raise torch.OutOfMemoryError
        return solve(cost, epsilon, **options)

    wanted = _solve(features)
    monkeypatch.setattr(plans, "sinkhorn", solved)
    with monkeypatch.context() as threads:
        threads.setattr(torch, "get_num_threads", lambda: 1)
        found = _solve(features, at_once=4, note=notes.append)
    assert sizes == [4, 2] + [1] * len(_TARGET_LAYERS) * len(_SOURCE_LAYERS)
    assert found.f.equal(wanted.f) and found.cost.equal(wanted.cost)
    assert [note.partition("; ")[2] for note in notes] == ["2 at a time from here on", "1 at a time from here on"]


def test_one_problem_that_does_not_fit_is_the_end(features, monkeypatch):
    def full(*_, **__):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(plans, "sinkhorn", full)
    with pytest.raises(torch.OutOfMemoryError):
        _solve(features)


def test_shapes_and_dtypes(features):
    solved = _solve(features)
    assert solved.f.shape == (3, 4, 14) and solved.g.shape == (3, 4, 20)
    assert solved.f.dtype == solved.g.dtype == torch.float32
    assert solved.cost.shape == solved.iterations.shape == solved.marginal_error.shape == (3, 4)
    assert (solved.cost.dtype, solved.iterations.dtype, solved.converged.dtype) == (
        torch.float64,
        torch.int64,
        torch.bool,
    )
    assert _solve(features, 0.02).f.dtype == torch.float64


@pytest.mark.parametrize("epsilon", [0.1, 0.02])
def test_a_block_is_read_without_the_rest(features, epsilon):
    solved = _solve(features, epsilon)
    whole = _plan(features, solved, 1, 2)
    rows, columns = torch.tensor([9, 0, 4]), torch.tensor([19, 3])
    mine = standardise(features[0][2], solved.f.dtype)[:, rows]
    theirs = standardise(features[1][3], solved.f.dtype)[:, columns]
    block = feature_plan(mine, theirs, solved.f[1, 2, rows], solved.g[1, 2, columns], epsilon)
    # Other shapes may sum the correlation in another order: a rounding, divided by eps.
    tolerance = 20 * torch.finfo(solved.f.dtype).eps / epsilon
    torch.testing.assert_close(block, whole[rows][:, columns], rtol=tolerance, atol=0)
    for row in range(14):
        single = feature_plan(
            standardise(features[0][2], solved.f.dtype)[:, row : row + 1],
            standardise(features[1][3], solved.f.dtype),
            solved.f[1, 2, row : row + 1],
            solved.g[1, 2],
            epsilon,
        )
        torch.testing.assert_close(single[0], whole[row], rtol=tolerance, atol=0)


def test_rows_are_heard_of_in_order_and_hold_their_costs(features):
    heard = []
    solved = _solve(features, solved=lambda layer, costs: heard.append((layer, costs)))
    assert [layer for layer, _ in heard] == list(_TARGET_LAYERS)
    for (_, costs), row in zip(heard, solved.cost, strict=True):
        torch.testing.assert_close(costs.double(), row, rtol=0, atol=0)


def test_a_listener_can_stop_it(features):
    heard = []

    def stop(layer, costs):
        heard.append(layer)
        raise Cancelled("stopped")

    threads = torch.get_num_threads()
    with pytest.raises(Cancelled):
        _solve(features, solved=stop)
    assert heard == [_TARGET_LAYERS[0]]
    assert torch.get_num_threads() == threads


def test_the_number_of_threads_changes_nothing(features):
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = _solve(features)
    finally:
        torch.set_num_threads(before)
    together = _solve(features)
    assert alone.f.equal(together.f) and alone.g.equal(together.g) and alone.cost.equal(together.cost)


def test_unequal_numbers_of_texts_are_refused(features):
    target, source = features
    short = {layer: values[:-1] for layer, values in source.items()}
    with pytest.raises(TransportError, match="same texts"):
        _solve((target, short))


def test_saved_plans_come_back_as_they_were(features, tmp_path):
    import dataclasses

    plans = {"q.post": _solve(features), "down.pre": dataclasses.replace(_solve(features, 0.02), key="down.pre")}
    path = tmp_path / "plans.safetensors"
    layers = {key: solve_layers(solved.cost, 0.1, max_iterations=3) for key, solved in plans.items()}
    save_plans(plans, layers, path)
    assert [file.name for file in tmp_path.iterdir()] == ["plans.safetensors"]
    back, back_layers = load_plans(path, ["down.pre", "q.post"])
    assert list(back) == list(back_layers) == ["down.pre", "q.post"]
    for made, read in [
        *((plans[key], back[key]) for key in plans),
        *((layers[key], back_layers[key]) for key in plans),
    ]:
        for field in dataclasses.fields(made):
            mine, theirs = getattr(made, field.name), getattr(read, field.name)
            if isinstance(mine, torch.Tensor):
                assert mine.equal(theirs) and mine.dtype == theirs.dtype, field.name
            else:
                assert mine == theirs, field.name


@pytest.mark.parametrize(
    ("epsilon", "dtype"),
    [(0.5, torch.float32), (0.1, torch.float32), (0.05, torch.float32), (0.03, torch.float64), (0.005, torch.float64)],
)
def test_small_eps_is_worked_out_in_float64(epsilon, dtype):
    assert working_dtype(epsilon) == dtype


# -- layer plans ---------------------------------------------------------------------------------------------------


def _layer_cost(rows=5, columns=7, seed=0):
    """Costs as they come: within a tenth of each other."""
    return 0.8 + 0.1 * torch.rand(rows, columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _median_scaled(cost):
    """As NumPy sees it; of an even number of entries PyTorch's median is the lower of the two in the middle."""
    shifted = cost.numpy() - cost.numpy().min()
    median = np.sort(shifted, axis=None)[(shifted.size - 1) // 2]
    return shifted / median, median


@pytest.mark.parametrize("shape", [(5, 7), (6, 6), (7, 3), (1, 4), (4, 1)], ids=str)
@pytest.mark.parametrize("eta", [0.5, 0.1])
def test_a_median_scaled_balanced_plan_is_pots(shape, eta):
    cost = _layer_cost(*shape)
    scaled, median = _median_scaled(cost)
    plan = solve_layers(cost, eta, max_iterations=100_000, tolerance=1e-12)
    assert plan.converged and plan.marginal_error < 1e-12 and plan.iterations > 0
    assert plan.eta == eta
    assert plan.median == pytest.approx(median, rel=1e-12)
    assert_same_plan(plan.plan, pot_plan(scaled, eta), 1e-8)


@pytest.mark.parametrize("shape", [(5, 7), (7, 3)], ids=str)
def test_a_plain_balanced_plan_is_pots(shape):
    cost = _layer_cost(*shape)
    plan = solve_layers(cost, 0.1, scaling="plain", tolerance=1e-12)
    assert plan.median == 1.0
    assert_same_plan(plan.plan, pot_plan(cost.numpy(), 0.1), 1e-8)


@pytest.mark.parametrize("scaling", ["median-scaled", "plain"])
@pytest.mark.parametrize("shape", [(5, 7), (7, 3), (1, 4)], ids=str)
def test_a_semi_relaxed_plan_fixes_the_targets_marginal_alone(shape, scaling):
    cost = _layer_cost(*shape)
    scaled = _median_scaled(cost)[0] if scaling == "median-scaled" else cost.numpy()
    plan = solve_layers(cost, 0.1, scaling=scaling, marginals="semi-relaxed")
    weights = np.exp(-scaled / 0.1)
    assert_same_plan(plan.plan, weights / weights.sum(1, keepdims=True) / shape[0], 1e-10)
    # POT's unbalanced plan comes to it, as the source's marginal is asked for less and less; its entropy is
    # relative to the product of the marginals, which are uniform.
    unbalanced = ot.unbalanced.sinkhorn_unbalanced(
        np.full(shape[0], 1 / shape[0]),
        np.full(shape[1], 1 / shape[1]),
        scaled,
        reg=0.1,
        reg_m=(1e6, 1e-9),
        reg_type="kl",
        stopThr=1e-14,
        numItermax=10_000,
    )
    assert_same_plan(plan.plan, unbalanced, 1e-5)


def test_semi_relaxed_is_balanced_where_all_source_layers_are_alike():
    cost = _layer_cost(4, 1).expand(4, 3)
    torch.testing.assert_close(
        solve_layers(cost, 0.1, marginals="semi-relaxed").plan, solve_layers(cost, 0.1).plan, rtol=1e-8, atol=0
    )


@pytest.mark.parametrize("marginals", ["balanced", "semi-relaxed"])
def test_median_scaling_sees_neither_units_nor_shifts(marginals):
    cost = _layer_cost()
    plan = solve_layers(cost, 0.1, marginals=marginals).plan
    torch.testing.assert_close(solve_layers(40 * cost + 3, 0.1, marginals=marginals).plan, plan, rtol=1e-6, atol=0)
    flat = solve_layers(cost, 0.1, scaling="plain", marginals=marginals).plan
    assert flat.max() / flat.min() < plan.max() / plan.min()


def test_marginals_of_layer_plans():
    plan = solve_layers(_layer_cost(5, 7), 0.1).plan
    assert plan.dtype == torch.float64
    torch.testing.assert_close(plan.sum(1), torch.full((5,), 0.2, dtype=torch.float64), rtol=1e-8, atol=0)
    torch.testing.assert_close(plan.sum(0), torch.full((7,), 1 / 7, dtype=torch.float64), rtol=1e-8, atol=0)
    loose = solve_layers(_layer_cost(5, 7), 0.1, marginals="semi-relaxed").plan
    torch.testing.assert_close(loose.sum(1), torch.full((5,), 0.2, dtype=torch.float64), rtol=1e-8, atol=0)
    assert (loose.sum(0) - 1 / 7).abs().max() > 1e-3


def test_eta_is_raised_where_the_cost_passes_a_thousand():
    cost = 20_000 * (_layer_cost() - 0.8)  # 0 .. 2000
    largest = float(cost.max())
    assert largest > 1000
    plan = solve_layers(cost, 0.5, scaling="plain", max_iterations=20_000)
    assert plan.eta == pytest.approx(0.5 * largest / 1000)
    assert_same_plan(plan.plan, pot_plan(cost.numpy(), plan.eta), 1e-6)
    assert solve_layers(cost / largest * 999, 0.5, scaling="plain", max_iterations=1).eta == 0.5
    # What counts is the cost as it is used: after the scaling.
    assert solve_layers(cost, 0.5).eta == 0.5
    outlier = _layer_cost()
    outlier[0, 0] += 1e3
    scaled = _median_scaled(outlier)[0].max()
    assert solve_layers(outlier, 0.1, max_iterations=10).eta == pytest.approx(0.1 * scaled / 1000)


@pytest.mark.parametrize("marginals", ["balanced", "semi-relaxed"])
@pytest.mark.parametrize("scaling", ["median-scaled", "plain"])
def test_equal_costs_give_a_flat_plan(scaling, marginals):
    plan = solve_layers(torch.full((3, 5), 0.7), 0.1, scaling=scaling, marginals=marginals)
    torch.testing.assert_close(plan.plan, torch.full((3, 5), 1 / 15, dtype=torch.float64), rtol=1e-12, atol=0)
    # More than half of the costs at the minimum: the median is zero, and the cost is taken as it is.
    mostly = torch.full((3, 5), 0.7)
    mostly[1, 1] = 0.9
    plan = solve_layers(mostly, 0.1, scaling=scaling, marginals=marginals)
    assert plan.plan.isfinite().all() and plan.median == 1.0
    assert plan.plan[1, 1] < plan.plan[1, 0]


def test_a_layer_plan_that_did_not_converge_says_so():
    plan = solve_layers(_layer_cost(6, 6), 0.01, max_iterations=2)
    assert not plan.converged and plan.iterations == 2 and plan.marginal_error > 1e-9


def test_a_layer_cost_that_is_not_finite_is_refused():
    cost = _layer_cost()
    cost[2, 2] = float("nan")
    with pytest.raises(TransportError):
        solve_layers(cost, 0.1)


# -- reading layer plans -------------------------------------------------------------------------------------------


def test_effective_weights_are_geometric_means():
    pre, post = torch.tensor([[0.25, 0.0], [0.09, 0.16]]), torch.tensor([[0.04, 0.5], [0.25, 0.16]])
    expected = torch.tensor([[0.1, 0.0], [0.15, 0.16]])
    torch.testing.assert_close(effective_weights(pre, post), expected)
    torch.testing.assert_close(effective_weights(post, pre), expected)


def test_the_strongest_layers_are_kept():
    weights = torch.tensor([[0.1, 0.4, 0.2, 0.3], [0.9, 0.0, 0.5, 0.1]])
    indices, values = keep_layers(weights, 2)
    assert indices.tolist() == [[1, 3], [0, 2]]
    torch.testing.assert_close(values, torch.tensor([[0.4, 0.3], [0.9, 0.5]]))
    for more in (4, 10):
        indices, values = keep_layers(weights, more)
        assert indices.shape == (2, 4)
        torch.testing.assert_close(values, weights.sort(1, descending=True).values, rtol=0, atol=0)


def test_coupling_is_the_effective_weights_and_what_is_kept_of_them():
    pre, post = (
        LayerPlan(torch.rand(3, 4, generator=torch.Generator().manual_seed(seed)), 0.1, 1.0, True, 1, 0.0)
        for seed in range(2)
    )
    weights, indices, values = couple_layers(pre, post, 2)
    torch.testing.assert_close(weights, (pre.plan * post.plan).sqrt())
    for row in range(3):
        assert indices[row].tolist() == weights[row].argsort(descending=True)[:2].tolist()
        torch.testing.assert_close(values[row], weights[row][indices[row]])


# -- sparsifying ---------------------------------------------------------------------------------------------------


def _brute_force_top(plan, kept):
    """An entry stays unless as many as `kept` others of its row, or of its column, are larger."""
    n, m = plan.shape
    mask = torch.zeros(n, m, dtype=torch.bool)
    for i in range(n):
        for j in range(m):
            in_row = sum(bool(plan[i, k] > plan[i, j]) for k in range(m)) < kept
            in_column = sum(bool(plan[k, j] > plan[i, j]) for k in range(n)) < kept
            mask[i, j] = in_row and in_column
    return mask


@_property
@given(st.integers(1, 8), st.integers(1, 8), st.integers(1, 10), st.sampled_from([2, 4, 1000]), st.integers(0, 2**31))
def test_mutual_top_equals_counting(n, m, kept, levels, seed):
    """With two or four levels nearly all entries tie."""
    generator = torch.Generator().manual_seed(seed)
    plan = torch.randint(levels, (n, m), generator=generator).float()
    mask = mutual_top(plan, kept)
    assert mask.dtype == torch.bool
    assert mask.equal(_brute_force_top(plan, kept))
    rows, columns = torch.randperm(n, generator=generator), torch.randperm(m, generator=generator)
    assert mutual_top(plan[rows][:, columns], kept).equal(mask[rows][:, columns])
    assert mutual_top(plan.T, kept).equal(mask.T)


def test_without_ties_no_row_or_column_keeps_more_than_asked():
    plan = torch.rand(300, 200, generator=torch.Generator().manual_seed(0))
    before = plan.clone()
    mask = mutual_top(plan, 12)
    assert mask.sum(1).max() <= 12 and mask.sum(0).max() <= 12
    assert mask.any() and plan.equal(before)
    largest = int(plan.argmax())
    assert mask.flatten()[largest]


def test_entries_that_tie_with_the_last_one_stay():
    plan = torch.tensor([[3.0, 2.0, 2.0, 2.0, 1.0]])
    assert mutual_top(plan, 2).tolist() == [[True, True, True, True, False]]
    assert mutual_top(torch.ones(3, 4), 1).all()
