"""One correspondence for a whole model, on planted models: every layer, head, rotary pair and neuron is known.

What a merge through it gives back is in tests/fusion/test_structured.py.
"""

from __future__ import annotations

import copy
import weakref
from dataclasses import replace
from functools import cache

import pytest
import torch

from tests.planted import PLANTED_FAMILIES, PLANTED_LAYERS, planted_case, pooled_features, side_of
from tests.transport.reference import feature_pair
from tmerge.errors import Cancelled, TransportError
from tmerge.models import describe
from tmerge.transport import (
    STREAM_KEYS,
    Side,
    Solver,
    Structure,
    compare_layers,
    find_structure,
    match_neurons,
    one_thread_each,
)
from tmerge.transport import layers as layers_module
from tmerge.transport.layers import sampled

families = pytest.mark.parametrize("family", PLANTED_FAMILIES)


@cache
def sides(family):
    case = planted_case(family)
    return side_of(case.target, case.target_features), side_of(case.planted.model, case.source_features)


@cache
def solved(family, epsilon=None):
    with one_thread_each():
        target, source = sides(family)
        return find_structure(target, source, planted_case(family).keys, Solver(epsilon))


def _planted(case, layer, key):
    """(n, n') the true correspondence: one at every copy."""
    origin = case.planted.origin[case.planted.source_layer(layer), key]
    return (origin == torch.arange(case.target_features[layer, key].shape[1]).unsqueeze(1)).float()


# -- layers --------------------------------------------------------------------------------------------------------


@families
def test_layers_are_found_exactly(family):
    case = planted_case(family)
    structure = solved(family)
    assert structure.pairs == dict(enumerate(case.source_layers))
    depth = len(case.planted.layers)
    for key in case.keys:
        assert structure.layers[key] == (tuple(range(PLANTED_LAYERS)), tuple(range(depth)))
        cost = structure.cost[key]
        # Correlations in float32 may come out a little over one.
        assert cost.shape == (PLANTED_LAYERS, depth) and (cost > -1e-5).all() and (cost <= 1).all()


@families
def test_every_key_alone_finds_the_layers_too(family):
    """But for what enters an inserted layer, which is what enters the next one as well."""
    target, source = sides(family)
    case = planted_case(family)
    twins = {"qkv.pre", "mlp.pre"} if family == "gpt_neox" else {"qkv.pre"}
    for key in set(case.keys) - twins:
        layers = compare_layers(target, source, [key])
        assert list(layers.pairs.values()) == case.source_layers, key
        assert list(layers.cost) == list(layers.compared) == [key]


def test_layers_without_a_feature_are_passed_over_and_every_row_is_told():
    """As where some layers are of experts: they are paired by what else they have."""
    case = planted_case("llama")
    target, source = sides("llama")
    lacking = {0: case.keys, 1: [key for key in case.keys if not key.startswith(("mlp", "gate", "up", "down"))]}
    keys = {layer: lacking.get(layer, case.keys) for layer in target.keys}
    told = []
    found = compare_layers(
        Side(target.read, keys, target.heads), source, case.keys, solved=lambda *row: told.append(row)
    )
    cost, layers = found.cost, found.compared
    assert list(found.pairs.values()) == case.source_layers
    assert layers["up.post"][0] == (0, 2, 3) and cost["up.post"].shape[0] == 3
    assert [(key, layer) for key, layer, _ in told] == [(key, layer) for key in case.keys for layer in layers[key][0]]
    assert all(row.equal(cost[key][layers[key][0].index(layer)]) for key, layer, row in told)


def test_a_deep_source_is_read_in_parts(monkeypatch):
    case = planted_case("llama")
    target, source = sides("llama")
    whole = compare_layers(target, source, case.keys)
    samples, most, told = [], [], []

    def read(layer, key):
        most.append(sum(sample() is not None for sample in samples))
        return source.read(layer, key)

    def noted(features, **more):
        sample = sampled(features, **more)
        if not more:  # a source's
            samples.append(weakref.ref(sample))
        return sample

    monkeypatch.setattr(layers_module, "_HELD", 1)
    monkeypatch.setattr(layers_module, "sampled", noted)
    parts = compare_layers(target, replace(source, read=read), case.keys, solved=lambda *row: told.append(row))
    assert max(most) == 0 and len(most) == len(case.keys) * len(source.keys)
    assert parts.alike.equal(whole.alike) and all(parts.cost[key].equal(whole.cost[key]) for key in case.keys)
    assert len(told) == len(case.keys) * PLANTED_LAYERS
    assert all(row.equal(parts.cost[key][layer]) for key, layer, row in told)


# -- neurons -------------------------------------------------------------------------------------------------------


