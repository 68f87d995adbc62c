"""Neurons matched by their weights: cosines as a plain loop has them, and what they find where activations cannot."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tests.peak import Peak, return_what_is_freed
from tests.planted import PLANTED_FAMILIES, planted_case, side_of
from tmerge.models import PROJECTIONS, describe, feature_key
from tmerge.transport import STREAM_KEYS, Correspondence, compare_layers, find_structure, match, match_neurons
from tmerge.transport.agreement import COMPARED_WEIGHTS, add_cosines

return_what_is_freed()


def weights_of(model):
    layers = describe(model).layers
    return lambda layer, projection: layers[layer][projection].weight()


def test_cosines_are_those_of_a_plain_loop():
    generator = torch.Generator().manual_seed(0)
    shapes = {"gate": (7, 5), "up": (7, 5), "down": (5, 7)}
    source_shapes = {"gate": (11, 8), "up": (11, 8), "down": (8, 11)}
    target, source = (
        {name: torch.randn(shape, generator=generator) for name, shape in of.items()} for of in (shapes, source_shapes)
    )
    # Two neurons of the source stand for the first of the target's, one with its sign turned; the last has none.
    rows, columns = torch.tensor([0, 0, 1, 2, 3]), torch.tensor([6, 2, 0, 5, 7])
    stream = Correspondence(rows, columns, torch.tensor([1.0, 1.0, -1.0, 1.0, 1.0]), (5, 8))

    def cosines(key, matched, shape):
        found = torch.zeros(shape)
        said = add_cosines(found, key, list(shapes), target.__getitem__, source.__getitem__, matched)
        return found if said else None

    before = {name: weight.clone() for name, weight in target.items()}
    found = cosines("up.post", dict.fromkeys(STREAM_KEYS, stream), (7, 11))
    for neuron in range(7):
        for other in range(11):
            mine, theirs = target["up"][neuron].double(), torch.zeros(5, dtype=torch.float64)
            for row, column, value in zip(rows.tolist(), columns.tolist(), stream.values.tolist(), strict=True):
                theirs[row] += value * source["up"][other, column].double()
            expected = mine @ theirs / mine.norm() / theirs.norm()
            assert float(found[neuron, other]) == pytest.approx(float(expected), abs=1e-6)
    units = match(torch.randn(7, 11, generator=generator))
    assert len(units.rows) == 7
    found = cosines("mlp.pre", {"gate.post": units, "up.post": units}, (5, 8))
    order = units.columns[units.rows.argsort()]
    for neuron in range(5):
        for other in range(8):
            mine = torch.cat([target[name][:, neuron] for name in ("gate", "up")]).double()
            theirs = torch.cat([source[name][order, other] for name in ("gate", "up")]).double()
            expected = mine @ theirs / mine.norm() / theirs.norm()
            assert float(found[neuron, other]) == pytest.approx(float(expected), abs=1e-6)
    assert cosines("q.post", dict.fromkeys(STREAM_KEYS, stream), (7, 11)) is None
    assert cosines("up.post", {}, (7, 11)) is None
    assert all(torch.equal(weight, before[name]) for name, weight in target.items())


def test_a_plan_of_many_entries_takes_no_more_than_the_weights():
    """An entropic plan at epsilon 0.1 keeps nearly all of its entries: 400 x 500 here, each of 700 neurons' weights."""
    generator = torch.Generator().manual_seed(0)
    plan = torch.rand(400, 500, generator=generator) / 500
    target, source = torch.randn(600, 400, generator=generator), torch.randn(700, 500, generator=generator)
    matched = {"qkv.pre": Correspondence.of(plan), "mlp.pre": Correspondence.of(plan)}
    found = torch.zeros(600, 700)
    peak = Peak()
    assert add_cosines(found, "up.post", ["up"], lambda name: target, lambda name: source, matched)
    grown = peak.grown()
    carried = source.double() @ plan.double().T
    expected = target.double() @ carried.T / target.double().norm(dim=1)[:, None] / carried.norm(dim=1)
    assert torch.allclose(found.double(), expected, atol=1e-5)
    assert grown < 40e6  # by its entries: 700 x 200,000 x 4 bytes


