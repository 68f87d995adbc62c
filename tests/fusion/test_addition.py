"""How blocks add to their streams: each family's own forward against what is read off one batch of it."""

import pytest
import torch

from tests.pico import pico_model, pico_tokenizer
from tests.pico_families import PICO_VOCAB
from tmerge.errors import UnsupportedModelError
from tmerge.fusion.addition import ADDING, Addition, additions_of
from tmerge.fusion.block_fit import caught_in
from tmerge.models import describe
from tmerge.models.blocks import base_pass, hidden_of, stepped
from tmerge.models.loading import LoadedModel
from tmerge.models.reference import ModelReference

IDS = torch.randint(5, PICO_VOCAB, (3, 20), generator=torch.Generator().manual_seed(0))
NORMED = ("gemma2", "gemma3", "olmo2", "glm4", "exaone4")


def loaded_pico(family, **overrides):
    model = pico_model(family, **overrides).requires_grad_(False)
    reference = ModelReference.parse(f"pico/{family}")
    return LoadedModel(reference, "sha256:0", model, pico_tokenizer(), None, torch.device("cpu"), torch.float32)


@pytest.mark.parametrize(
    ("family", "overrides", "scale"),
    [
        *((family, {}, 1.0) for family in ("llama", "llama-bias", "cohere", "phi", "gpt2", "opt", *NORMED)),
        ("granite", {"residual_multiplier": 0.22}, 0.22),
    ],
)
def test_what_came_in_and_what_is_added_is_what_goes_out(family, overrides, scale):
    loaded = loaded_pico(family, **overrides)
    views = describe(loaded.model).layers
    with stepped(loaded, [base_pass(loaded, (IDS, None))]) as steps:
        for layer in range(2):
            call = steps.calls(layer)[0]
            additions = additions_of(loaded, layer, call, views[layer], ADDING)
            assert set(additions) == set(ADDING)
            for addition in additions.values():
                assert addition.scale == pytest.approx(scale, rel=1e-5)
                assert (addition.gain is not None) == (family in NORMED)
            result, caught = caught_in(call, [addition.tap for addition in additions.values()])
            added = sum(addition.added(caught).reshape(call.hidden.shape) for addition in additions.values())
            torch.testing.assert_close(call.hidden + added, hidden_of(result), atol=1e-4, rtol=1e-4)
            steps.go_on(0, result)


def test_the_output_for_an_addition_gives_it_where_it_can_be_had():
    draw = torch.Generator().manual_seed(0)
    gain, now = torch.rand(7, generator=draw) + 0.5, torch.randn(5, 7, generator=draw)
    unit = torch.randn(5, 7, generator=draw)
    unit /= unit.square().mean(1, keepdim=True).sqrt()
    addition = Addition(tap=None, scale=0.3, gain=gain)
    output, factor = addition.output_for(0.3 * gain * unit, torch.arange(7), now)
    made = 0.3 * gain * output / output.square().mean(1, keepdim=True).sqrt()
    torch.testing.assert_close(made, 0.3 * gain * unit)
    # As large as it is now, so that a change is no larger than it must be.
    torch.testing.assert_close(output.square().mean(1), now.square().mean(1))
    torch.testing.assert_close(factor, now.square().mean(1).rsqrt())
    # A size that cannot be had changes nothing else.
    torch.testing.assert_close(addition.output_for(5 * gain * unit, torch.arange(7), now)[0], output)


def test_a_neuron_without_gain_is_asked_for_nothing():
    addition = Addition(tap=None, gain=torch.tensor([1.0, 0.0, 2.0]))
    output, _ = addition.output_for(torch.ones(2, 3), torch.arange(3), torch.ones(2, 3))
    assert bool(torch.isfinite(output).all()) and bool((output[:, 1] == 0).all())


def test_a_block_that_norms_the_sum_is_refused():
    loaded = loaded_pico("openai-gpt")
    views = describe(loaded.model).layers[0]
    with stepped(loaded, [base_pass(loaded, (IDS, None))]) as steps:
        call = steps.calls(0)[0]
        with pytest.raises(UnsupportedModelError, match="does more to the residual stream"):
            additions_of(loaded, 0, call, views, ADDING)
