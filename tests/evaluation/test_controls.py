"""Controls: each changes the merge's own neurons, by what it says, and leaves no trace."""

from functools import partial
from typing import get_args

import pytest
import torch

from tests.models.pico_gguf import save_pico_gguf
from tests.pico import pico_model, save_pico
from tmerge.errors import CheckpointError
from tmerge.evaluation import applied, controls, noise, shrink
from tmerge.evaluation.controls import Control
from tmerge.fusion import COLUMN_PROJECTIONS, TransportedNeurons, fuse, generator_for, read_neurons
from tmerge.models import Model, describe


def some(layers, seed=0):
    """Transported rows of q with a bias and columns of down, on a qwen2 pico."""
    generator = torch.Generator().manual_seed(seed)
    items = []
    for name in ("q", "down"):
        view = layers[1][name]
        size = view.in_features if name == "down" else view.out_features
        neurons = torch.randperm(size, generator=generator)[:5].sort().values
        shape = (view.out_features, 5) if name == "down" else (5, view.in_features)
        weight = torch.randn(shape, generator=generator)
        bias = torch.randn(5, generator=generator) if name == "q" else None
        items.append(TransportedNeurons(1, name, neurons, weight, bias))
    return items


def test_shrink_scales_the_neurons_by_one_minus_alpha():
    model = pico_model("qwen2")
    layers = describe(model).layers
    items = some(layers)
    before = [read_neurons(layers[1][item.projection], item.neurons).clone() for item in items]
    bias = layers[1]["q"].bias().clone()
    with applied(layers, shrink(layers, items), 0.25):
        for item, own in zip(items, before, strict=True):
            torch.testing.assert_close(read_neurons(layers[1][item.projection], item.neurons), 0.75 * own)
        torch.testing.assert_close(layers[1]["q"].bias()[items[0].neurons], 0.75 * bias[items[0].neurons])


def test_noise_moves_as_far_as_the_merge_and_elsewhere():
    model = pico_model("qwen2")
    layers = describe(model).layers
    items = some(layers)
    for item, other in zip(items, noise(layers, items, seed=3), strict=True):
        own = read_neurons(layers[1][item.projection], item.neurons)
        merged = item.weight - own
        torch.testing.assert_close(other.weight.norm(), merged.norm(), rtol=1e-5, atol=0)
        cosine = torch.nn.functional.cosine_similarity(other.weight.flatten(), merged.flatten(), dim=0)
        # Random directions of 160 or more numbers: five times 1/sqrt(160).
        assert abs(float(cosine)) < 0.4
        assert torch.equal(other.neurons, item.neurons)
    again = noise(layers, items, seed=3)
    assert torch.equal(again[0].weight, noise(layers, items, seed=3)[0].weight)
    assert not torch.equal(again[0].weight, noise(layers, items, seed=4)[0].weight)


def test_noise_does_not_depend_on_what_else_is_fused():
    layers = describe(pico_model("qwen2")).layers
    items = some(layers)
    assert torch.equal(noise(layers, items, 0)[1].weight, noise(layers, items[1:], 0)[0].weight)


def test_every_byte_comes_back_even_after_an_error():
    model = pico_model("qwen2").to(torch.bfloat16)
    layers = describe(model).layers
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    try:
        with applied(layers, some(layers), 0.7):
            assert any(not torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
            raise KeyError
    except KeyError:
        pass
    for name, tensor in model.state_dict().items():
        assert torch.equal(before[name], tensor), name


@pytest.mark.parametrize("family", ["llama", "gpt2", "phi3", "mpt", "gguf"])
@pytest.mark.parametrize("dtype", ["auto", "bfloat16"])
def test_what_the_files_hold_is_not_kept_beside_and_every_byte_comes_back(family, dtype, tmp_path, monkeypatch):
    """Fused modules, transposed weights, biases; and a GGUF file, whose weights are not in it as they are."""
    path = tmp_path / "model.gguf" if family == "gguf" else tmp_path / "model"
    (save_pico_gguf if family == "gguf" else partial(save_pico, family))(path)
    model = Model(str(path), dtype=dtype, device="cpu")
    loaded, layers, unfused = model.load(), model.views.views, model.unfused
    before = {name: tensor.clone() for name, tensor in loaded.model.state_dict().items()}
    items = []
    for layer in layers:
        for name, view in layer.items():
            neurons = torch.arange(view.in_features if name in COLUMN_PROJECTIONS else view.out_features)
            bias = torch.randn(view.out_features) if view.has_bias else None
            weight = torch.randn(view.out_features, view.in_features)
            items.append(TransportedNeurons(view.layer, name, neurons, weight, bias))
    values, copied = controls._values, []

    def counted(view, neurons):
        copied.append(view.stored is None)
        return values(view, neurons)

    monkeypatch.setattr(controls, "_values", counted)
    with applied(layers, items, 0.7, unfused):
        assert copied == ([True] * len(items) if family == "gguf" else [])
        assert any(not torch.equal(before[name], tensor) for name, tensor in loaded.model.state_dict().items())
    assert copied == [family == "gguf"] * len(items)
    for name, tensor in loaded.model.state_dict().items():
        assert torch.equal(before[name], tensor), name


def test_what_went_wrong_inside_is_told_and_not_what_cannot_be_read_again(tmp_path):
    model = Model(str(save_pico("llama", tmp_path / "model")), dtype="float32", device="cpu")
    layers, unfused = (model.load(), model.views.views)[1], model.unfused
    weights = tmp_path / "model" / "model.safetensors"
    for inside, told in ((KeyboardInterrupt, KeyboardInterrupt), (None, CheckpointError)):
        with pytest.raises(told), applied(layers, some_of(layers), 0.5, unfused):
            weights.write_bytes(weights.read_bytes())
            if inside is not None:
                raise inside


def some_of(layers):
    view = layers[0]["q"]
    return [TransportedNeurons(0, "q", torch.arange(4), torch.randn(4, view.in_features), None)]


def test_applied_is_the_fused_model():
    model, other = pico_model("qwen2"), pico_model("qwen2")
    layers, theirs = describe(model).layers, describe(other).layers
    items = some(layers)
    fuse(theirs, items, 0.3)
    with applied(layers, items, 0.3):
        for name, tensor in model.state_dict().items():
            assert torch.equal(tensor, other.state_dict()[name])


def test_generators_of_different_places_differ():
    draws = {float(torch.rand(1, generator=generator_for(0, "permuted", layer, "q.post"))) for layer in range(20)}
    assert len(draws) == 20


def test_no_control_is_called_as_one_of_the_models_that_it_is_held_against():
    assert not {"base", "fused", "source", "adapted"} & {*get_args(Control)}
