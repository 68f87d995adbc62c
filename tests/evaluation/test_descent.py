"""The descent control against autograd's own gradient, and against what a step does to the loss."""

import pytest
import torch
from torch.nn.functional import cross_entropy

from tests.evaluation.test_choose import everything, loaded, trained
from tests.pico import pico_model, pico_tokenizer
from tmerge.calibration import sample_texts
from tmerge.errors import NotEnoughMemoryError
from tmerge.evaluation import descent_cosines
from tmerge.fusion import TransportedNeurons
from tmerge.models import describe

TEXTS = sample_texts("english")[:10]


def gradient_of(model, texts):
    """d loss / d weight of every parameter, text by text without padding."""
    tokenizer = pico_tokenizer()
    model.zero_grad()
    for text in texts:
        ids = torch.tensor([tokenizer(text)["input_ids"][:32]])
        logits = model(input_ids=ids).logits
        cross_entropy(logits[0, :-1], ids[0, 1:], reduction="sum").backward()
    grads = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    return grads


def cosines(model, items):
    layers = describe(model).layers
    return descent_cosines(loaded(model), layers, items, TEXTS, seed=0, max_tokens=32, batch_tokens=256)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox"])
def test_a_step_down_the_gradient_has_cosine_one(family):
    model = pico_model(family)
    layers = describe(model).layers
    items = [
        TransportedNeurons(0, name, torch.arange(4), torch.zeros(4, layers[0][name].in_features), None)
        for name in ("q", "up")
    ]
    stored = {name: parameter.clone() for name, parameter in model.state_dict().items()}
    grads = gradient_of(model, TEXTS)
    # The gradient read through the views themselves: put it in the weights' place for a moment.
    model.load_state_dict({**stored, **grads}, strict=False)
    down = [-layers[item.layer][item.projection].weight()[item.neurons].clone() for item in items]
    model.load_state_dict(stored)
    own = [layers[item.layer][item.projection].weight()[item.neurons] for item in items]
    there = [
        TransportedNeurons(item.layer, item.projection, item.neurons, weight + 0.1 * step, None)
        for item, weight, step in zip(items, own, down, strict=True)
    ]
    for found in cosines(model, there).values():
        assert found.transported == pytest.approx([1.0], abs=1e-4)
        assert abs(found.noise[0]) < 4 * found.noise_error[0] + 1e-6
    back = [
        TransportedNeurons(item.layer, item.projection, item.neurons, -step, None, is_difference=True)
        for item, step in zip(items, down, strict=True)
    ]
    for found in cosines(model, back).values():
        assert found.transported == pytest.approx([-1.0], abs=1e-4)


def test_a_better_model_lies_downhill_and_the_target_keeps_its_state():
    better = trained(pico_model("llama"), TEXTS, steps=8)
    target = pico_model("llama")
    best = describe(better).layers
    items = everything(describe(target).layers, lambda layer, name, view: best[layer][name].weight().clone())
    before = {name: tensor.clone() for name, tensor in target.state_dict().items()}
    asked = {name: parameter.requires_grad for name, parameter in target.named_parameters()}
    found = cosines(target, items)
    assert all(item.to_dict()["mean"] > 3 * max(item.noise_error) for item in found.values())
    assert all(torch.equal(before[name], tensor) for name, tensor in target.state_dict().items())
    assert {name: parameter.requires_grad for name, parameter in target.named_parameters()} == asked
    assert all(parameter.grad is None for parameter in target.parameters())


@pytest.mark.parametrize("breaks", ["forward", "backward"])
def test_a_batch_that_does_not_fit_is_read_by_halves(breaks):
    model, notes = pico_model("llama"), []
    layers = describe(model).layers
    items = [TransportedNeurons(0, "q", torch.arange(4), torch.ones(4, layers[0]["q"].in_features), None)]
    wanted = cosines(model, items)["q"]

    def crowd(module, inputs, output):
        if breaks == "forward" and len(output) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        output.register_hook(crowd_behind)

    def crowd_behind(gradient):
        # By then the gradients of what lies above are there.
        if len(gradient) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")

    model.model.layers[0].mlp.register_forward_hook(crowd)
    found = descent_cosines(
        loaded(model), layers, items, TEXTS, seed=0, max_tokens=32, batch_tokens=256, note=notes.append
    )["q"]
    assert found.transported == pytest.approx(wanted.transported, abs=1e-5) and notes
    assert all("read by halves" in note for note in notes)


def test_one_text_that_does_not_fit_is_the_end():
    model = pico_model("llama")

    def crowd(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    model.get_input_embeddings().register_forward_hook(crowd)
    items = [TransportedNeurons(0, "q", torch.arange(4), torch.ones(4, 64), None)]
    with pytest.raises(NotEnoughMemoryError, match="one text; lower calibration.max_tokens"):
        cosines(model, items)
