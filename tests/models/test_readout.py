"""A stream read out by what was measured of a model's last norm and head gives the model's own logits."""

import pytest
import torch

from tests.pico import PICO_FAMILIES, save_pico
from tmerge.models import Readout, find_block_list, load_model
from tmerge.models.blocks import hidden_of

IDS = torch.tensor([[5, 9, 40, 7, 33, 12, 61, 8]])


@torch.no_grad()
def stream_and_logits(loaded):
    """(S, n) behind the last block, and (S, V)."""
    streams = []
    last = list(find_block_list(loaded.model)[1])[-1]
    handle = last.register_forward_hook(lambda module, inputs, output: streams.append(hidden_of(output)))
    logits = loaded.model(IDS, use_cache=False).logits
    handle.remove()
    return streams[0][0], logits[0]


@pytest.mark.parametrize("family", sorted(PICO_FAMILIES))
def test_the_measured_readout_is_the_models_own(family, tmp_path):
    loaded = load_model(str(save_pico(family, tmp_path / "m")), dtype="float32")
    readout = Readout.of(loaded)
    if family == "opt":  # it is projected between its last norm and its head
        assert loaded.base.decoder.project_out is not None and readout is None
        return
    assert readout is not None
    stream, logits = stream_and_logits(loaded)
    normed = readout.norm.gain * readout.norm.centred(stream) / readout.norm.size(stream) + readout.norm.shift
    made = normed @ readout.head.float().T
    if readout.head_bias is not None:
        made = made + readout.head_bias
    # gemma2 caps its logits: they are linear to first order.
    close = 1e-2 if family == "gemma2" else 3e-4
    torch.testing.assert_close(readout.scale * made, logits, atol=close * float(logits.abs().max()), rtol=0)


def test_what_families_differ_in_is_seen(tmp_path):
    found = {name: Readout.of(load_model(str(save_pico(name, tmp_path / name)), dtype="float32")) for name in KINDS}
    for name, (centres, shifts, biased) in KINDS.items():
        assert (found[name].norm.centres, bool(found[name].norm.shift.abs().max() > 1e-3)) == (centres, shifts), name
        assert (found[name].head_bias is not None) == biased, name


# Whether the norm takes the mean off, has a bias, and the head has one.
KINDS = {
    "llama": (False, False, False),
    "gemma3": (False, False, False),
    "gpt2": (True, True, False),
    "gptj": (True, True, True),
    "olmo": (True, False, False),
}


def test_a_projection_behind_the_norm_is_none_of_that_kind(tmp_path):
    loaded = load_model(str(save_pico("llama", tmp_path / "m")), dtype="float32")
    loaded.base.norm = torch.nn.Sequential(loaded.base.norm, torch.nn.Linear(64, 64))
    assert Readout.of(loaded) is None


def test_in_bfloat16_it_is_measured_as_well(tmp_path):
    loaded = load_model(str(save_pico("gpt2", tmp_path / "m", dtype=torch.bfloat16)), dtype="bfloat16")
    readout = Readout.of(loaded)
    norm = loaded.base.ln_f
    torch.testing.assert_close(readout.norm.gain, norm.weight.detach().float(), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(readout.norm.shift, norm.bias.detach().float(), atol=1e-4, rtol=1e-4)
