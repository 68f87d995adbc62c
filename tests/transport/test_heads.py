"""Matching heads: whatever the correlations, heads stay whole, groups stay groups and pairs stay pairs.

That the heads which are found are the right ones is in test_structure.py, on planted models.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tmerge.transport import Heads, Solver
from tmerge.transport.heads import match_heads

_property = settings(max_examples=25, deadline=None, derandomize=True)
_seeds = st.integers(0, 2**31)

_SHARED = [1.0, 0.1, 0.01]
# Some dimensions are not rotated; pairs are halves on one side and neighbours on the other, in no order.
_NARROW = Heads.of(
    {"heads": 4, "kv_heads": 2, "head_dim": 8, "pairs": [[0, 3], [1, 4], [2, 5]], "frequencies": _SHARED}
)
_WIDE = Heads.of(
    {
        "heads": 9,
        "kv_heads": 3,
        "head_dim": 12,
        "pairs": [[0, 1], [2, 3], [4, 5], [6, 7]],
        "frequencies": [0.01, 1.0, 0.5, 0.1],
    }
)
_PLAIN = Heads.of({"heads": 5, "kv_heads": 5, "head_dim": 6, "pairs": [], "frequencies": None})
_MANY = ("q.post", "o.pre")


def _correlations(target, source, seed, keys=("q.post", "k.post", "v.post", "o.pre")):
    generator = torch.Generator().manual_seed(seed)
    sizes = {
        key: [(side.heads if key in _MANY else side.kv_heads) * side.head_dim for side in (target, source)]
        for key in keys
    }
    return {key: 2 * torch.rand(*size, generator=generator) - 1 for key, size in sizes.items()}


def _blocks(plan, key, target, source):
    """(heads, heads', dimensions, dimensions') of a plan."""
    mine, theirs = (side.heads if key in _MANY else side.kv_heads for side in (target, source))
    return plan.reshape(mine, target.head_dim, theirs, source.head_dim).permute(0, 2, 1, 3)


def _met(blocks):
    """Which heads meet: (heads, heads') bool."""
    return (blocks != 0).any(3).any(2)


def _solve(target, source, seed, *, signed=False, epsilon=None, **options):
    found = match_heads(
        _correlations(target, source, seed, **options),
        target,
        source,
        Solver(epsilon, signed=signed),
    )
    return {key: _blocks(item.dense(), key, target, source) for key, item in found.items()}


sides = pytest.mark.parametrize(
    ("target", "source"),
    [(_NARROW, _WIDE), (_WIDE, _NARROW), (_NARROW, _NARROW), (_PLAIN, _WIDE), (_NARROW, _PLAIN), (_PLAIN, _PLAIN)],
    ids=["narrow-wide", "wide-narrow", "alike", "plain-wide", "narrow-plain", "plain"],
)


@sides
@_property
@given(_seeds, st.booleans())
def test_heads_stay_whole(target, source, seed, signed):
    found = _solve(target, source, seed, signed=signed)
    for single, many in (("k.post", "q.post"), ("v.post", "o.pre")):
        inside: dict[tuple[int, int], torch.Tensor] = {}
        groups, heads = _met(found[single]), _met(found[many])
        for a, b in groups.nonzero().tolist():
            inside[a, b] = found[single][a, b]
        for h, g in heads.nonzero().tolist():
            # A query head meets the heads of the kv groups that its own meets, by its own group's dimensions.
            group = h // (target.heads // target.kv_heads), g // (source.heads // source.kv_heads)
            assert found[many][h, g].equal(inside[group])
        # Every head of the side with fewer is there; in a group, every query head of the group with fewer.
        assert groups.any(1).all() if target.kv_heads <= source.kv_heads else groups.any(0).all()
        fewer = min(target.heads // target.kv_heads, source.heads // source.kv_heads)
        assert heads.sum() >= fewer * groups.sum()
    # Scores and values are one head's.
    assert _met(found["q.post"]).equal(_met(found["o.pre"])) and _met(found["k.post"]).equal(_met(found["v.post"]))


@sides
@_property
@given(_seeds)
def test_rotated_pairs_meet_the_pair_of_their_place(target, source, seed):
    blocks = _solve(target, source, seed)["k.post"]
    for a, b in _met(blocks).nonzero().tolist():
        plan, met = blocks[a, b], {}
        for index, (one, two) in enumerate(target.pairs.tolist()):
            partners = plan[one].nonzero().flatten().tolist(), plan[two].nonzero().flatten().tolist()
            if partners == ([], []):
                continue
            (first,), (second,) = partners
            other = source.pairs.tolist().index([first, second])  # a pair, the same way round
            met[float(target.frequencies[index])] = float(source.frequencies[other])
        # All of the side with fewer, none twice, the faster ones with the faster ones.
        assert len(set(met.values())) == len(met) == min(len(target.pairs), len(source.pairs))
        assert [met[mine] for mine in sorted(met)] == sorted(met.values())
        # What is not rotated meets what is not.
        assert not plan[target.free][:, source.pairs.flatten()].any()


@_property
@given(_seeds)
def test_only_the_features_that_are_there_take_part(seed):
    for keys in (("q.post", "k.post"), ("v.post", "o.pre"), ("v.post",), ("o.pre",), ("k.post",), ("q.post",)):
        found = _solve(_NARROW, _WIDE, seed, keys=keys)
        assert tuple(found) == keys
        assert all(_met(blocks).any(1).all() for blocks in found.values())


@_property
@given(_seeds)
def test_only_v_and_o_take_signs(seed):
    found = _solve(_NARROW, _WIDE, seed, signed=True)
    assert (found["q.post"] >= 0).all() and (found["k.post"] >= 0).all()
    assert (found["v.post"] < 0).any() and (found["o.pre"] < 0).any()
    assert all((blocks >= 0).all() for blocks in _solve(_NARROW, _WIDE, seed).values())


def test_regularised_shares_are_products():
    """Of a kv group's with another's, of a query head's with another's there, and of the dimensions."""
    target = source = _PLAIN
    found = _solve(target, source, 0, epsilon=0.3)
    keys = found["k.post"].sum(3).sum(2) / target.head_dim
    # Target marginals are what n * Q says: one a head, one a dimension; entries below 1e-4 were left out.
    torch.testing.assert_close(keys.sum(1), torch.ones(5), rtol=0, atol=5e-3)
    dims = found["v.post"][0, int(keys[0].argmax())]
    torch.testing.assert_close(dims.sum(1) / dims.sum(1).mean(), torch.ones(6), rtol=0, atol=5e-3)
    # One query head for each kv head: its share is one.
    torch.testing.assert_close(found["q.post"], found["k.post"])


def test_the_best_heads_are_found():
    """Correlations that are large for one pairing of groups, heads and dimensions alone."""
    generator = torch.Generator().manual_seed(3)
    groups, members = torch.randperm(2, generator=generator), torch.tensor([[1, 0], [0, 1]])
    dims = torch.tensor([0, 1, 2, 3, 4, 5, 7, 6])  # the two that nothing rotates, swapped
    values = torch.randperm(8, generator=generator)
    correlations = {key: 0.3 * plan for key, plan in _correlations(_NARROW, _NARROW, 0).items()}
    wanted = {key: torch.zeros_like(_blocks(plan, key, _NARROW, _NARROW)) for key, plan in correlations.items()}
    for a, b in enumerate(groups.tolist()):
        wanted["k.post"][a, b, torch.arange(8), dims] = wanted["v.post"][a, b, torch.arange(8), values] = 1.0
        for one, other in enumerate(members[a].tolist()):
            wanted["q.post"][2 * a + one, 2 * b + other, torch.arange(8), dims] = 1.0
            wanted["o.pre"][2 * a + one, 2 * b + other, torch.arange(8), values] = 1.0
    for key, plan in correlations.items():
        plan += wanted[key].permute(0, 2, 1, 3).reshape(plan.shape)
    found = match_heads(correlations, _NARROW, _NARROW, Solver())
    for key, item in found.items():
        assert _blocks(item.dense(), key, _NARROW, _NARROW).equal(wanted[key]), key


@pytest.mark.parametrize(("mine", "theirs"), [(32, 64), (64, 32), (16, 16)])
def test_with_one_theta_the_place_is_the_frequency(mine, theirs):
    found = _rotary(mine, 1e4), _rotary(theirs, 1e4)
    assert _met_frequencies(*found) == pytest.approx({value: value for value in _frequencies(min(mine, theirs), 1e4)})


@pytest.mark.parametrize("stretch", [lambda value: value**1.5, lambda value: value / 8 if value < 0.01 else value])
def test_a_stretched_context_leaves_every_pair_in_its_place(stretch):
    """Another theta, or slow pairs made slower (llama3): what was one pair before is one still."""
    plain = _rotary(32, 1e4)
    longer = Heads(1, 1, 64, plain.pairs, torch.tensor([stretch(value) for value in plain.frequencies.tolist()]))
    wanted = {mine: stretch(mine) for mine in plain.frequencies.tolist()}
    assert _met_frequencies(plain, longer) == pytest.approx(wanted)


def _frequencies(pairs, theta):
    return [theta ** (-place / pairs) for place in range(pairs)]


def _rotary(pairs, theta):
    """One head; its pairs in no order."""
    order = torch.randperm(pairs, generator=torch.Generator().manual_seed(pairs))
    frequencies = torch.tensor(_frequencies(pairs, theta), dtype=torch.float64)[order]
    return Heads(1, 1, 2 * pairs, torch.arange(2 * pairs).reshape(-1, 2), frequencies)


def _met_frequencies(target, source):
    plan = _solve(target, source, 0)["k.post"][0, 0]
    return {
        float(target.frequencies[index]): float(source.frequencies[int(plan[2 * index].argmax()) // 2])
        for index in range(len(target.pairs))
        if plan[2 * index].any()
    }


def test_unknown_frequencies_meet_in_their_order():
    facts = {"heads": 1, "kv_heads": 1, "head_dim": 6, "pairs": [[0, 3], [1, 4], [2, 5]], "frequencies": None}
    narrow = {**facts, "head_dim": 4, "pairs": [[0, 2], [1, 3]]}
    blocks = _solve(Heads.of(narrow), Heads.of(facts), 0)["q.post"][0, 0]
    # Two of three: the first, and the one two thirds down.
    assert blocks.nonzero().tolist() == [[0, 0], [1, 2], [2, 3], [3, 5]]