@families
def test_every_correspondence_is_the_planted_one(family):
    case, structure = planted_case(family), solved(family)
    for layer in range(PLANTED_LAYERS):
        for key in case.keys:
            assert structure.of(layer, key).dense().equal(_planted(case, layer, key)), f"{key} of layer {layer}"
    assert all(problem.iterations == 0 for problem in structure.problems)


@families
def test_with_eps_the_largest_entries_are_the_planted_ones(family):
    case, structure = planted_case(family), solved(family, 0.01)
    for layer in range(PLANTED_LAYERS):
        for key in case.keys:
            plan, planted = structure.of(layer, key).dense(), _planted(case, layer, key)
            assert planted[torch.arange(len(plan)), plan.argmax(1)].all(), f"{key} of layer {layer}"
            assert plan.argmax(0).equal(planted.argmax(0)), f"{key} of layer {layer}"
    assert max(problem.marginal_error for problem in structure.problems) <= 1e-6
    assert structure.stream.iterations > 0


@families
def test_heads_stay_whole_and_rotary_pairs_keep_their_frequency(family):
    case, structure = planted_case(family), solved(family)
    target, source = sides(family)
    for layer, other in structure.pairs.items():
        mine, theirs = target.heads[layer], source.heads[other]
        for key in ("q.post", "o.pre"):
            plan = structure.of(layer, key).dense().reshape(mine.heads, mine.head_dim, theirs.heads, theirs.head_dim)
            heads = plan.sum(3)  # (target head, its dimension, source head)
            assert (heads == heads[:, :1]).all(), f"{key} of layer {layer}: rows of a head come from several"
            copies = PLANTED_FAMILIES[family][1]
            assert (heads[:, 0].sum(1) == copies).all()
        plan = structure.of(layer, "k.post").dense().reshape(mine.kv_heads, mine.head_dim, -1, theirs.head_dim)
        dims = plan.sum(2)[0] > 0  # (dimension, dimension') of the first kv head
        for index, pair in enumerate(mine.pairs.tolist()):
            partners = [int(dims[dimension].nonzero()) for dimension in pair]
            assert mine.frequencies[index] == theirs.frequencies[theirs.pairs.tolist().index(partners)]
        assert case.planted.origin[other, "q.post"].shape == (theirs.heads * theirs.head_dim,)


@families
def test_fewer_features_find_the_same_of_what_is_there(family):
    """A recipe may ask for few projections; then only their features are read."""
    case = planted_case(family)
    target, source = sides(family)
    # Keys alone do not tell apart what o reads: query heads that share a kv head write nearly the same.
    for keys in (["qkv.pre", "q.post", "k.post"], ["v.post", "o.pre", "o.post"], ["mlp.pre", "up.post"], ["down.post"]):
        few = [Side(side.read, {layer: keys for layer in side.keys}, side.heads) for side in (target, source)]
        stream, inner = match_neurons(*few, solved(family).pairs)
        assert {key for _, key in inner} == set(keys) - set(STREAM_KEYS)
        for layer in range(PLANTED_LAYERS):
            for key in keys:
                found = stream if key in STREAM_KEYS else inner[layer, key]
                assert found.dense().equal(_planted(case, layer, key)), f"{key} of layer {layer}"


# -- signs ---------------------------------------------------------------------------------------------------------


def _negated(model, generator):
    """The same function with signs turned, and by feature key of each layer what turned them.

    A neuron of the stream in all that writes and reads it, a dimension of v in the columns of o, and an MLP neuron in
    up and down. RMSNorm does not see it; the gate's activation would.
    """
    turned = copy.deepcopy(model)
    architecture = describe(turned)

    def draw(n):
        return 2.0 * torch.randint(0, 2, (n,), generator=generator).double() - 1

    stream, signs = draw(architecture.hidden_size), {}
    for layer, views in enumerate(architecture.layers):
        heads = architecture.attention[layer]
        group = heads.heads // heads.kv_heads
        value, mlp = draw(heads.kv_heads * heads.head_dim), draw(views["up"].out_features)
        written = value.reshape(heads.kv_heads, 1, -1).expand(-1, group, -1).flatten()
        of = {"v": (stream, value), "o": (written, stream), "up": (stream, mlp), "down": (mlp, stream)}
        for name, view in views.items():
            columns, rows = of.get(name, (stream, torch.ones(view.out_features).double()))
            view.write(rows.unsqueeze(1) * view.weight() * columns)
        signs |= {(layer, "v.post"): value, (layer, "o.pre"): written}
        signs |= dict.fromkeys([(layer, key) for key in STREAM_KEYS], stream)
        signs |= dict.fromkeys([(layer, key) for key in ("up.post", "down.pre")], mlp)
    with torch.no_grad():
        for embedding in (turned.get_input_embeddings(), turned.get_output_embeddings()):
            embedding.weight.mul_(stream)
    return turned, signs


