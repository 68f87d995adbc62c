"""Transporting the selected neurons, and writing them into the target."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.pico import pico_model
from tmerge.fusion import (
    COLUMN_PROJECTIONS,
    TransportedNeurons,
    fuse,
    fused_neurons,
    layer_weights,
    read_neurons,
    select_neurons,
    transport_neurons,
)
from tmerge.models import PROJECTIONS, describe

# Separate modules; biases everywhere; fused and interleaved; transposed and sliced; one slice after the other.
_FAMILIES = ("llama", "llama-bias", "gpt_neox", "gpt2", "phi3")
families = pytest.mark.parametrize("family", _FAMILIES)


def _random(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def _bytes(model):
    return {name: values.clone() for name, values in model.state_dict().items()}


def _everything(model, *, top_k=5, is_difference=False, scale=1.0):
    """Something transported for some neurons of every projection and layer."""
    items = []
    for place, view in enumerate(describe(model).projections()):
        columns = view.name in COLUMN_PROJECTIONS
        neurons = select_neurons(_random(view.in_features if columns else view.out_features, seed=place), top_k)
        shape = (view.out_features, len(neurons)) if columns else (len(neurons), view.in_features)
        weight = scale * _random(*shape, seed=place + 100)
        bias = scale * _random(shape[0], seed=place + 200) if view.has_bias else None
        items.append(TransportedNeurons(view.layer, view.name, neurons, weight, bias, is_difference))
    return items


# -- layer weights -------------------------------------------------------------------------------------------------


def test_layer_weights_average_unless_literal():
    kept = torch.tensor([0.02, 0.01, 0.01])
    torch.testing.assert_close(layer_weights(kept, 30, "barycentric"), torch.tensor([0.5, 0.25, 0.25]))
    torch.testing.assert_close(layer_weights(kept, 30, "row-norm"), torch.tensor([0.5, 0.25, 0.25]))
    torch.testing.assert_close(layer_weights(kept, 30, "literal"), torch.tensor([0.6, 0.3, 0.3]))


# -- transporting the selected neurons -----------------------------------------------------------------------------


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    st.sampled_from(PROJECTIONS), st.tuples(*[st.integers(1, 8)] * 4), st.booleans(), st.integers(0, 2**31), st.data()
)
def test_selected_neurons_are_a_part_of_the_whole(projection, sizes, with_bias, seed, data):
    out_a, out_b, in_a, in_b = sizes
    weight, out_map, in_map = (
        _random(*shape, seed=seed, dtype=torch.float64) for shape in ((out_b, in_b), (out_a, out_b), (in_b, in_a))
    )
    bias = _random(out_b, seed=seed, dtype=torch.float64) if with_bias else None
    columns = projection in COLUMN_PROJECTIONS
    neurons = torch.tensor(sorted(data.draw(st.sets(st.integers(0, (in_a if columns else out_a) - 1), min_size=1))))
    got, got_bias = transport_neurons(weight, bias, out_map, in_map, projection, neurons)
    whole = out_map @ weight @ in_map
    torch.testing.assert_close(got, whole[:, neurons] if columns else whole[neurons])
    if not with_bias:
        assert got_bias is None
    else:
        # The bias belongs to the outputs: to the selected ones, or to all of them where the inputs are selected.
        whole_bias = out_map @ bias
        torch.testing.assert_close(got_bias, whole_bias if columns else whole_bias[neurons])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@families
def test_own_neurons_are_rows_or_columns_in_float32(family, dtype):
    for view in describe(pico_model(family).to(dtype)).projections():
        neurons = torch.tensor([4, 1])
        weight = view.weight()
        expected = weight[:, neurons] if view.name in ("o", "down") else weight[neurons]
        assert read_neurons(view, neurons).equal(expected.float())


def test_fused_neurons_are_eq_14():
    own, transported = _random(3, 4), _random(3, 4, seed=1)
    assert fused_neurons(own, transported, 0.0).equal(own)
    torch.testing.assert_close(fused_neurons(own, transported, 1.0), transported)
    torch.testing.assert_close(fused_neurons(own, transported, 0.25), 0.75 * own + 0.25 * transported)
    torch.testing.assert_close(fused_neurons(own, transported, 0.25, is_difference=True), own + 0.25 * transported)


# -- fusing --------------------------------------------------------------------------------------------------------


@families
def test_alpha_zero_changes_no_byte(family):
    model = pico_model(family).bfloat16()
    before = _bytes(model)
    # A transported weight that is infinite would make NaN of zero times it.
    fuse(describe(model).layers, _everything(model, scale=float("inf")), 0.0)
    after = model.state_dict()
    assert all(after[name].equal(values) for name, values in before.items())


@pytest.mark.parametrize("is_difference", [False, True], ids=["weights", "task vector"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@families
def test_selected_neurons_get_eq_14_and_all_others_keep_their_bytes(family, dtype, is_difference):
    model, original = pico_model(family).to(dtype), pico_model(family).to(dtype)
    items = _everything(model, is_difference=is_difference)
    fuse(describe(model).layers, items, 0.3)
    mine, theirs = describe(model), describe(original)
    assert len(items) == len(mine.projections())
    for item in items:
        got, own = mine.layers[item.layer][item.projection], theirs.layers[item.layer][item.projection]
        columns = item.projection in COLUMN_PROJECTIONS
        expected, before = own.weight().clone(), own.weight().float()
        if is_difference:
            moved = (before[:, item.neurons] if columns else before[item.neurons]) + 0.3 * item.weight
        else:
            before = before[:, item.neurons] if columns else before[item.neurons]
            moved = before + 0.3 * (item.weight - before)
        if columns:
            expected[:, item.neurons] = moved.to(dtype)
        else:
            expected[item.neurons] = moved.to(dtype)
        # Computed in float32 and rounded once: not a bit of difference, nor in what was not selected.
        assert got.weight().equal(expected), str(got)
        if own.has_bias:
            wanted_bias, start = own.bias().clone(), own.bias().float()
            places = torch.arange(own.out_features) if columns else item.neurons
            step = item.bias if is_difference else item.bias - start[places]
            wanted_bias[places] = (start[places] + 0.3 * step).to(dtype)
            assert got.bias().equal(wanted_bias), str(got)


@families
def test_embeddings_norms_and_the_head_keep_their_bytes(family):
    model = pico_model(family)
    before = _bytes(model)
    fuse(describe(model).layers, _everything(model), 0.5)
    modules = {view.module_name for view in describe(model).projections()}
    changed = {name for name, values in model.state_dict().items() if not values.equal(before[name])}
    assert changed and {name.rpartition(".")[0] for name in changed} <= modules
    assert {name.rpartition(".")[0] for name in changed} == modules
    assert all(values.dtype == before[name].dtype for name, values in model.state_dict().items())


@families
def test_alpha_one_gives_the_transported_weight(family):
    model = pico_model(family)
    items = _everything(model, top_k=1.0)
    fuse(describe(model).layers, items, 1.0)
    for item in items:
        view = describe(model).layers[item.layer][item.projection]
        # own + 1 * (transported - own): one rounding of float32 of the larger of the two.
        torch.testing.assert_close(view.weight(), item.weight, rtol=0, atol=1e-6)
        if item.bias is not None:
            torch.testing.assert_close(view.bias(), item.bias, rtol=0, atol=1e-6)


@pytest.mark.parametrize("projection", ["q", "down"])
def test_a_bias_that_is_not_fused_keeps_its_bytes(projection):
    model = pico_model("llama-bias")
    view = describe(model).layers[1][projection]
    before = view.bias().clone()
    items = [item for item in _everything(model) if (item.layer, item.projection) == (1, projection)]
    weightless = [TransportedNeurons(1, projection, items[0].neurons, items[0].weight, None)]
    weight = view.weight().clone()
    fuse(describe(model).layers, weightless, 0.5)
    assert view.bias().equal(before) and not view.weight().equal(weight)


def test_a_bias_for_a_target_without_one_is_passed_over():
    model = pico_model("llama")
    view = describe(model).layers[0]["q"]
    neurons = torch.tensor([2])
    fuse(describe(model).layers, [TransportedNeurons(0, "q", neurons, torch.zeros(1, 64), torch.ones(1))], 1.0)
    assert not view.has_bias and not view.weight()[2].any()


@pytest.mark.parametrize("projection", ["q", "down"])
def test_the_target_may_be_on_another_device(projection):
    """Transported neurons stay on the CPU; `meta` stands in for an accelerator, as it refuses mixed devices too."""
    model = pico_model("llama-bias")
    items = [item for item in _everything(model) if item.projection == projection]
    layers = describe(model.to("meta")).layers
    with pytest.raises(RuntimeError):
        layers[0][projection].weight() + torch.zeros_like(layers[0][projection].weight(), device="cpu")
    done = []
    fuse(layers, items, 0.5, progress=lambda *step: done.append(step))
    assert done == [(1, 2), (2, 2)]


def test_progress_tells_of_every_item():
    model = pico_model("llama")
    items = _everything(model)
    steps = []
    fuse(describe(model).layers, items, 0.1, progress=lambda *step: steps.append(step))
    assert steps == [(done, len(items)) for done in range(1, len(items) + 1)]


def test_fusing_changes_what_the_model_computes():
    model = pico_model("gpt_neox")
    tokens = torch.arange(3, 20).unsqueeze(0)
    with torch.no_grad():
        before = model(tokens).logits
        fuse(describe(model).layers, _everything(model), 0.5)
        assert (model(tokens).logits - before).abs().max() > 1e-2
