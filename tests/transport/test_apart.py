"""Which source layers feed which target layers, projection by projection."""

from __future__ import annotations

import pytest
import torch

from tests.pico import pico_model
from tests.planted import pooled_features
from tmerge.fusion import carry, fuse
from tmerge.models import describe
from tmerge.recipe import Apart, Weights
from tmerge.transport import apart_transport, effective_weights, layer_plans, solve_features


def _features(family, **options):
    model = pico_model(family, **options)
    tokens = torch.randint(3, 384, (60, 8), generator=torch.Generator().manual_seed(0))
    return model, pooled_features(model, tokens)


def _solve(target, source):
    """Plans of every feature key, over the layers that have it on each side."""
    keys = list(dict.fromkeys(key for _, key in target))
    layers = [{key: [layer for layer, other in side if other == key] for key in keys} for side in (target, source)]
    return {
        key: solve_features(
            key,
            lambda layer, key=key: target[layer, key],
            lambda layer, key=key: source[layer, key],
            layers[0][key],
            layers[1][key],
            epsilon=0.1,
        )
        for key in keys
    }


def _transport(plans, target, source, projections, settings):
    reads = (lambda layer, key, of=of: of[layer, key] for of in (target, source))
    return apart_transport(plans, *reads, projections, settings)


def test_every_projection_is_coupled_by_its_own_two_sides():
    (target, mine), (_, theirs) = _features("llama"), _features("qwen2", layers=3, seed=1)
    plans, settings = _solve(mine, theirs), Apart(layers_kept=2)
    layers = layer_plans(plans, settings)
    coupled = _transport(plans, mine, theirs, describe(target).names, settings).layer_maps
    sides = {"q": ("qkv.pre", "q.post"), "o": ("o.pre", "o.post"), "gate": ("mlp.pre", "gate.post")}
    for name, (pre, post) in sides.items():
        coupling = coupled[name]
        assert (coupling.target_layers, coupling.source_layers) == ((0, 1), (0, 1, 2))
        assert coupling.effective.equal(effective_weights(layers[pre].plan, layers[post].plan))
        assert coupling.kept.shape == coupling.weights.shape == (2, 2)


@pytest.mark.slow
@pytest.mark.parametrize("source_family", ["llama", "gemma3n"])
def test_layers_that_reuse_keys_and_values_are_coupled_without_them(source_family):
    """gemma3n has a q in every layer; its last two layers read the keys and values of earlier ones."""
    (target, mine), (source, theirs) = _features("gemma3n"), _features(source_family, layers=4, seed=1)
    described = describe(target)
    assert ["k" in layer for layer in described.layers] == [True, True, False, False]
    plans, settings = _solve(mine, theirs), Apart(layers_kept=2)
    layers = layer_plans(plans, settings)
    transport = _transport(plans, mine, theirs, described.names, settings)
    coupled = transport.layer_maps
    with_keys = (0, 1) if source_family == "gemma3n" else (0, 1, 2, 3)
    assert coupled["q"].target_layers == coupled["q"].source_layers == (0, 1, 2, 3)
    assert (coupled["k"].target_layers, coupled["k"].source_layers) == ((0, 1), with_keys)
    assert coupled["k"].effective.shape == (2, len(with_keys))
    entering = layers["qkv.pre"].plan[:2, : len(with_keys)]
    expected = effective_weights(entering / entering.sum(), layers["k.post"].plan)
    torch.testing.assert_close(coupled["k"].effective, expected)
    # And the whole way through.
    fusion = Weights(alpha=0.5, top_k=4, projections=tuple(described.names))
    carried = carry(described, describe(source), transport, fusion)
    assert [item.layer for item in carried.transported if item.projection == "v"] == [0, 1]
    assert [item.layer for item in carried.transported if item.projection == "q"] == [0, 1, 2, 3]
    before = described.layers[3]["q"].weight().clone()
    fuse(described.layers, carried.transported, 0.5)
    assert not described.layers[3]["q"].weight().equal(before)