def test_of_a_wide_model_some_of_a_neurons_weights_are_compared():
    generator = torch.Generator().manual_seed(0)
    width = 2 * COMPARED_WEIGHTS + 100
    stream = match(torch.randn(width, width, generator=generator))
    target = torch.randn(6, width, generator=generator)
    # The same neurons, a little off, the stream in another order.
    source = torch.empty(6, width)
    source[:, stream.columns] = (target + 0.5 * torch.randn(6, width, generator=generator))[:, stream.rows]
    found, asked = torch.zeros(6, 6), []

    def read_source(projection):
        asked.append(projection)
        return source

    matched = {"qkv.pre": stream, "mlp.pre": stream}
    assert add_cosines(found, "up.post", ["up"], lambda name: target, read_source, matched)
    carried = source.double()[:, stream.columns[stream.rows.argsort()]]
    whole = target.double() @ carried.T / target.double().norm(dim=1)[:, None] / carried.norm(dim=1)
    assert asked == ["up"]
    assert not torch.allclose(found.double(), whole, atol=1e-6)
    # Five times what the mean of so many entries leaves uncertain.
    assert torch.allclose(found.double(), whole, atol=5 / COMPARED_WEIGHTS**0.5)
    assert (found.diagonal() > 0.85).all()


@pytest.mark.parametrize("family", PLANTED_FAMILIES)
def test_weights_find_what_activations_cannot(family):
    """Of heads and MLPs only noise is seen, as on texts that a model cannot read."""
    case = planted_case(family)
    generator = torch.Generator().manual_seed(0)

    def blind(features):
        """The same, with noise in place of what is no neuron of the stream."""
        return {
            (layer, key): seen if key in STREAM_KEYS else torch.randn(seen.shape, generator=generator)
            for (layer, key), seen in features.items()
        }

    target = side_of(case.target, blind(case.target_features))
    source = side_of(case.planted.model, blind(case.source_features))
    pairs = dict(enumerate(case.source_layers))
    by_weights = [
        replace(side, weights=weights_of(model))
        for side, model in ((target, case.target), (source, case.planted.model))
    ]
    shares = {}
    for name, sides in {"features": (target, source), "weights": by_weights}.items():
        _, inner = match_neurons(*sides, pairs)
        hits = []
        for (layer, key), correspondence in inner.items():
            origin = case.planted.origin[case.planted.source_layer(layer), key]
            hits += (origin[correspondence.columns] == correspondence.rows).tolist()
        shares[name] = sum(hits) / len(hits)
    assert shares["weights"] == 1.0
    assert shares["features"] < 0.5


@pytest.mark.parametrize("family", PLANTED_FAMILIES)
def test_embeddings_find_the_stream_where_no_activation_says_anything(family):
    """As of a target whose training has spoilt all that it does, and has hardly turned its weights."""
    case = planted_case(family)
    generator = torch.Generator().manual_seed(0)
    sides, embedded = [], []
    for model, features in ((case.target, case.target_features), (case.planted.model, case.source_features)):
        noise = {place: torch.randn(seen.shape, generator=generator) for place, seen in features.items()}
        side = replace(side_of(model, noise), weights=weights_of(model))
        sides.append(side)
        embedded.append(replace(side, embedding=lambda model=model: model.get_input_embeddings().weight.detach()))

    def share(structure):
        hits = []
        for (layer, key), found in {**structure.inner, (0, "qkv.pre"): structure.stream}.items():
            if (layer, key) != (0, "qkv.pre") and structure.pairs[layer] != case.source_layers[layer]:
                hits += [False] * found.shape[0]
                continue
            origin = case.planted.origin[case.planted.source_layer(layer), key]
            hits += (origin[found.columns] == found.rows).tolist()
        return sum(hits) / len(hits)

    structure = find_structure(*embedded, case.keys)
    assert structure.agreement.clear and structure.pairs == dict(enumerate(case.source_layers))
    assert share(structure) == 1.0
    blind = find_structure(*sides, case.keys)
    assert not blind.agreement.clear and share(blind) < 0.5


def test_weights_that_have_nothing_in_common_leave_activations_their_say():
    case = planted_case("llama")
    generator = torch.Generator().manual_seed(0)

    def noise(model):
        read = weights_of(model)
        return lambda layer, name: torch.randn(read(layer, name).shape, generator=generator)

    target, source = (
        replace(side_of(model, features), weights=noise(model))
        for model, features in ((case.target, case.target_features), (case.planted.model, case.source_features))
    )
    pairs = compare_layers(target, source, case.keys).pairs
    stream, inner = match_neurons(target, source, pairs)
    for (layer, key), correspondence in {**inner, (0, "qkv.pre"): stream}.items():
        origin = case.planted.origin[case.planted.source_layer(layer), key]
        assert (origin[correspondence.columns] == correspondence.rows).float().mean() > 0.97, (layer, key)


def test_a_projection_counts_where_both_its_sides_are_known():
    """Every projection has a side on the stream and one within its layer: together they say all of a layer."""
    sides = {name: {feature_key(name, "pre"), feature_key(name, "post")} for name in PROJECTIONS}
    assert all(len(keys & set(STREAM_KEYS)) == 1 for keys in sides.values())
