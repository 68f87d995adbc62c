"""The planted test: a source built from F by surgery, a target that is F with 2 % noise, and F to be given back.

Measured: the largest relative error of a projection's weights over four layers after a dense merge (all neurons,
alpha 1, one source layer per target layer, barycentric, units none, 200 iterations, 400 random sequences of ten
tokens; F of width 64 and MLP 128, the source twice as wide and two layers deeper). Biases come out as their weights.

| family | projections | eps 0.1 | 0.05 | 0.03 | 0.01 | 0.005 |
|---|---|---|---|---|---|---|
| llama | q k v | 5e-2 | 9e-4 | 1e-5 | 3e-8 | 3e-8 |
| llama | gate up down | 9e-2 | 2e-3 | 5e-5 | 1e-10 | 1e-10 |
| llama | o | 0.4 | 0.2 | 6e-2 | 7e-4 | 2e-6 |
| qwen2 | q k v | 7e-2 | 1e-3 | 2e-5 | 3e-8 | 3e-8 |
| qwen2 | gate up down | 0.1 | 5e-3 | 3e-4 | 3e-10 | 1e-10 |
| qwen2 | o | 0.4 | 0.2 | 8e-2 | 1e-3 | 4e-6 |
| gpt_neox | q k v | 3e-2 | 8e-4 | 2e-5 | 3e-8 | 3e-8 |
| gpt_neox | up down | 7e-2 | 9e-4 | 8e-6 | 1e-10 | 1e-10 |
| gpt_neox | o | 4e-2 | 3e-4 | 2e-6 | 1e-10 | 1e-10 |

3e-8 is the float32 that transported weights are kept in; where it says 1e-10, F's own are float32 numbers.
o is worse where query heads share a kv head (llama, qwen2): they write nearly the same features. Other settings at
eps 0.005: units `feature` 1e-2 .. 3e-2, `layer` 5e-4 .. 7e-3; three source layers per target layer 0.3 .. 0.6 with
balanced layer marginals, 1e-4 .. 2e-2 with semi-relaxed ones.
"""

from __future__ import annotations

import copy
from functools import cache

import pytest
import torch
from torch import Tensor

from tests.planted import (
    PLANTED_FAMILIES,
    PLANTED_LAYERS,
    PLANTED_NOISE,
    PlantedCase,
    plant,
    planted_case,
    planted_model,
    relative_errors,
)
from tmerge.fusion import Carried, carry, fuse
from tmerge.models import describe
from tmerge.recipe import Apart, Weights
from tmerge.transport import (
    FeaturePlans,
    Transport,
    apart_transport,
    feature_plan,
    layer_maps,
    layer_plans,
    solve_features,
    standardise,
)


@cache
def _plans(family: str, epsilon: float) -> dict[str, FeaturePlans]:
    case = planted_case(family)
    depth = len(case.planted.layers)
    return {
        key: solve_features(
            key,
            lambda layer, key=key: case.target_features[layer, key],
            lambda layer, key=key: case.source_features[layer, key],
            range(PLANTED_LAYERS),
            range(depth),
            epsilon=epsilon,
        )
        for key in case.keys
    }


def _plan(case: PlantedCase, solved: FeaturePlans, layer: int, other: int) -> Tensor:
    mine = standardise(case.target_features[layer, solved.key], solved.f.dtype)
    theirs = standardise(case.source_features[other, solved.key], solved.f.dtype)
    return feature_plan(mine, theirs, solved.f[layer, other], solved.g[layer, other], solved.epsilon)


def _transport(family: str, projections: tuple[str, ...], settings: Apart) -> Transport:
    case = planted_case(family)
    return apart_transport(
        _plans(family, settings.epsilon),
        lambda layer, key: case.target_features[layer, key],
        lambda layer, key: case.source_features[layer, key],
        projections,
        settings,
    )


@cache
def _merge(
    family: str,
    epsilon: float,
    scale: str = "barycentric",
    units: str = "none",
    kept: int = 1,
    marginals: str = "balanced",
) -> tuple[torch.nn.Module, Carried]:
    """The target after a dense merge, and what was carried."""
    case = planted_case(family)
    merged = copy.deepcopy(case.target)
    mine, theirs = describe(merged), describe(case.planted.model)
    transport = Apart(epsilon=epsilon, layers_kept=kept, layer_marginals=marginals)
    fusion = Weights(alpha=1.0, scale=scale, units=units, top_k=1.0, projections=tuple(mine.names))
    carried = carry(mine, theirs, _transport(family, tuple(mine.names), transport), fusion)
    fuse(mine.layers, carried.transported, fusion.alpha)
    return merged, carried


