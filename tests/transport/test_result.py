"""Whatever solved it, a transport is of one type, answers alike, and is read back from its record as it was."""

from __future__ import annotations

from dataclasses import fields

import pytest
import torch

from tests.planted import planted_case, side_of
from tmerge.models import describe, feature_key
from tmerge.recipe import Apart, Shared
from tmerge.transport import (
    PlanRecorder,
    Side,
    Transport,
    TransportRecord,
    one_thread_each,
    recorded_transport,
    solve_apart,
    solve_shared,
)

_SETTINGS = {
    "apart": Apart(layers_kept=2, entries_kept=4),
    "fitted": Apart(layers_kept=2, map="procrustes"),
    "shared": Shared(),
    "shared, entropic": Shared(matching="entropic", epsilon=0.1),
}
roads = pytest.mark.parametrize("road", _SETTINGS)
_PROJECTIONS = ("q", "v", "o", "down")


def _sides() -> tuple[Side, Side]:
    case = planted_case("llama")
    return side_of(case.target, case.target_features), side_of(case.planted.model, case.source_features)


@pytest.fixture(scope="module")
def solved(tmp_path_factory):
    """Road -> its transport, and that transport read back from its record."""
    found = {}
    for road, settings in _SETTINGS.items():
        path = tmp_path_factory.mktemp("run") / "solved.safetensors"
        solve = solve_shared if isinstance(settings, Shared) else solve_apart
        with one_thread_each():
            transport = solve(*_sides(), _PROJECTIONS, settings, path)
        recorder = PlanRecorder(transport)
        for layer in transport.target_layers:
            recorder.add(recorder.part(transport.feature_maps(layer).values()))
        facts = {"projections": _PROJECTIONS, "keys": list(transport.layers), "structure": transport.structure}
        record = path.with_name("transport.safetensors")
        TransportRecord(facts, recorder.tensors() | {"neurons.q": torch.arange(3)}).save(record)
        again = recorded_transport(
            TransportRecord.load(record),
            _PROJECTIONS,
            eta=transport.eta,
            layer_plans_converged=transport.layer_plans_converged,
        )
        found[road] = transport, again
    return found


def _same(one, other):
    """Dataclasses of tensors and of plain values."""
    for field in fields(one):
        mine, theirs = getattr(one, field.name), getattr(other, field.name)
        assert mine.equal(theirs) if isinstance(mine, torch.Tensor) else mine == theirs, field.name


@roads
def test_gathered_in_a_folder_the_record_is_the_same(solved, road, tmp_path):
    transport, _ = solved[road]
    found = []
    for recorder in (PlanRecorder(transport), PlanRecorder(transport, tmp_path)):
        for layer in transport.target_layers:
            recorder.add(recorder.part(transport.feature_maps(layer).values()))
        found.append(recorder.tensors())
    held, gathered = found
    assert held.keys() == gathered.keys() and any(tmp_path.iterdir())
    for name, tensor in held.items():
        assert tensor.dtype == gathered[name].dtype and tensor.equal(gathered[name]), name


@roads
def test_it_is_read_back_as_the_same_type(solved, road):
    transport, again = solved[road]
    assert type(transport) is type(again) is Transport
    assert (again.structure, again.eta, again.layer_plans_converged) == (
        transport.structure,
        transport.eta,
        transport.layer_plans_converged,
    )
    for name in ("layers", "layer_maps"):
        mine, theirs = getattr(transport, name), getattr(again, name)
        assert list(mine) == list(theirs)
        for key in mine:
            _same(mine[key], theirs[key])
    for role in ("target", "source"):
        mine, theirs = getattr(transport.statistics, role), getattr(again.statistics, role)
        assert mine.keys() == theirs.keys() and mine
        for place in mine:
            _same(mine[place], theirs[place])


@roads
def test_a_layers_maps_are_those_of_its_projections_and_come_back_within_16_bits(solved, road):
    transport, again = solved[road]
    case = planted_case("llama")
    for layer in transport.target_layers:
        maps, recorded = transport.feature_maps(layer), again.feature_maps(layer)
        wanted = {
            (feature_key(name, side), other)
            for name in transport.projections_of(layer)
            for other in transport.layer_maps[name].sources(layer)
            for side in ("pre", "post")
        }
        assert maps.keys() == recorded.keys() == wanted
        for (key, other), found in maps.items():
            assert (found.key, found.target_layer, found.source_layer) == (key, layer, other)
            n, m = case.target_features[layer, key].shape[1], case.source_features[other, key].shape[1]
            phi_out, phi_in = found.phi_out("barycentric"), found.phi_in("barycentric")
            assert phi_out.shape == (n, m) and phi_in.shape == (m, n)
            single = transport.feature_map(layer, key, other).phi_out("barycentric")
            assert single.to_dense().equal(phi_out.to_dense())
            if found.fitted is not None:
                continue  # what is recorded of it are its plans
            # Eleven bits of every entry, and of the sum that it is divided by.
            back = recorded[key, other]
            for got, mine in ((back.phi_out("barycentric"), phi_out), (back.phi_in("barycentric"), phi_in)):
                torch.testing.assert_close(got.to_dense(), mine.to_dense(), rtol=2e-3, atol=1e-6)


@roads
def test_what_is_recorded_of_a_recorded_one_is_what_was_recorded(solved, road):
    _, again = solved[road]
    recorder = PlanRecorder(again)
    for layer in again.target_layers:
        recorder.add(recorder.part(again.feature_maps(layer).values()))
    kept = recorder.tensors()
    assert kept.keys() == again.recorded.keys() and not [name for name in kept if name.startswith("neurons.")]
    assert all(kept[name].equal(tensor) for name, tensor in again.recorded.items())


def test_maps_say_whether_an_empty_row_means_no_counterpart(solved):
    assert {road: pair[0].matched for road, pair in solved.items()} == {
        "apart": False,
        "fitted": False,
        "shared": True,
        "shared, entropic": True,
    }
    for road in ("apart", "shared"):
        transport, again = solved[road]
        assert again.matched == transport.matched
    assert solved["apart"][0].pairs is None and list(solved["shared"][0].pairs) == [0, 1, 2, 3]


def test_layers_have_the_projections_that_are_carried(solved):
    transport, _ = solved["apart"]
    described = describe(planted_case("llama").target)
    for layer, views in enumerate(described.layers):
        assert transport.projections_of(layer) == [name for name in _PROJECTIONS if name in views]
    assert transport.projections_of(99) == []
