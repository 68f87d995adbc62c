"""Neurons matched by their weights: cosines as a plain loop has them, and what they find where activations cannot."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch

from tests.planted import PLANTED_FAMILIES, planted_case, side_of
from tmerge.models import PROJECTIONS, describe, feature_key
from tmerge.transport import STREAM_KEYS, Correspondence, match, pair_layers, solve_structure
from tmerge.transport.agreement import weight_rows


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
    names = list(shapes)
    rows_of = partial(weight_rows, projections=names, target=target.__getitem__, source=source.__getitem__)
    mine, theirs = rows_of("up.post", matched=dict.fromkeys(STREAM_KEYS, stream))
    found = mine @ theirs.T
    for neuron in range(7):
        for other in range(11):
            mine, theirs = target["up"][neuron].double(), torch.zeros(5, dtype=torch.float64)
            for row, column, value in zip(rows.tolist(), columns.tolist(), stream.values.tolist(), strict=True):
                theirs[row] += value * source["up"][other, column].double()
            expected = mine @ theirs / mine.norm() / theirs.norm()
            assert float(found[neuron, other]) == pytest.approx(float(expected), abs=1e-6)
    units = match(torch.randn(7, 11, generator=generator))
    assert len(units.rows) == 7
    mine, theirs = rows_of("mlp.pre", matched={"gate.post": units, "up.post": units})
    found = mine @ theirs.T
    order = units.columns[units.rows.argsort()]
    for neuron in range(5):
        for other in range(8):
            mine = torch.cat([target[name][:, neuron] for name in ("gate", "up")]).double()
            theirs = torch.cat([source[name][order, other] for name in ("gate", "up")]).double()
            expected = mine @ theirs / mine.norm() / theirs.norm()
            assert float(found[neuron, other]) == pytest.approx(float(expected), abs=1e-6)
    assert rows_of("q.post", matched=dict.fromkeys(STREAM_KEYS, stream)) is None
    assert rows_of("up.post", matched={}) is None


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
        _, inner = solve_structure(*sides, pairs)
        hits = []
        for (layer, key), correspondence in inner.items():
            origin = case.planted.origin[case.planted.source_layer(layer), key]
            hits += (origin[correspondence.columns] == correspondence.rows).tolist()
        shares[name] = sum(hits) / len(hits)
    assert shares["weights"] == 1.0
    assert shares["features"] < 0.5


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
    pairs, _, _ = pair_layers(target, source, case.keys)
    stream, inner = solve_structure(target, source, pairs)
    for (layer, key), correspondence in {**inner, (0, "qkv.pre"): stream}.items():
        origin = case.planted.origin[case.planted.source_layer(layer), key]
        assert (origin[correspondence.columns] == correspondence.rows).float().mean() > 0.97, (layer, key)


def test_a_projection_counts_where_both_its_sides_are_known():
    """Every projection has a side on the stream and one within its layer: together they say all of a layer."""
    sides = {name: {feature_key(name, "pre"), feature_key(name, "post")} for name in PROJECTIONS}
    assert all(len(keys & set(STREAM_KEYS)) == 1 for keys in sides.values())