# qwen2 differs from llama in its biases, which gpt_neox has too.
families = pytest.mark.parametrize(
    "family", [pytest.param(name, marks=[] if name == "llama" else [pytest.mark.slow]) for name in PLANTED_FAMILIES]
)


@families
def test_the_source_computes_what_f_computes(family):
    case = planted_case(family)
    with torch.no_grad():
        wanted = case.original(case.tokens[:100]).logits
        got = case.planted.model(case.tokens[:100]).logits
    assert wanted.std() > 0.3
    # RMSNorm works in float32 whatever the model's dtype, and sums twice as many squares in another order.
    tolerance = 1e-12 if family == "gpt_neox" else 2e-5
    torch.testing.assert_close(got, wanted, rtol=0, atol=tolerance)


@families
def test_every_feature_plan_recovers_the_planted_neurons(family):
    case = planted_case(family)
    for key, solved in _plans(family, 0.01).items():
        for layer, other in enumerate(case.source_layers):
            plan = _plan(case, solved, layer, other)
            origin = case.planted.origin[other, key]
            neurons = torch.arange(len(plan))
            assert origin[plan.argmax(1)].equal(neurons), f"{key}, layer {layer}: a row's largest entry is no copy"
            assert plan.argmax(0).equal(origin), f"{key}, layer {layer}: a column's largest entry is not its origin"


@families
def test_every_feature_plan_puts_nearly_all_mass_on_the_planted_neurons(family):
    case = planted_case(family)
    for key, solved in _plans(family, 0.01).items():
        for layer, other in enumerate(case.source_layers):
            plan = _plan(case, solved, layer, other)
            planted = case.planted.origin[other, key] == torch.arange(len(plan)).unsqueeze(1)
            # Query heads that share a kv head are alike in what they write (o.pre), the more mass is lost there.
            assert plan[planted].sum() / plan.sum() > (0.99 if key == "o.pre" else 0.9999), key


@families
@pytest.mark.parametrize("marginals", ["balanced", "semi-relaxed"])
@pytest.mark.parametrize("epsilon", [0.1, 0.01])
def test_the_layer_plan_finds_the_planted_layers(family, marginals, epsilon):
    case = planted_case(family)
    layers = layer_plans(_plans(family, epsilon), Apart(layer_marginals=marginals))
    # An inserted layer reads the very stream that the layer after it reads, so those two cannot be told apart by
    # what enters q k v (or, in parallel with it, the MLP): there either of the two may be the largest.
    twins = {other: {other} for other in case.source_layers}
    for layer, old in enumerate(case.planted.layers):
        if old is None:
            twins[layer + 1].add(layer)
    shared = {"qkv.pre", "mlp.pre"} if family == "gpt_neox" else {"qkv.pre"}
    for key, plan in layers.items():
        largest = plan.plan.argmax(1).tolist()
        if key in shared:
            assert all(got in twins[other] for got, other in zip(largest, case.source_layers, strict=True)), key
        else:
            assert largest == case.source_layers, key
    names = describe(case.target).names
    for name, coupling in layer_maps(names, _plans(family, epsilon), layers, 1).items():
        assert coupling.effective.argmax(1).tolist() == case.source_layers, name
        assert coupling.kept[:, 0].tolist() == case.source_layers, name


# eps -> bounds on the relative error: of o where heads share a kv head, and of everything else (see the table above).
_BOUNDS = {0.1: (0.6, 0.15), 0.03: (0.15, 1e-3), 0.01: (3e-3, 1e-7), 0.005: (2e-5, 1e-7)}


