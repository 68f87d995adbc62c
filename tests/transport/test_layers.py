"""How alike layers are: by activations against NumPy and POT, by weights against a plain loop; planted ones found."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import numpy as np
import ot
import pytest
import torch
from torch.nn.functional import normalize

from tests.planted import PLANTED_FAMILIES, planted_case, side_of
from tests.transport.reference import feature_pair, reference_cost
from tmerge.models import SIDES, describe, feature_key
from tmerge.transport import (
    STREAM_KEYS,
    Correspondence,
    Side,
    compare_layers,
    find_structure,
    match_stream,
    nearest_cost,
)
from tmerge.transport.layers import layer_features, nearest_cosines, sampled

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


# -- by weights ----------------------------------------------------------------------------------------------------


def _of_weights(weights):
    """A side of which weights alone are there: (layer, projection) -> (out, in)."""
    keys = {}
    for layer, projection in weights:
        keys[layer] = (*keys.get(layer, ()), *(feature_key(projection, side) for side in SIDES))
    return Side(None, keys, {}, lambda layer, projection: weights[layer, projection])


def test_cosines_are_those_of_a_plain_loop_and_what_is_lacking_does_not_count():
    generator = torch.Generator().manual_seed(0)

    def drawn(*shape):
        return torch.randn(shape, generator=generator)

    # The target's second layer has no down, nor has the source's last.
    target = {(0, "up"): drawn(6, 4), (0, "down"): drawn(4, 6), (3, "up"): drawn(6, 4)}
    source = {(1, "up"): drawn(9, 5), (1, "down"): drawn(5, 9), (2, "up"): drawn(9, 5)}
    rows, columns = torch.tensor([0, 1, 2, 3]), torch.tensor([4, 0, 2, 1])
    stream = Correspondence(rows, columns, torch.tensor([1.0, -1.0, 1.0, 1.0]), (4, 5))
    sides = _of_weights(target), _of_weights(source)

    def alike(layer, other, projection, signed):
        mine, theirs = target[layer, projection].double(), source[other, projection].double()
        if projection == "down":
            mine, theirs = mine.T, theirs.T
        theirs = theirs[:, columns] * stream.values
        nearest = []
        for a in mine:
            cosines = [float(a @ b / a.norm() / b.norm()) for b in theirs]
            nearest.append(max(map(abs, cosines) if signed else cosines))
        return sum(nearest) / len(nearest)

    told = []
    for signed in (False, True):
        told.clear()
        found = nearest_cosines(*sides, stream, signed=signed, progress=lambda *step: told.append(step))
        for row, layer in enumerate((0, 3)):
            for column, other in enumerate((1, 2)):
                both = [name for name in ("up", "down") if (layer, name) in target and (other, name) in source]
                expected = sum(alike(layer, other, name, signed) for name in both) / len(both)
                assert float(found[row, column]) == pytest.approx(expected, abs=1e-6)
        assert told[-1][0] == told[-1][1] == len(told)


def test_a_layer_is_known_by_its_attention_where_it_has_one():
    generator = torch.Generator().manual_seed(0)
    own = {(0, name): torch.randn(4, 4, generator=generator) for name in ("v", "up")}
    own |= {(1, "up"): torch.randn(4, 4, generator=generator)}
    # The source's MLPs are the target's, its attention is not.
    other = {**own, (0, "v"): torch.randn(4, 4, generator=generator)}
    stream = Correspondence.of(torch.eye(4))
    alike = nearest_cosines(_of_weights(own), _of_weights(other), stream)
    assert float(alike[1, 1]) == pytest.approx(1) and bool(alike[0, 1].isnan() and alike[1, 0].isnan())
    cosines = normalize(own[0, "v"]) @ normalize(other[0, "v"]).T
    assert float(alike[0, 0]) == pytest.approx(float(cosines.amax(1).mean())) and alike[0, 0] < 0.9


def _weights_of(model):
    layers = describe(model).layers
    return lambda layer, projection: layers[layer][projection].weight()


@cache
def _alike_everywhere(family):
    """The two models, of which all layers' activations look the same: one layer's stream, and else noise."""
    case, generator = planted_case(family), torch.Generator().manual_seed(0)

    def seen(features, layer):
        return {
            (of, key): features[layer, key] if key in STREAM_KEYS else torch.randn(values.shape, generator=generator)
            for (of, key), values in features.items()
        }

    target, source = seen(case.target_features, 0), seen(case.source_features, case.source_layers[0])
    return side_of(case.target, target), side_of(case.planted.model, source)


@pytest.mark.parametrize("family", PLANTED_FAMILIES)
def test_weights_find_the_layers_that_activations_cannot(family):
    case, (target, source) = planted_case(family), _alike_everywhere(family)
    seen = find_structure(target, source, case.keys)
    assert seen.pairs != dict(enumerate(case.source_layers)) and seen.agreement is None
    target = replace(target, weights=_weights_of(case.target))
    source = replace(source, weights=_weights_of(case.planted.model))
    told = []
    found = find_structure(
        target, source, case.keys, heard=lambda what, done, total, *_: told.append((what, done, total))
    )
    assert found.pairs == dict(enumerate(case.source_layers))
    moved = sum(seen.pairs[layer] != other for layer, other in found.pairs.items())
    assert found.agreement.moved_layers == moved > 0 and found.agreement.clear
    # Through the stream that was found at last; norms of several copies were folded into the weights.
    assert found.agreement.paired > 0.999 and found.agreement.chance < 0.8
    weighed = [step for step in told if step[0] == "layers by weights"]
    assert weighed[-1][1] == weighed[-1][2] == len(weighed)


def test_weights_that_have_nothing_in_common_leave_activations_their_say():
    case, generator = planted_case("llama"), torch.Generator().manual_seed(0)

    def noise(model):
        read = _weights_of(model)
        return lambda layer, name: torch.randn(read(layer, name).shape, generator=generator)

    target = replace(side_of(case.target, case.target_features), weights=noise(case.target))
    source = replace(side_of(case.planted.model, case.source_features), weights=noise(case.planted.model))
    found = find_structure(target, source, case.keys)
    assert found.pairs == dict(enumerate(case.source_layers)) and not found.agreement.clear
    stream, _ = match_stream(target, source, found.pairs)
    alike = nearest_cosines(target, source, stream)
    # Nothing sets one pair of layers apart: by weights they differ by hundredths, by activations by tenths.
    by_activations = compare_layers(target, source, case.keys).alike
    assert float(alike.std()) < 0.2 * float(by_activations.std())


def _strangers(layers, generator):
    """A model of random weights on random features: layer -> the projections that it has."""
    weights, features = {}, {}
    for layer, names in layers.items():
        for name in names:
            weights[layer, name] = torch.randn((48, 96) if name in ("o", "down") else (96, 48), generator=generator)
            for side, width in zip(SIDES, (weights[layer, name].shape[::-1]), strict=True):
                key = feature_key(name, side)
                features.setdefault((layer, key), torch.randn(60, width, generator=generator))
    keys = {layer: [key for of, key in features if of == layer] for layer in layers}
    return Side(lambda layer, key: features[layer, key], keys, {}, lambda layer, projection: weights[layer, projection])


_BOTH, _MLP = ("q", "k", "v", "o", "up", "down"), ("up", "down")


@pytest.mark.parametrize(
    ("layers", "others"),
    [
        ({0: _BOTH}, {0: _BOTH}),
        ({0: _BOTH, 1: _BOTH, 2: _BOTH}, {0: _BOTH}),
        ({0: _BOTH, 1: _MLP, 2: _BOTH, 3: _MLP}, {0: _MLP, 1: _BOTH, 2: _MLP, 3: _BOTH, 4: _MLP, 5: _BOTH}),
        ({0: _BOTH, 1: _BOTH}, {0: _MLP, 1: _MLP}),
    ],
    ids=["one layer each", "one of the source", "hybrids", "nothing in common"],
)
def test_strangers_are_not_told_to_be_relatives_whatever_layers_they_have(layers, others):
    generator = torch.Generator().manual_seed(0)
    target, source = _strangers(layers, generator), _strangers(others, generator)
    keys = [feature_key(name, side) for name in _BOTH for side in SIDES]
    found = find_structure(target, source, list(dict.fromkeys(keys)))
    by_activations = compare_layers(target, source, list(dict.fromkeys(keys))).pairs
    assert found.pairs == by_activations
    if set(layers.values()) == {_BOTH} and set(others.values()) == {_MLP}:
        assert found.agreement is None
    else:
        assert not found.agreement.clear and found.agreement.moved_layers == 0
        assert found.agreement.paired == pytest.approx(found.agreement.chance, abs=0.03)
