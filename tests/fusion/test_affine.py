"""Affine maps, on planted models: what they keep, and what they say of a task vector."""

from __future__ import annotations

import copy

import pytest

from tests.fusion.test_structured import _carry, _found, _learned, _weights
from tests.planted import PLANTED_BIASED, planted_case, pooled_features
from tmerge.fusion import fuse
from tmerge.models import describe, feature_key

_biased = pytest.mark.parametrize("family", PLANTED_BIASED)


@_biased
def test_affine_weights_leave_the_mean_of_what_a_projection_gives(family):
    """As measured, not as computed: mean inputs through the fused projection give the target's mean outputs."""
    case, structure = planted_case(family), _weights(family)[0]
    features = case.target_features, case.source_features
    errors = {}
    for affine in (True, False):
        fusion = {"alpha": 1.0, "affine": affine}
        carried, _ = _carry(case.target, case.planted.model, structure, features, fusion)
        merged = copy.deepcopy(case.target)
        fuse(describe(merged).layers, carried.transported, 1.0)
        for layer, views in enumerate(describe(merged).layers):
            for name, view in views.items():
                if view.has_bias:
                    entering, leaving = (
                        case.target_features[layer, feature_key(name, side)].double().mean(0)
                        for side in ("pre", "post")
                    )
                    got = view.weight().double() @ entering + view.bias().double()
                    errors.setdefault(affine, []).append(float((got - leaving).norm() / leaving.norm()))
    assert max(errors[True]) < 1e-5, max(errors[True])
    assert max(errors[False]) > 1e-2


@_biased
def test_an_affine_task_vector_is_held_against_the_model_that_learned(family):
    """In F's own coordinates, where nothing has to be carried: D_b + D_W (mean of what learned - mean of F)."""
    original, learned, base, source = _learned(family)
    structure, features = _found(family)
    fusion = {"what": "task-vector", "alpha": 1.0, "affine": True}
    carried, _ = _carry(original, source.model, structure, features, fusion, source_base=base.model)
    means = pooled_features(learned, planted_case(family).tokens)
    before, after = describe(original).layers, describe(learned).layers
    seen = set()
    for item in carried.transported:
        old, new = before[item.layer][item.projection], after[item.layer][item.projection]
        if not old.has_bias:
            assert item.bias is None
            continue
        seen.add(item.projection)
        key = feature_key(item.projection, "pre")
        theirs, mine = means[item.layer, key].double().mean(0), features[0][item.layer, key].double().mean(0)
        wanted = new.bias() - old.bias() + (new.weight() - old.weight()).double() @ (theirs - mine)
        error = float((item.bias - wanted).norm() / wanted.norm())
        assert error < 1e-4, f"{item.projection} of layer {item.layer}: {error:.1e}"
    assert seen == ({"q", "k", "v"} if family == "qwen2" else {"q", "k", "v", "o", "up", "down"})


def test_an_affine_map_needs_a_bias_to_write_into():
    case, structure = planted_case("llama"), _weights("llama")[0]
    features = case.target_features, case.source_features
    carried, _ = _carry(case.target, case.planted.model, structure, features, {"alpha": 1.0, "affine": True})
    assert set(carried.biases.values()) == {"left alone: the target has none for an affine map's"}
    assert all(item.bias is None for item in carried.transported)
