"""Sparse maps do what the dense ones of the same correspondence do."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.fusion.test_structured import _carry, _found, _learned, _weights, families
from tests.planted import planted_case
from tmerge.fusion import transport_neurons
from tmerge.fusion.maps import after, scaled, unmatched
from tmerge.transport import Correspondence, mass_of_top, mutual_top, phi_in, phi_out, shared_transport, sparsify
from tmerge.transport.sparse import sparse_plan

_property = settings(max_examples=50, deadline=None, derandomize=True)
_sizes, _seeds = st.integers(1, 9), st.integers(0, 2**31)


def _correspondence(n, m, seed):
    """Signed entries at random places, some rows and columns without one; at least one in all."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(n, m, generator=generator) * (torch.rand(n, m, generator=generator) < 0.3)
    values[0, 0] = 1.0
    return Correspondence.of(values)


def _dense(found, kept=1000):
    plan = found.dense() / found.shape[0]
    return plan, (plan != 0) & mutual_top(plan.abs(), kept)


@_property
@given(_sizes, _sizes, _seeds, st.sampled_from(["barycentric", "literal"]))
def test_maps(n, m, seed, scale):
    found = _correspondence(n, m, seed)
    plan, (whole, mask) = sparse_plan(found, 1000), _dense(found)
    for build in (phi_out, phi_in):
        got = build(plan, scale=scale, kept=1000, partial=True)
        wanted = build(whole, scale=scale, kept=1000, mask=mask, partial=True)
        assert got.is_sparse and not wanted.is_sparse
        torch.testing.assert_close(got.to_dense(), wanted, rtol=1e-6, atol=0)
        for dim in (0, 1):
            assert unmatched(got, dim).equal(unmatched(wanted, dim))
            order = torch.randperm(got.shape[dim])
            assert unmatched(got.index_select(dim, order), dim).equal(unmatched(wanted, dim)[order])
        a, b = torch.rand(got.shape[0]), torch.rand(got.shape[1])
        torch.testing.assert_close(scaled(got, a, b).to_dense(), scaled(wanted, a, b), rtol=1e-6, atol=0)


@_property
@given(_sizes, _sizes, _sizes, _sizes, _seeds, st.sampled_from(["up", "down"]))
def test_transported_neurons(out, out_source, into, into_source, seed, projection):
    generator = torch.Generator().manual_seed(seed)
    post, pre = _correspondence(out, out_source, seed), _correspondence(into, into_source, seed + 1)
    weight, bias = torch.randn(out_source, into_source, generator=generator), torch.randn(out_source)
    neurons = torch.arange(0, into if projection == "down" else out, 2)
    results = []
    for sparse in (True, False):
        one, two = ((sparse_plan(found, 1000), None) if sparse else _dense(found) for found in (post, pre))
        maps = [
            build(plan, scale="barycentric", kept=1000, mask=mask, partial=True)
            for build, (plan, mask) in ((phi_out, one), (phi_in, two))
        ]
        results.append(transport_neurons(weight, bias, *maps, projection, neurons))
    for got, wanted in zip(*results, strict=True):
        assert not got.is_sparse and got.is_contiguous()
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-6)


@_property
@given(_sizes, _sizes, _seeds)
def test_what_is_recorded(n, m, seed):
    found = _correspondence(n, m, seed)
    plan, (whole, mask) = sparse_plan(found, 1000), _dense(found)
    assert sparsify([plan], [None]).dense(0).equal(sparsify([whole], [mask]).dense(0))
    sparse = sparsify([whole, plan], [mask, None])
    for index in (0, 1):
        assert sparse.sparse(index).to_dense().equal(sparse.dense(index))
    # Rows without an entry have no mass to share out.
    filled = (whole != 0).any(1)
    if filled.all():
        torch.testing.assert_close(mass_of_top(plan), mass_of_top(whole))


def test_entries_that_would_not_survive_take_the_dense_way():
    found = Correspondence.of(torch.tensor([[0.7, 0.2, 0.1], [0.0, 1.0, 0.0]]))
    assert sparse_plan(found, 3) is not None
    assert sparse_plan(found, 2) is None


def _dense_transport(*words):
    """As plans were before there were sparse ones."""
    transport = shared_transport(*words)

    def build(layer, wanted):
        maps = transport.build(layer, wanted)
        for place, found in maps.items():
            plan = found.plan.to_dense()
            maps[place] = replace(found, plan=plan, survives=(plan != 0) & mutual_top(plan.abs(), 128))
        return maps

    return replace(transport, build=build)


@families
@pytest.mark.parametrize("what", ["weights", "task-vector"])
def test_a_merge(family, what, monkeypatch):
    """Everything that is carried, permuted controls, units, biases and the stream included."""

    def shuffle(layer, key, neurons):
        return torch.randperm(neurons, generator=torch.Generator().manual_seed(neurons))

    def carried():
        if what == "weights":
            case = planted_case(family)
            features = case.target_features, case.source_features
            fusion = {"alpha": 1.0, "units": "layer"}
            return _carry(case.target, case.planted.model, _weights(family)[0], features, fusion, shuffle=shuffle)[0]
        original, _, base, source = _learned(family)
        fusion = {"what": "task-vector", "alpha": 1.0, "stream": True}
        found = _found(family)
        options = {"source_base": base.model, "vocabulary": torch.arange(384).repeat(2, 1), "shuffle": shuffle}
        return _carry(original, source.model, *found, fusion, **options)[0]

    sparse = carried()
    monkeypatch.setattr("tests.fusion.test_structured.shared_transport", _dense_transport)
    dense = carried()
    assert len(sparse.transported) == len(dense.transported) and sparse.biases == dense.biases
    for name in ("transported", "permuted"):
        for got, wanted in zip(getattr(sparse, name), getattr(dense, name), strict=True):
            torch.testing.assert_close(got.weight, wanted.weight, rtol=1e-5, atol=1e-7)
            assert (got.bias is None) == (wanted.bias is None)
            if got.bias is not None:
                torch.testing.assert_close(got.bias, wanted.bias, rtol=1e-5, atol=1e-7)


def test_products_with_bias_vectors():
    found = _correspondence(4, 6, 0)
    plan, (whole, _) = sparse_plan(found, 1000), _dense(found)
    vector, weight = torch.rand(6), torch.rand(3, 4)
    torch.testing.assert_close(plan @ vector, whole @ vector)
    torch.testing.assert_close(after(weight, plan), weight @ whole)
