"""Pairing layers in order: the dynamic programme against all assignments there are."""

from __future__ import annotations

from itertools import combinations, combinations_with_replacement

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tmerge.transport import in_order

_property = settings(max_examples=80, deadline=None, derandomize=True)
_seeds = st.integers(0, 2**31)


def _similarity(layers, others, seed):
    return torch.rand(layers, others, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _every_assignment(layers, others):
    """All in order: strictly where that is possible."""
    return (combinations if layers <= others else combinations_with_replacement)(range(others), layers)


def _total(similarity, chosen):
    return float(sum(similarity[layer, other] for layer, other in enumerate(chosen)))


@_property
@given(st.integers(1, 5), st.integers(1, 6), _seeds)
def test_equals_the_best_of_all_assignments(layers, others, seed):
    similarity = _similarity(layers, others, seed)
    best = max(_every_assignment(layers, others), key=lambda chosen: _total(similarity, chosen))
    assert in_order(similarity).tolist() == list(best)


@_property
@given(st.integers(1, 5), st.integers(1, 6), _seeds)
def test_negative_and_tied_similarities_do_no_harm(layers, others, seed):
    similarity = (3 * _similarity(layers, others, seed)).floor() - 2
    chosen = in_order(similarity)
    step = chosen.diff()
    assert (step >= (1 if layers <= others else 0)).all() and 0 <= int(chosen.min()) <= int(chosen.max()) < others
    best = max(_total(similarity, other) for other in _every_assignment(layers, others))
    assert _total(similarity, chosen.tolist()) == best


def test_as_many_layers_are_paired_one_by_one_whatever_they_are_like():
    assert in_order(_similarity(5, 5, 0)).tolist() == [0, 1, 2, 3, 4]


def test_order_settles_what_a_neighbour_would_win():
    # The second layer's best is the third layer's own, by a hair.
    similarity = torch.tensor([[0.9, 0.5, 0.1, 0.0], [0.5, 0.80, 0.81, 0.1], [0.1, 0.4, 0.9, 0.2]])
    assert similarity.argmax(1).tolist() == [0, 2, 2]
    assert in_order(similarity).tolist() == [0, 1, 2]
