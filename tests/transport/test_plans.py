"""Feature plans of layer pairs, layer plans over them, and how both are read."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.transport.reference import assert_same_plan, feature_pair, reference_cost, reference_plan
from tmerge.errors import Cancelled, TransportError
from tmerge.transport import (
    feature_plan,
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
    # A stage says it once (tests/stages/test_step.py): it is the same each time.
    assert len(notes) == 2 and notes[0] == notes[1] and notes[0].endswith("fewer at a time from here on")


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