@families
@pytest.mark.parametrize("epsilon", [0.1, pytest.param(0.03, marks=pytest.mark.slow), 0.01, 0.005])
def test_a_dense_merge_gives_the_original_back(family, epsilon):
    case = planted_case(family)
    merged, carried = _merge(family, epsilon)
    shared_heads, others = _BOUNDS[epsilon]
    before, after = relative_errors(case.target, case.original), relative_errors(merged, case.original)
    assert set(after) == set(before)
    assert all(error == pytest.approx(PLANTED_NOISE, rel=1e-6) for error in before.values())
    for name, error in after.items():
        bound = shared_heads if name == "o" and family != "gpt_neox" else others
        assert error < bound, f"{name} at eps {epsilon}: {error:.1e}"
    if epsilon <= 0.01:
        for name, ratios in carried.norm_ratios.items():
            # The target's own norm is F's to within its noise squared.
            assert ratios == pytest.approx([1.0] * PLANTED_LAYERS, rel=2e-3), name
    fates = set(carried.biases.values())
    assert fates == {"qwen2": {"fused", "none"}, "gpt_neox": {"fused"}}.get(family, {"none"})


@families
def test_a_dense_merge_gives_the_original_loss_back(family):
    case = planted_case(family)
    merged, _ = _merge(family, 0.005)
    wanted, noised, got = (case.loss(model) for model in (case.original, case.target, merged))
    assert noised - wanted > 1e-4
    assert abs(got - wanted) < 1e-8
    with torch.no_grad():
        expected, logits = case.original(case.tokens[:100]).logits, merged(case.tokens[:100]).logits
    # As exact as o is: 4e-6 of its weights where heads share a kv head, float32 elsewhere.
    torch.testing.assert_close(logits, expected, rtol=0, atol=2e-4)


@families
def test_what_is_not_a_projection_stays_the_targets(family):
    case = planted_case(family)
    merged, _ = _merge(family, 0.005)
    fused = {view.module_name for view in describe(merged).projections()}
    own = case.target.state_dict()
    left = [name for name in own if name.rpartition(".")[0] not in fused]
    assert left
    for name in left:
        assert merged.state_dict()[name].equal(own[name]), name


@families
def test_the_plain_plan_shrinks_by_the_number_of_neurons(family):
    """`literal` cannot pass: its maps' rows sum to 1/n and 1/n', so the transported weight is that much too small."""
    case = planted_case(family)
    mine, theirs = describe(case.target), describe(case.planted.model)
    _, carried = _merge(family, 0.01, scale="literal")
    transport = Apart(epsilon=0.01, layers_kept=1)
    coupled = _transport(family, tuple(mine.names), transport).layer_maps
    for name, ratios in carried.norm_ratios.items():
        size = mine.layers[0][name].out_features * theirs.layers[0][name].in_features
        for layer, ratio in enumerate(ratios):
            share = float(coupled[name].weights[layer, 0]) * PLANTED_LAYERS  # at most 1
            assert ratio * size == pytest.approx(share, rel=0.01), name
            assert ratio < 1e-3


@families
def test_units_by_feature_leave_an_error_that_eps_does_not_cure(family):
    case = planted_case(family)
    errors = relative_errors(_merge(family, 0.005, units="feature")[0], case.original)
    assert all(3e-3 < error < 6e-2 for error in errors.values()), errors


@families
def test_semi_relaxed_layers_survive_more_than_one_source_layer(family):
    """Balanced marginals give the inserted layers their mass, and with three kept layers that lands in the average."""
    case = planted_case(family)
    balanced, relaxed = (
        relative_errors(_merge(family, 0.005, kept=3, marginals=marginals)[0], case.original)
        for marginals in ("balanced", "semi-relaxed")
    )
    assert min(balanced.values()) > 0.2
    assert max(relaxed.values()) < 0.05


def test_the_surgery_is_more_than_a_relabelling():
    """Without the rotary frequencies moving along, or without the columns' division, it would be another function."""
    original = planted_model("llama")
    tokens = torch.randint(3, 384, (20, 10), generator=torch.Generator().manual_seed(0))

    def distance(source):
        with torch.no_grad():
            return float((source(tokens).logits - original(tokens).logits).abs().max())

    source = plant(original).model
    assert distance(source) < 2e-5
    source.model.rotary_emb.inv_freq = original.model.rotary_emb.inv_freq
    assert distance(source) > 0.1
    source = plant(original).model
    down = describe(source).layers[0]["down"]
    down.write(down.weight() * 2)
    assert distance(source) > 0.1
