"""Training on pico models: it learns, it is repeatable and resumable, and it leaves a plain model."""

import pytest
import torch

from tests.adaptation.test_residual import items_for
from tests.evaluation.test_choose import loaded
from tests.pico import pico_model
from tmerge.adaptation import adapt, text_order
from tmerge.adaptation.passes import StepShare
from tmerge.adaptation.trainer import training_arguments
from tmerge.calibration import sample_texts
from tmerge.errors import AdaptationError, Cancelled
from tmerge.evaluation import score_texts
from tmerge.fusion import fuse
from tmerge.models import describe
from tmerge.processes import ALONE
from tmerge.recipe import AdaptationSettings

pytest.importorskip("trl")
pytest.importorskip("peft")
TEXTS = sample_texts("english")[:40]


def settings(**words):
    return AdaptationSettings.model_validate(
        {"objective": "sft", "steps": 8, "batch_size": 4, "learning_rate": 2e-3, "max_tokens": 40, **words}
    )


def trained(tmp_path, family="llama", source=None, fused=False, dtype=torch.float32, name="w", progress=None, **words):
    one = loaded(pico_model(family).to(dtype))
    object.__setattr__(one, "dtype", dtype)
    before = {name: tensor.clone() for name, tensor in one.model.state_dict().items()}
    items = items_for(describe(one.model).layers) if fused else None
    report = adapt(
        one,
        TEXTS,
        settings(**words),
        seed=3,
        work=tmp_path / name,
        transported=items,
        alpha=0.3 if fused else 0.0,
        source=source,
        progress=progress,
    )
    return one, report, before


def state(one):
    return {name: tensor.clone() for name, tensor in one.model.state_dict().items()}


def same(left, right):
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


@pytest.mark.parametrize("fused", [False, True])
def test_sft_learns_and_leaves_a_plain_model(tmp_path, fused):
    one, report, before = trained(tmp_path, fused=fused, steps=20)
    assert report.steps == 20 == len(report.loss_curve)
    first, last = (sum(loss for _, loss in part) / 5 for part in (report.loss_curve[:5], report.loss_curve[-5:]))
    assert last < first - 0.3
    order = text_order(len(TEXTS), 80, 3)
    lengths = [min(len(one.tokenizer(text)["input_ids"]) + 1, 40) for text in TEXTS]
    assert report.tokens == sum(lengths[place] for place in order)
    assert one.model.state_dict().keys() == before.keys() and not (tmp_path / "w").exists()
    assert "forward" not in vars(one.model) and not one.model.training
    base = loaded(pico_model("llama"))
    assert score_texts(one, TEXTS).bits_per_byte < score_texts(base, TEXTS).bits_per_byte


def test_the_frozen_residual_is_still_there_after_training(tmp_path):
    """With a learning rate too small to move anything, what comes out is the fused model."""
    one, _, _ = trained(tmp_path, fused=True, learning_rate=1e-12, steps=2)
    fused = pico_model("llama")
    fuse(describe(fused).layers, items_for(describe(fused).layers), 0.3)
    for name, tensor in fused.state_dict().items():
        torch.testing.assert_close(one.model.state_dict()[name], tensor, atol=1e-6, rtol=1e-6)


@pytest.mark.slow
def test_the_same_seed_gives_the_same_weights_and_another_does_not(tmp_path):
    first, second = trained(tmp_path, name="a")[0], trained(tmp_path, name="b")[0]
    assert same(state(first), state(second))
    other = loaded(pico_model("llama"))
    adapt(other, TEXTS, settings(), seed=4, work=tmp_path / "c")
    assert not same(state(first), state(other))


@pytest.mark.slow
@pytest.mark.parametrize("fused", [False, True])
def test_a_stopped_training_continues_to_the_same_weights(tmp_path, fused):
    whole = trained(tmp_path, name="whole", fused=fused)[0]

    def stop(done, total):
        if done == 5:
            raise Cancelled("stopped")

    with pytest.raises(Cancelled):
        trained(tmp_path, name="cut", fused=fused, progress=stop)
    assert list((tmp_path / "cut").glob("checkpoint-4"))
    seen = []
    one, report, _ = trained(tmp_path, name="cut", fused=fused, progress=lambda done, total: seen.append(done))
    assert seen[0] == 5 and len(report.loss_curve) == 8
    assert same(state(one), state(whole))


def test_bfloat16_weights_train_in_float32_and_come_back(tmp_path):
    one, report, before = trained(tmp_path, dtype=torch.bfloat16, steps=12)
    assert {tensor.dtype for tensor in one.model.state_dict().values()} == {torch.bfloat16}
    assert report.loss_curve[-1][1] < report.loss_curve[0][1]


def test_lora_trains_few_and_folds_into_the_base(tmp_path):
    one, report, before = trained(tmp_path, lora_rank=2, fused=True)
    after = state(one)
    assert after.keys() == before.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed and all(
        any(f"{part}_proj" in name for part in ("q", "k", "v", "o")) or "mlp.up" in name for name in changed
    )
    assert report.trained < 0.1 * sum(tensor.numel() for tensor in before.values())


@pytest.mark.slow
def test_checkpointing_and_accumulation_change_nothing_but_memory(tmp_path):
    plain = trained(tmp_path, name="a", batch_size=4)[1]
    parts = trained(tmp_path, name="b", batch_size=2, accumulation=2, gradient_checkpointing=True)[1]
    assert parts.tokens == plain.tokens
    for (_, left), (_, right) in zip(plain.loss_curve, parts.loss_curve, strict=True):
        assert left == pytest.approx(right, abs=2e-2)


def test_nothing_to_train_on(tmp_path):
    with pytest.raises(AdaptationError, match="second token"):
        adapt(loaded(pico_model("llama")), [""], settings(), seed=0, work=tmp_path / "w")


def test_a_diverging_training_is_said(tmp_path):
    with pytest.raises(AdaptationError, match="learning_rate"):
        trained(tmp_path, learning_rate=1e30, steps=6)


@pytest.mark.parametrize(("device", "expected"), [("cuda:1", "cuda:1"), ("cpu", "cpu")])
def test_a_training_is_on_the_card_that_was_named(tmp_path, monkeypatch, device, expected):
    """As the arguments and the state that they share say it: transformers' own choice is the first card."""
    trl, accelerate = pytest.importorskip("trl"), pytest.importorskip("accelerate")
    chosen = []
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **words: False)
    try:
        made = training_arguments(trl, torch.device(device), StepShare(4, 1), settings(), 0, tmp_path, ALONE)
        assert str(made.device) == str(accelerate.Accelerator().device) == expected
        assert made.n_gpu <= 1 and made.use_cpu == (device == "cpu")
        assert list(map(str, chosen)) == ([expected] if device != "cpu" else [])
    finally:
        accelerate.state.AcceleratorState._reset_state(True)
