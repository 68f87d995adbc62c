"""A pass of a training that has no room is read by halves: the same step, and the same weights to rounding."""

from __future__ import annotations

import pytest
import torch

from tests.adaptation.test_training import TEXTS, settings
from tests.evaluation.test_choose import loaded
from tests.pico import pico_model
from tmerge.adaptation import adapt
from tmerge.adaptation.trainer import StepShare
from tmerge.errors import Cancelled, NotEnoughMemoryError

pytest.importorskip("trl")
pytest.importorskip("peft")


def _trained(tmp_path, most=None, at=0, name="w", progress=None, **words):
    """The weights after a training in the course of which no more than so many texts fit, from the pass `at` on."""
    one, passes, notes = loaded(pico_model("llama")), [], []

    def crowd(module, inputs, keywords):
        texts = len(keywords["input_ids"])
        passes.append(texts)
        if most is not None and texts > most and len(passes) > at:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    one.model.register_forward_pre_hook(crowd, with_kwargs=True)
    report = adapt(one, TEXTS, settings(**words), seed=3, work=tmp_path / name, note=notes.append, progress=progress)
    return one.model.state_dict(), passes, notes, report


@pytest.mark.parametrize("words", [{}, {"lora_rank": 4}, {"gradient_checkpointing": True}], ids=str)
def test_half_of_the_texts_are_read_at_a_time(tmp_path, words):
    wanted, *_ = _trained(tmp_path, **words)
    found, passes, notes, report = _trained(tmp_path, most=1, name="crowded", **words)
    assert passes[:2] == [4, 2] and set(passes[2:]) == {1} and report.steps == 8
    assert [note.partition(": ")[2] for note in notes] == [f"{texts} at a time, as many in a step" for texts in (2, 1)]
    for name, tensor in wanted.items():
        torch.testing.assert_close(found[name], tensor, rtol=2e-3, atol=2e-5)


def test_one_text_that_does_not_fit_is_the_end(tmp_path):
    with pytest.raises(
        NotEnoughMemoryError, match="1 text at a time cannot be trained on .*; lower adaptation.max_tokens"
    ) as raised:
        _trained(tmp_path, most=0)
    assert "\n" not in str(raised.value)


def test_it_goes_on_from_the_last_checkpoint(tmp_path):
    wanted, *_ = _trained(tmp_path)
    # Steps of one pass each, a checkpoint every second step: the fourth step has no room.
    found, passes, notes, report = _trained(tmp_path, most=2, at=3, name="crowded")
    assert passes[:4] == [4] * 4 and set(passes[4:]) == {2} and len(passes) == 4 + 2 * 6 and len(notes) == 1
    assert report.resumed == 2
    for name, tensor in wanted.items():
        torch.testing.assert_close(found[name], tensor, rtol=2e-3, atol=2e-5)


def test_before_the_first_checkpoint_weights_that_have_moved_are_not_taken_for_the_models_own(tmp_path):
    with pytest.raises(NotEnoughMemoryError, match="4 texts at a time .* lower adaptation.batch_size .now 4"):
        _trained(tmp_path, most=2, at=1)


def test_another_fault_is_not_taken_for_that(tmp_path):
    one = loaded(pico_model("llama"))

    def broken(*_):
        raise RuntimeError("an illegal memory access was encountered")

    one.model.register_forward_pre_hook(broken)
    with pytest.raises(RuntimeError, match="illegal"):
        adapt(one, TEXTS, settings(), seed=3, work=tmp_path / "w")


def test_a_stop_between_is_a_stop(tmp_path):
    def stop(done, of):
        raise Cancelled("stopped")

    with pytest.raises(Cancelled):
        _trained(tmp_path, most=2, progress=stop)


@pytest.mark.parametrize(
    ("share", "smaller"), [((8, 1), (4, 2)), ((3, 2), (1, 6)), ((6, 1), (3, 2)), ((5, 4), (2, 10)), ((2, 3), (1, 6))]
)
def test_shares(share, smaller):
    assert StepShare(*share).smaller == StepShare(*smaller)
