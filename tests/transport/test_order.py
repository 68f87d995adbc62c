"""Pairing layers: the dynamic programme against all assignments there are, and the layers' costs against NumPy."""

from __future__ import annotations

from itertools import combinations, combinations_with_replacement

import numpy as np
import ot
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.transport.reference import feature_pair, reference_cost
from tmerge.transport import in_order, nearest_cost
from tmerge.transport.order import layer_features, sampled

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


# -- how far apart two layers are ----------------------------------------------------------------------------------


def _reference(target, source):
    """The cost of every target neuron's nearest, by NumPy from all texts and neurons."""
    return float(np.minimum(reference_cost(target, source).min(1), 1.0).mean())


@pytest.mark.parametrize("shape", [(30, 45), (45, 30), (1, 7)], ids=str)
@pytest.mark.parametrize("kind", ["independent", "factors", "copies"])
def test_the_cost_of_the_nearest_equals_numpy(kind, shape):
    target, source = feature_pair(kind, *shape)
    # Correlations in float32.
    assert nearest_cost(layer_features(target), sampled(source)) == pytest.approx(_reference(target, source), abs=1e-6)


def test_it_is_what_semi_relaxed_transport_becomes_as_eps_goes_to_zero():
    """POT with the source's marginal free: every target neuron goes where it costs least."""
    target, source = feature_pair("factors", 12, 15)
    cost = reference_cost(target, source)
    exact = nearest_cost(layer_features(target), sampled(source))
    totals = []
    for epsilon in (0.3, 0.1, 0.01):
        plan = ot.unbalanced.sinkhorn_unbalanced(np.full(12, 1 / 12), np.full(15, 1 / 15), cost, epsilon, (np.inf, 0.0))
        assert plan.sum(1) == pytest.approx(1 / 12)
        totals.append(float((plan * cost).sum()))
    assert totals == sorted(totals, reverse=True) and totals[-1] == pytest.approx(exact, abs=2e-3)


def test_a_layer_costs_nothing_with_itself_in_any_order_unit_or_number():
    x, strangers = feature_pair("factors", 30, 20)
    generator = torch.Generator().manual_seed(0)
    order, scale = torch.randperm(30, generator=generator), 10 * torch.rand(30, generator=generator).double()
    others = {
        "permuted": x[:, order],
        "in other units": x * scale + 7,
        "twice": torch.cat([x, x], 1),
        "among strangers": torch.cat([strangers, x], 1),
    }
    for name, other in others.items():
        assert nearest_cost(layer_features(x), sampled(other)) == pytest.approx(0.0, abs=1e-6), name
    # What the other side lacks costs.
    assert nearest_cost(layer_features(torch.cat([x, strangers], 1)), sampled(x)) > 0.1


def test_what_never_varies_costs_one():
    flat, (x, _) = torch.full((20, 5), 3.0), feature_pair("factors", 4, 1, texts=20)
    for pair in ((flat, x), (x, flat)):
        assert nearest_cost(layer_features(pair[0]), sampled(pair[1])) == 1.0
    # And so does what is like nothing but by its negative.
    assert nearest_cost(layer_features(x[:, :1]), sampled(-x[:, :1])) == 1.0


def test_some_texts_and_neurons_suffice():
    """Evenly spaced ones, the same for both models; all source neurons take part."""
    target, source = feature_pair("copies", 700, 600, texts=1500)
    assert layer_features(target).shape == (500, 234) and sampled(source).shape == (500, 600)
    found = nearest_cost(layer_features(target), sampled(source))
    assert found == pytest.approx(_reference(target[::3, ::3], source[::3]), abs=1e-6)
    # Of three times as many: each neuron's likeness to its copy is known to a few hundredths.
    assert found == pytest.approx(_reference(target, source), abs=0.02)
