"""alpha: auto chooses what lowers the loss, and nothing where nothing does."""

import torch

from tests.pico import pico_model, pico_tokenizer
from tmerge.calibration import sample_texts
from tmerge.evaluation import choose_alpha, resamples, score_texts
from tmerge.fusion import TransportedNeurons
from tmerge.models import LoadedModel, ModelReference, describe


def loaded(model):
    reference = ModelReference.parse("user/pico")
    return LoadedModel(reference, "sha256:0", model, pico_tokenizer(), None, torch.device("cpu"), torch.float32)


def everything(layers, weights):
    """All rows or columns of q, o and up, towards given weights."""
    items = []
    for layer, views in enumerate(layers):
        for name in ("q", "o", "up"):
            view = views[name]
            count = view.in_features if name == "o" else view.out_features
            items.append(TransportedNeurons(layer, name, torch.arange(count), weights(layer, name, view), None))
    return items


def trained(model, texts, steps=30):
    """The pico after a short training, so that going there and back is a real gain and a real loss."""
    tokenizer = pico_tokenizer()
    optimiser = torch.optim.Adam(model.parameters(), 3e-3)
    ids = [torch.tensor([tokenizer(text)["input_ids"][:40]]) for text in texts]
    for step in range(steps):
        row = ids[step % len(ids)]
        loss = model(input_ids=row, labels=row).loss
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return model.eval()


def test_alpha_is_chosen_by_group_and_is_zero_where_nothing_gains():
    texts = sample_texts("english")[:40]
    better = trained(pico_model("llama"), texts)
    target = pico_model("llama")
    target.load_state_dict(better.state_dict())
    layers, best = describe(target).layers, describe(better).layers
    generator = torch.Generator().manual_seed(0)
    for views in layers:  # o is spoilt: only for o is there something to gain
        view = views["o"]
        view.write(view.weight() + 0.3 * torch.randn(view.weight().shape, generator=generator))
    before = {name: tensor.clone() for name, tensor in target.state_dict().items()}

    def weights(layer, name, view):
        if name == "o":
            return best[layer]["o"].weight().clone()
        return torch.randn(view.weight().shape, generator=generator)

    items, model = everything(layers, weights), loaded(target)
    counts = resamples(len(texts), 200, 0)
    choice = choose_alpha(layers, items, (0.1, 1.0), lambda what: score_texts(model, texts), counts)
    assert choice.alpha == {"q": 0.0, "o": 1.0, "up": 0.0}
    assert choice.difference.high < 0
    assert [(trial.group, trial.alpha) for trial in choice.trials] == [
        (("q",), 0.1), (("q",), 1.0), (("o",), 0.1), (("o",), 1.0), (("up",), 0.1), (("up",), 1.0),
        (("q", "o", "up"), 0.1), (("q", "o", "up"), 1.0),
    ]  # fmt: skip
    assert all(torch.equal(before[name], tensor) for name, tensor in target.state_dict().items())


def test_noise_alone_is_never_chosen():
    texts = sample_texts("english")[:24]
    target = trained(pico_model("llama"), texts)
    layers, generator = describe(target).layers, torch.Generator().manual_seed(1)
    items = everything(layers, lambda layer, name, view: torch.randn(view.weight().shape, generator=generator))
    model = loaded(target)
    choice = choose_alpha(layers, items, (0.3, 1.0), lambda what: score_texts(model, texts), resamples(24, 200, 0))
    assert set(choice.alpha.values()) == {0.0}
    assert (choice.difference.value, choice.difference.low, choice.difference.high) == (0, 0, 0)