def test_neurons_that_are_negated_are_found_where_signs_are_asked_for():
    case = planted_case("llama")
    target, source = sides("llama")
    model, signs = _negated(case.planted.model, torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(
            model(case.tokens[:20]).logits, case.planted.model(case.tokens[:20]).logits, rtol=0, atol=1e-6
        )
    turned = side_of(model, pooled_features(model, case.tokens))
    with one_thread_each():
        pairs = compare_layers(target, turned, case.keys).pairs
        # By what has no sign: q, k and the gate.
        assert pairs == solved("llama").pairs
        stream, inner = match_neurons(target, turned, pairs, Solver(signed=True))
        plain, plain_inner = match_neurons(target, turned, pairs)
    for layer, other in pairs.items():
        for key in case.keys:
            found = stream if key in STREAM_KEYS else inner[layer, key]
            sign = signs.get((other, key), torch.ones(1)).float()
            assert found.dense().equal(_planted(case, layer, key) * sign), f"{key} of layer {layer}"
        assert not plain_inner[layer, "o.pre"].dense().equal(_planted(case, layer, "o.pre"))
    assert not plain.dense().equal(_planted(case, 0, "qkv.pre"))
    # Asked for in vain, signs do no harm.
    stream, inner = match_neurons(target, source, pairs, Solver(signed=True))
    assert stream.dense().equal(solved("llama").stream.dense())
    assert all(item.dense().equal(solved("llama").inner[place].dense()) for place, item in inner.items())


# -- what is kept, and what is refused -----------------------------------------------------------------------------


@pytest.mark.parametrize("epsilon", [None, 0.01])
def test_a_structure_comes_back_as_it_was_saved(epsilon, tmp_path):
    structure = solved("qwen2", epsilon)
    structure.save(tmp_path / "structure.safetensors")
    assert [path.name for path in tmp_path.iterdir()] == ["structure.safetensors"]
    loaded = Structure.load(tmp_path / "structure.safetensors")
    assert loaded.pairs == structure.pairs and loaded.layers == structure.layers
    assert list(loaded.cost) == list(structure.cost)
    assert all(loaded.cost[key].equal(cost) for key, cost in structure.cost.items())
    assert list(loaded.inner) == list(structure.inner)
    for got, wanted in zip(loaded.problems, structure.problems, strict=True):
        for field in ("rows", "columns", "values"):
            assert getattr(got, field).equal(getattr(wanted, field))
        assert got.shape == wanted.shape and got.iterations == wanted.iterations
        assert got.marginal_error == wanted.marginal_error


def _side(features):
    keys: dict[int, list[str]] = {}
    for layer, key in features:
        keys.setdefault(layer, []).append(key)
    return Side(lambda layer, key: features[layer, key], keys, {})


def test_attention_whose_heads_are_not_known_is_matched_neuron_by_neuron():
    target, source = feature_pair("copies", 12, 12, seed=1)
    features = [{(0, "qkv.pre"): side, (0, "q.post"): side} for side in (target, source)]
    stream, inner = match_neurons(*map(_side, features), {0: 0})
    assert inner[0, "q.post"].dense().equal(stream.dense())


def test_streams_of_two_widths_are_refused():
    (narrow, wide), (more, _) = feature_pair("independent", 8, 10), feature_pair("independent", 9, 9)
    target = _side({(0, "qkv.pre"): narrow, (0, "o.post"): more})
    source = _side({(0, "qkv.pre"): wide, (0, "o.post"): wide})
    with pytest.raises(TransportError, match=r"^o\.post of layer 0 has \(9, 10\).*transport\.structure: none$"):
        match_neurons(target, source, {0: 0})


def test_models_without_a_stream_in_common_are_refused():
    one, other = feature_pair("independent", 8, 8)
    with pytest.raises(TransportError, match=r"residual stream; set transport\.structure: none"):
        match_neurons(_side({(0, "up.post"): one}), _side({(0, "up.post"): other}), {0: 0})


def test_it_stops_where_it_is_told():
    target, source = sides("gpt_neox")
    seen = []

    def progress(done, total):
        seen.append((done, total))
        if done == 2:
            raise Cancelled("stopped by the test")

    with pytest.raises(Cancelled):
        match_neurons(target, source, solved("gpt_neox").pairs, progress=progress)
    assert seen == [(1, PLANTED_LAYERS), (2, PLANTED_LAYERS)]
