"""What a run keeps of its transport."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from tmerge.errors import RunNotFoundError
from tmerge.transport import MASS_AT, SparsePlans, TransportRecord, mass_of_top, mutual_top, sparsify

_property = settings(max_examples=40, deadline=None, derandomize=True)


def _plan(n, m, seed=0):
    """Positive entries of sum one, of very unequal size."""
    spread = 2 * torch.randn(n, m, generator=torch.Generator().manual_seed(seed))
    return torch.softmax(spread.flatten(), 0).reshape(n, m)


def _as_kept(plan, mask):
    """n * Q of the kept entries, through float16, with nothing sparse about it."""
    return torch.where(mask, (plan * len(plan)).half().float(), 0.0)


# -- sparse plans --------------------------------------------------------------------------------------------------


@_property
@given(st.integers(1, 12), st.integers(1, 12), st.integers(1, 12), st.integers(1, 4), st.integers(0, 2**31))
def test_sparse_plans_are_the_masked_ones(n, m, kept, count, seed):
    plans = [_plan(n, m, seed + index) for index in range(count)]
    masks = [mutual_top(plan, kept) for plan in plans]
    sparse = sparsify(plans, masks)
    assert sparse.shape == (n, m) and len(sparse.offsets) == count * n + 1
    assert len(sparse.columns) == len(sparse.values) == sum(int(mask.sum()) for mask in masks) + len(sparse.beyond)
    for index, (plan, mask) in enumerate(zip(plans, masks, strict=True)):
        dense = sparse.dense(index)
        assert dense.dtype == torch.float32
        assert dense.equal(_as_kept(plan, mask))
        # Half precision: eleven bits of each entry, or 6e-8 where entries are below its normal range.
        torch.testing.assert_close(dense, torch.where(mask, plan * n, 0.0), rtol=5e-4, atol=6e-8)
        stored, survived = sparse.read(index)
        assert survived.equal(mask)
        # Beyond the survivors: the largest entry of every row and column that lost them all, and nothing else.
        empty_rows, empty_columns = ~mask.any(1), ~mask.any(0)
        assert stored[empty_rows].argmax(1).equal(plan[empty_rows].argmax(1))
        assert stored[:, empty_columns].argmax(0).equal(plan[:, empty_columns].argmax(0))
        more = (stored > 0) & ~mask
        assert not (more & ~empty_rows.unsqueeze(1) & ~empty_columns).any()


def test_a_plan_of_nothing_is_zeros():
    plan = _plan(3, 4)
    nothing, all_of_it = torch.zeros(3, 4, dtype=torch.bool), torch.ones(3, 4, dtype=torch.bool)
    some = nothing.clone()
    some[1, 2] = True
    sparse = sparsify([plan, plan, plan], [nothing, all_of_it, some])
    assert not sparse.dense(0).any()
    assert sparse.dense(1).equal((3 * plan).half().float())
    assert sparse.dense(2).nonzero().tolist() == [[1, 2]]


def test_wide_plans_keep_their_columns_apart():
    """More columns than an int16 counts."""
    n, m = 2, 40_000
    plan = torch.full((n, m), 1 / (n * m))
    mask = torch.zeros(n, m, dtype=torch.bool)
    mask[0, 39_999] = mask[1, 32_768] = mask[1, 5] = True
    assert sparsify([plan], [mask]).dense(0).nonzero().tolist() == [[0, 39_999], [1, 5], [1, 32_768]]


def test_offsets_are_one_longer_than_the_rows_and_int64():
    sparse = sparsify([_plan(3, 4)], [torch.ones(3, 4, dtype=torch.bool)])
    assert sparse.offsets.dtype == torch.int64 and sparse.offsets.tolist() == [0, 4, 8, 12]


# -- captured mass -------------------------------------------------------------------------------------------------


def _brute_force_mass(plan):
    curve = []
    for count in MASS_AT:
        shares = [sum(sorted(row, reverse=True)[:count]) / sum(row) for row in plan.double().tolist()]
        curve.append(sum(shares) / len(shares))
    return torch.tensor(curve)


@_property
@given(st.integers(1, 30), st.integers(1, 40), st.integers(0, 2**31))
def test_captured_mass_equals_counting(n, m, seed):
    plan = _plan(n, m, seed)
    curve = mass_of_top(plan)
    assert curve.dtype == torch.float32
    torch.testing.assert_close(curve, _brute_force_mass(plan), rtol=1e-6, atol=0)
    # In the order of the entries, and whole at the end.
    assert (curve.diff() >= 0).all() and curve[-1] == 1


def test_captured_mass_of_known_plans():
    assert mass_of_top(torch.eye(5) / 5).tolist() == [1.0] * len(MASS_AT)
    curve = dict(zip(MASS_AT, mass_of_top(torch.full((4, 64), 1 / 256)).tolist(), strict=True))
    assert curve[1] == pytest.approx(1 / 64) and curve[16] == pytest.approx(1 / 4) and curve[64] == curve[128] == 1.0


@pytest.mark.parametrize("n", [257, 300, 1000])
def test_captured_mass_of_many_rows_is_read_from_rows_all_over(n):
    """Rows of two kinds, the first half and the second: the mean shows both, whichever rows are read."""
    plan = torch.zeros(n, 8)
    plan[: n // 2, 0] = 1.0
    plan[n // 2 :] = 1 / 8
    # The halves are unequal by a row at most, and of some hundred rows read that is a percent.
    assert float(mass_of_top(plan)[0]) == pytest.approx((1 + 1 / 8) / 2, abs=0.01)


# -- the file ------------------------------------------------------------------------------------------------------


@pytest.fixture
def record():
    plans = [_plan(5, 7, seed) for seed in range(3)]
    masks = [mutual_top(plan, 3) for plan in plans]
    sparse = sparsify(plans, masks)
    tensors = {
        "pairs.q.post": torch.tensor([[0, 1], [0, 2], [1, 0]], dtype=torch.int32),
        "f.q.post": torch.randn(3, 5),
        "g.q.post": torch.randn(3, 7),
        "statistics.target.q.post.mean": torch.randn(2, 5),
        "statistics.source.q.post.mean": torch.randn(3, 7),
        "plan.q.post.offsets": sparse.offsets,
        "plan.q.post.columns": sparse.columns,
        "plan.q.post.values": sparse.values,
        "plan.q.post.beyond": sparse.beyond,
        "effective.q": torch.rand(3, 2).T,  # not contiguous
    }
    facts = {"schema": 1, "projections": ["q", "o"], "keys": ["qkv.pre", "q.post"], "epsilon": 0.1, "what": "ไทย"}
    return TransportRecord(facts, tensors)


def test_a_record_comes_back_as_it_was(record, tmp_path):
    path = tmp_path / "transport.safetensors"
    record.save(path)
    assert [file.name for file in tmp_path.iterdir()] == ["transport.safetensors"]
    back = TransportRecord.load(path)
    assert back.facts == record.facts
    assert set(back.tensors) == set(record.tensors)
    for name, values in record.tensors.items():
        assert back.tensors[name].equal(values) and back.tensors[name].dtype == values.dtype, name
    assert back.projections == ["q", "o"] and back.keys == ["qkv.pre", "q.post"]
    assert back.pairs("q.post") == [(0, 1), (0, 2), (1, 0)]
    for index in range(3):
        plan = _plan(5, 7, index)
        assert back.plans("q.post").dense(index).equal(_as_kept(plan, mutual_top(plan, 3)))
    assert back.plans("q.post").shape == (5, 7)


def test_saving_again_replaces_the_file_and_writes_the_same_bytes(record, tmp_path):
    path = tmp_path / "transport.safetensors"
    record.save(path)
    first = path.read_bytes()
    record.save(path)
    assert path.read_bytes() == first
    record.facts["epsilon"] = 0.2
    record.save(path)
    assert TransportRecord.load(path).facts["epsilon"] == 0.2


def test_a_record_starts_empty_and_does_not_share_its_facts():
    facts = {"projections": [], "keys": []}
    first, second = TransportRecord(facts), TransportRecord(facts)
    first.tensors["mass.q.post"] = torch.ones(1)
    first.facts["epsilon"] = 1
    assert second.tensors == {} and facts == {"projections": [], "keys": []}


@pytest.mark.parametrize("content", [None, b"", b"not a safetensors file", "foreign", "truncated"])
def test_what_is_no_record_is_refused_in_one_line(content, record, tmp_path):
    path = tmp_path / "transport.safetensors"
    if content == "foreign":
        save_file({"weight": torch.ones(2)}, path)
    elif content == "truncated":
        record.save(path)
        path.write_bytes(path.read_bytes()[:-10])
    elif content is not None:
        path.write_bytes(content)
    with pytest.raises(RunNotFoundError) as refused:
        TransportRecord.load(path)
    assert str(path) in str(refused.value) and "tmerge merge" in str(refused.value)
    assert "\n" not in str(refused.value)


def test_sparse_plans_are_read_where_they_lie():
    """A record's tensors may hold many plans; each reads its own stretch."""
    offsets = torch.tensor([0, 1, 1, 3, 4])
    columns, values = torch.tensor([2, 0, 1, 2], dtype=torch.int16), torch.tensor([1.0, 0.5, 0.25, 2.0]).half()
    plans = SparsePlans(offsets, columns, values, torch.tensor([2]), (2, 3))
    assert plans.dense(0).tolist() == [[0.0, 0.0, 1.0], [0.0, 0.0, 0.0]]
    assert plans.dense(1).tolist() == [[0.5, 0.0, 0.0], [0.0, 0.0, 2.0]]
    assert plans.read(1)[0].tolist() == [[0.5, 0.25, 0.0], [0.0, 0.0, 2.0]]
