"""The residual model, the folded one and the reloaded one compute the same; only the base weights learn."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.pico import pico_model
from tmerge.adaptation.residual import attach_residual, fold_residual
from tmerge.fusion import TransportedNeurons, fuse
from tmerge.models import describe

IDS = torch.randint(3, 200, (3, 12), generator=torch.Generator().manual_seed(0))


def items_for(layers, seed=0):
    """Some rows of q, k and up, and columns of o, of every layer; rows with their biases."""
    generator = torch.Generator().manual_seed(seed)
    items = []
    for layer, views in enumerate(layers):
        for name in ("q", "k", "o", "up"):
            view = views.get(name)
            if view is None:
                continue
            size = view.in_features if name == "o" else view.out_features
            neurons = torch.randperm(size, generator=generator)[:6].sort().values
            shape = (view.out_features, 6) if name == "o" else (6, view.in_features)
            bias = torch.randn(6, generator=generator) if view.has_bias and name != "o" else None
            items.append(TransportedNeurons(layer, name, neurons, torch.randn(shape, generator=generator), bias))
    return items


@torch.no_grad()
def logits(model):
    return model.eval()(input_ids=IDS).logits


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2", "gpt_neox", "phi3", "falcon"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_residual_folded_and_reloaded_are_one_model(family, dtype, tmp_path):
    model, reference = pico_model(family).to(dtype), pico_model(family).to(dtype)
    items = items_for(describe(model).layers)
    base = logits(model)
    fuse(describe(reference).layers, items, 0.3)
    assert attach_residual(describe(model).layers, items, 0.3) > 0
    with_residual = logits(model)
    assert not torch.allclose(with_residual, base)
    # The same sums in another order: a few roundings of the dtype.
    loose = {torch.float32: 1e-4, torch.bfloat16: 0.2}[dtype]
    torch.testing.assert_close(with_residual, logits(reference), atol=loose, rtol=loose)
    fold_residual(model)
    assert torch.equal(logits(model), with_residual)
    assert model.state_dict().keys() == reference.state_dict().keys()
    model.save_pretrained(tmp_path)
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype, attn_implementation="eager")
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in reloaded.state_dict().items())
    # `.to(bfloat16)` also rounded the rotary frequencies, which loading keeps in float32.
    torch.testing.assert_close(logits(reloaded), with_residual, atol=loose, rtol=loose)
    assert dtype != torch.float32 or torch.equal(logits(reloaded), with_residual)


def test_the_base_weights_learn_and_the_residual_does_not():
    model = pico_model("llama")
    layers = describe(model).layers
    items = items_for(layers)
    module = layers[0]["q"].module
    attach_residual(layers, items, 0.3)
    parametrization = module.parametrizations.weight
    residual, own = parametrization[0].residual.clone(), parametrization.original.detach().clone()
    assert not parametrization[0].residual.requires_grad
    optimiser = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1)
    model(input_ids=IDS, labels=IDS).loss.backward()
    optimiser.step()
    assert torch.equal(parametrization[0].residual, residual)
    assert not torch.equal(parametrization.original, own)
    trained = parametrization.original.detach().clone()
    fold_residual(model)
    torch.testing.assert_close(module.weight, trained + residual)
    # Where nothing was transported, the weight is the trained one to the last bit.
    untouched = torch.ones(len(residual), dtype=torch.bool)
    untouched[items[0].neurons] = False
    assert torch.equal(module.weight[untouched], trained[untouched])


def test_alpha_zero_attaches_nothing():
    model = pico_model("llama")
    layers = describe(model).layers
    assert attach_residual(layers, items_for(layers), 0.0) == 0
    assert layers[0]["q"].weight() is not None
