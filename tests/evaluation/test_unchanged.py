"""Layers that no candidate changes: the same scores to the bit, computed once."""

import pytest
import torch

from tests.pico import pico_model, pico_tokenizer
from tmerge.calibration import sample_texts
from tmerge.evaluation import applied, score_texts, unchanged_layers, without_unchanged_layers
from tmerge.fusion import TransportedNeurons
from tmerge.models import LoadedModel, ModelReference, describe


def loaded(model):
    reference = ModelReference.parse("user/pico")
    return LoadedModel(reference, "sha256:0", model, pico_tokenizer(), None, torch.device("cpu"), torch.float32)


def counted(model):
    """Calls of each block, counted by the modules inside, which only run when the block computes."""
    calls = [0] * len(describe(model).layers)
    for views in describe(model).layers:
        view = views["o"]
        view.module.register_forward_hook(lambda *_, layer=view.layer: calls.__setitem__(layer, calls[layer] + 1))
    return calls


def last_layer(model):
    view = describe(model).layers[-1]["q"]
    return [TransportedNeurons(view.layer, "q", torch.arange(4), torch.zeros(4, view.in_features), None)]


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt_neox", "qwen2"])
def test_scores_are_the_same_to_the_bit_and_the_layers_run_once(family):
    texts = sample_texts("english")[:12]
    model = loaded(pico_model(family))
    layers, items = describe(model.model).layers, last_layer(model.model)
    unchanged = unchanged_layers(items)
    assert unchanged == len(layers) - 1 > 0
    plain = []
    for alpha in (0.0, 0.5, 1.0):
        with applied(layers, items, alpha):
            plain.append(score_texts(model, texts).bits)
    assert not torch.equal(plain[0], plain[2])
    calls = counted(model.model)
    with without_unchanged_layers(model.model, unchanged):
        for alpha, bits in zip((0.0, 0.5, 1.0), plain, strict=True):
            with applied(layers, items, alpha):
                assert torch.equal(score_texts(model, texts).bits, bits)
    batches = calls[-1] // 3
    assert batches > 1 and calls == [batches] * unchanged + [3 * batches]
    assert not any("forward" in vars(module) for module in model.model.modules())


def test_other_texts_are_other_batches():
    texts = sample_texts("english")[:16]
    model = loaded(pico_model("llama"))
    plain = score_texts(model, texts[8:]).bits
    with without_unchanged_layers(model.model, 1):
        score_texts(model, texts[:8])
        assert torch.equal(score_texts(model, texts[8:]).bits, plain)


def test_a_first_layer_or_a_norm_that_changes_leaves_nothing_to_share():
    item = last_layer(pico_model("llama"))[0]
    assert unchanged_layers([item]) > 0
    assert unchanged_layers([item, TransportedNeurons(0, "o", item.neurons, item.weight, None)]) == 0
    assert unchanged_layers([item, TransportedNeurons(9, "norm:x", item.neurons, item.weight, None)]) == 0
    assert unchanged_layers([]) == 0


def test_layers_that_hand_on_more_than_their_output_run_every_time():
    texts = sample_texts("english")[:8]
    model = loaded(pico_model("llama"))
    blocks = model.model.model.layers
    shared = {}
    for block in blocks:  # as where a later layer reads an earlier one's keys and values
        block.register_forward_pre_hook(
            lambda module, args, kwargs: (args, {**kwargs, "shared": shared}), with_kwargs=True
        )
    calls = counted(model.model)
    with without_unchanged_layers(model.model, 1):
        score_texts(model, texts)
        once = calls[0]
        score_texts(model, texts)
    assert calls[0] == 2 * once > 0


def test_layers_that_run_twice_in_a_pass_run_every_time():
    texts = sample_texts("english")[:8]
    model = loaded(pico_model("llama"))
    layers = model.model.model.layers
    inner, again = layers[1].forward, layers[0]

    def looped(hidden, *args, **kwargs):
        return inner(again(hidden, *args, **kwargs), *args, **kwargs)

    layers[1].forward = looped
    plain = score_texts(model, texts).bits
    with without_unchanged_layers(model.model, 1):
        for _ in range(3):
            assert torch.equal(score_texts(model, texts).bits, plain)
    assert layers[1].forward is looped


def test_a_librarys_own_forward_is_there_again_afterwards():
    model = loaded(pico_model("llama"))
    block = model.model.model.layers[0]
    own = block.forward = block.forward  # as accelerate's hooks leave one on the instance
    with without_unchanged_layers(model.model, 1):
        assert block.forward is not own
    assert block.forward is own
