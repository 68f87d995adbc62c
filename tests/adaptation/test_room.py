"""A pass of a training that has no room is read by halves: the same step, and the same weights to rounding."""

from __future__ import annotations

import json
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch

from tests.adaptation.test_training import TEXTS, settings
from tests.evaluation.test_choose import loaded
from tests.launched import begun
from tests.meeting import Together
from tests.pico import pico_model, save_pico
from tests.stages.test_merge import recipe_for
from tmerge.adaptation import adapt, training
from tmerge.adaptation.passes import PassTraining, StepShare
from tmerge.errors import Cancelled, NotEnoughMemoryError
from tmerge.stages.adapt import adapt_run
from tmerge.stages.merge import merge

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


class _Trainer:
    """One of several processes', which has room for so many texts in a pass and waits for the others in each step."""

    def __init__(self, share, most, model):
        self.share, self.most, self.model, self.state = share, most, model, SimpleNamespace(global_step=0)

    def try_longest(self):
        if self.share.texts > self.most:
            raise torch.OutOfMemoryError("CUDA out of memory")

    def train(self, resume_from_checkpoint):
        pass


@pytest.mark.parametrize(("rooms", "texts"), [((8, 8), 8), ((8, 3), 2), ((1, 8), 1)])
def test_several_processes_agree_on_what_all_have_room_for(tmp_path, rooms, texts):
    def trained(processes):
        one, notes = loaded(pico_model("llama")), []
        make = lambda share: _Trainer(share, rooms[processes.rank], one.model)  # noqa: E731
        trainer, _ = PassTraining(make, one, settings(), None, tmp_path, notes.append, processes).run(StepShare(8, 1))
        return trainer.share, len(notes)

    halved = {8: 0, 2: 2, 1: 3}[texts]
    assert Together(2).run(trained) == [(StepShare(texts, 8 // texts), halved)] * 2


def test_none_of_several_processes_waits_for_one_that_has_no_room_for_a_text(tmp_path):
    def trained(processes):
        one = loaded(pico_model("llama"))
        make = lambda share: _Trainer(share, processes.rank, one.model)  # noqa: E731
        with pytest.raises(NotEnoughMemoryError, match="1 text at a time cannot be trained on"):
            PassTraining(make, one, settings(), None, tmp_path, None, processes).run(StepShare(2, 1))

    Together(2).run(trained)


@pytest.mark.parametrize(
    "asked",
    [
        {"distill_weight": 1.0, "objective": "distill"},
        {"lora_rank": 4},
        {"gradient_checkpointing": True},
        {"accumulation": 2},
    ],
    ids=str,
)
def test_the_dearest_pass_is_tried_and_changes_nothing(tmp_path, asked, monkeypatch):
    """Of several processes, which this one is but for the trial: the same weights as without it."""
    source, tried = loaded(pico_model("qwen2", seed=5)), []

    def run(name):
        one = loaded(pico_model("llama"))
        adapt(one, TEXTS, settings(**asked), seed=3, work=tmp_path / name, source=lambda: nullcontext(source))
        return one.model.state_dict()

    wanted, make = run("plain"), training.make_trainer

    def make_and_try(*words):
        trainer = make(*words)
        lengths = []
        hook = trainer.model.register_forward_pre_hook(
            lambda module, inputs, named: lengths.append(named["attention_mask"].sum(1).tolist()), with_kwargs=True
        )
        trainer.try_longest()
        hook.remove()
        assert any(parameter.grad is not None for parameter in trainer.model.parameters())
        trainer.model.zero_grad(set_to_none=True)
        tried.append(lengths)
        return trainer

    monkeypatch.setattr(training, "make_trainer", make_and_try)
    found = run("tried")
    longest = max(len(ids) for ids in training._encode(loaded(pico_model("llama")), TEXTS, settings(**asked))[0])
    ((lengths,),) = tried
    assert len(lengths) == settings(**asked).batch_size and max(lengths) == longest
    assert all(torch.equal(found[name], tensor) for name, tensor in wanted.items())


@pytest.mark.slow
def test_two_processes_of_which_one_has_no_room_train_as_one(tmp_path):
    save_pico("llama", tmp_path / "target", layers=2)
    save_pico("qwen2", tmp_path / "source", layers=2, seed=1, hidden_size=48, intermediate_size=80)
    merge(recipe_for(tmp_path), tmp_path / "fused")
    asked = {"steps": 6, "batch_size": 4, "accumulation": 1, "learning_rate": 2e-3, "max_tokens": 40}
    alone = adapt_run(tmp_path / "fused", tmp_path / "alone", asked).to_dict()
    sets = [word for name, value in asked.items() for word in ("--set", f"adaptation.{name}={value}")]
    words = ["adapt", str(tmp_path / "fused"), "--out", str(tmp_path / "together"), *sets]
    launcher = begun(words, module="tests.crowded")
    said = launcher.communicate(timeout=300)[1]
    assert launcher.returncode == 0, said
    assert said.count("cpu has no room for so many texts in a pass: 1 at a time, as many in a step") == 1
    together = json.loads((tmp_path / "together/tmerge/report.json").read_text())
    for (_, left), (_, right) in zip(
        alone["adaptation"]["loss_curve"], together["adaptation"]["loss_curve"], strict=True
    ):
        assert left == pytest.approx(right, rel=1e-3)
