"""A model read block by block gives what its own forward gives, whatever its architecture."""

import gc
import weakref

import pytest
import torch

from tests.pico import PICO_FAMILIES, save_pico
from tmerge.calibration.batches import padded
from tmerge.errors import UnsupportedModelError
from tmerge.models import load_model
from tmerge.models.blocks import base_pass, hidden_of, stepped

IDS = [[5, 9, 40, 7, 33], [8, 30, 12], [61, 4, 22, 9, 14, 3, 50]]


def batches(loaded):
    return [padded(IDS[:2], loaded.pad_id), padded(IDS[2:], loaded.pad_id)]


def passes(loaded):
    return [base_pass(loaded, batch) for batch in batches(loaded)]


@torch.no_grad()
def outputs(loaded):
    found = []
    for ids, mask in batches(loaded):
        result = loaded.base(input_ids=ids, attention_mask=mask, use_cache=False)
        kept = torch.ones_like(ids) if mask is None else mask
        found.append(result.last_hidden_state[kept.bool()])
    return found


@pytest.mark.parametrize("family", sorted(PICO_FAMILIES))
def test_it_is_the_models_own_pass(family, tmp_path):
    save_pico(family, tmp_path / "m")
    loaded = load_model(str(tmp_path / "m"), dtype="float32")
    expected, ends = outputs(loaded), []
    # The norm behind the blocks, and whatever else there is, is run by the model itself.
    handle = loaded.base.register_forward_hook(lambda module, inputs, output: ends.append(output.last_hidden_state))
    with stepped(loaded, passes(loaded)) as steps:
        for block in range(len(steps)):
            for batch, call in enumerate(steps.calls(block)):
                assert call.hidden.shape[:2] == batches(loaded)[batch][0].shape
                result = call.run()
                assert hidden_of(result).shape == call.hidden.shape
                steps.go_on(batch, result)
    handle.remove()
    for (_, mask), end, wanted in zip(batches(loaded), ends, expected, strict=True):
        kept = torch.ones(end.shape[:2]) if mask is None else mask
        torch.testing.assert_close(end[kept.bool()], wanted)
    # Afterwards nothing of it is left in the model.
    for mine, theirs in zip(outputs(loaded), expected, strict=True):
        assert mine.equal(theirs)
    assert not any("forward" in vars(module) for module in loaded.model.modules())


def test_what_a_block_is_changed_to_is_what_the_next_sees(tmp_path):
    save_pico("llama", tmp_path / "m", layers=3)
    loaded = load_model(str(tmp_path / "m"), dtype="float32")
    with stepped(loaded, passes(loaded)) as steps:
        for batch, call in enumerate(steps.calls(0)):
            steps.go_on(batch, torch.full_like(hidden_of(call.run()), 0.5))
        for call in steps.calls(1):
            assert bool((call.hidden == 0.5).all())


def test_passes_that_are_left_let_everything_go(tmp_path):
    save_pico("llama", tmp_path / "m", layers=3)
    loaded = load_model(str(tmp_path / "m"), dtype="float32")
    streams = []
    with pytest.raises(RuntimeError, match="enough"), stepped(loaded, passes(loaded)) as steps:
        streams += [weakref.ref(call.hidden) for call in steps.calls(0)]
        raise RuntimeError("enough")
    gc.collect()
    assert [stream() for stream in streams] == [None, None]
    expected = outputs(loaded)
    assert all(bool(torch.isfinite(end).all()) for end in expected)


def test_a_models_own_fault_is_raised_here(tmp_path, monkeypatch):
    save_pico("llama", tmp_path / "m")
    loaded = load_model(str(tmp_path / "m"), dtype="float32")

    def broken(*arguments, **named):
        raise ValueError("no rotary angles today")

    monkeypatch.setattr(loaded.base.rotary_emb, "forward", broken)
    with pytest.raises(ValueError, match="no rotary angles"), stepped(loaded, passes(loaded)):
        pass


def test_blocks_that_are_not_run_in_order_are_refused(tmp_path):
    save_pico("llama", tmp_path / "m", layers=3)
    loaded = load_model(str(tmp_path / "m"), dtype="float32")
    with stepped(loaded, passes(loaded)) as steps, pytest.raises(UnsupportedModelError, match="block by block"):
        steps.calls(1)
