"""A training by several processes is that of one: same texts, same steps, same loss, one voice."""

import json
import re
import time

import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainingArguments

from tests.adaptation.test_training import TEXTS, settings
from tests.evaluation.test_choose import loaded
from tests.evaluation.test_tasks import XCOPA
from tests.launched import begun, kill_second
from tests.meeting import Together
from tests.pico import pico_model, save_pico
from tests.stages.test_merge import recipe_for
from tmerge.adaptation import adapt, training
from tmerge.adaptation.passes import StepShare
from tmerge.comparison.compare import compare
from tmerge.comparison.result import read_comparison
from tmerge.errors import AdaptationError
from tmerge.stages.adapt import adapt_run
from tmerge.stages.merge import merge

pytest.importorskip("trl")
WORDS = {"steps": 8, "batch_size": 4, "accumulation": 1, "learning_rate": 2e-3, "max_tokens": 40}
# A pass of fewer texts rounds otherwise, in bfloat16 where the processor has it, and Adam divides a gradient by its own
# size, so that where there is hardly any its rounding decides a step. Measured after these eight steps:
# losses 1.2e-4 apart, and weights by 0.3 % of what the training has changed in them, on average.
LOSS, CHANGE = 1e-3, 0.03
# Where each process takes one of a step's two passes, they are the passes of one process: the same sum of the same two.
SAME_PASSES = {"batch_size": 3, "accumulation": 2}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    save_pico("llama", folder / "target", layers=2)
    save_pico("qwen2", folder / "source", layers=2, seed=1, hidden_size=48, intermediate_size=80)
    merge(recipe_for(folder), folder / "fused")
    return folder / "fused"


def words_of(run, out, asked):
    sets = [word for name, value in asked.items() for word in ("--set", f"adaptation.{name}={value}")]
    return ["adapt", str(run), "--out", str(out), *sets]


@pytest.mark.parametrize(
    "asked",
    [
        {},
        SAME_PASSES,
        pytest.param({"objective": "distill"}, marks=pytest.mark.slow),
        pytest.param({"transport_weight": 0.5, "accumulation": 2}, marks=pytest.mark.slow),
        pytest.param(
            {"lora_rank": 2, "residual": "none"},
            marks=[pytest.mark.slow, pytest.mark.filterwarnings("ignore::UserWarning:peft")],
        ),
    ],
    ids=lambda asked: " ".join(asked) or "sft",
)
def test_two_processes_train_as_one(run, tmp_path, asked, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")  # peft asks the Hub for the base of a LoRA
    asked = {**WORDS, **asked}
    alone = adapt_run(run, tmp_path / "alone", asked).to_dict()
    launcher = begun(words_of(run, tmp_path / "together", asked))
    output, said = launcher.communicate(timeout=300)
    assert launcher.returncode == 0, said
    together = json.loads((tmp_path / "together/tmerge/report.json").read_text())
    one, two = alone["adaptation"], together["adaptation"]
    for what in ("tokens", "steps", "trained_parameters", "aligned_share", "data"):
        assert one[what] == two[what], what
    assert [step for step, _ in one["loss_curve"]] == [step for step, _ in two["loss_curve"]] == list(range(1, 9))
    for (_, left), (_, right) in zip(one["loss_curve"], two["loss_curve"], strict=True):
        assert left == pytest.approx(right, rel=LOSS)
    weights, others = (load_file(tmp_path / name / "model.safetensors") for name in ("alone", "together"))
    before = load_file(run.parent / "target/model.safetensors")
    apart, changed = (
        torch.cat([(weights[name] - than[name]).abs().flatten() for name in weights]).mean()
        for than in (others, before)
    )
    assert changed > 1e-4 and apart < CHANGE * changed
    if asked["accumulation"] == 2:
        assert all(torch.equal(others[name], weight) for name, weight in weights.items())
        assert one["loss_curve"] == two["loss_curve"]
    scores = [report["evaluation"]["adapted"]["score"]["value"] for report in (alone, together)]
    assert scores[0] == pytest.approx(scores[1], rel=LOSS)
    # One of them speaks, and only one.
    assert output.count("The model is in") == 1
    assert len(re.findall(r"\[adapt\] \w+: 8/8 steps", said)) == 1, said
    assert "[rank" not in said and "DistributedDataParallel" not in said, said
    assert not any((tmp_path / "together").rglob("*.pt*"))


@pytest.mark.slow
def test_a_lost_process_ends_the_training_and_the_same_command_goes_on(run, tmp_path):
    asked = {**WORDS, "steps": 60}
    launcher = begun(words_of(run, tmp_path / "cut", asked))
    work = tmp_path / "cut/tmerge/cache/training"
    end = time.monotonic() + 120
    while not list(work.glob("checkpoint-*/trainer_state.json")):
        assert launcher.poll() is None and time.monotonic() < end, launcher.communicate()
        time.sleep(0.02)
    kill_second(launcher)
    began = time.monotonic()
    said = launcher.communicate(timeout=120)[1]
    assert time.monotonic() - began < 40
    assert launcher.returncode == 1 and "exitcode" in said
    assert "error: process 1 of 2 (rank 1) has ended" in said or "stopped; the training's last checkpoint" in said
    assert "tmerge/cli" not in said  # the launcher's own traceback is of the launcher
    assert not (tmp_path / "cut/model.safetensors").exists()
    launcher = begun(words_of(run, tmp_path / "cut", asked))
    said = launcher.communicate(timeout=300)[1]
    assert launcher.returncode == 0, said
    adapt_run(run, tmp_path / "whole", asked)
    cut, whole = (json.loads((tmp_path / name / "tmerge/report.json").read_text()) for name in ("cut", "whole"))
    curves = [report["adaptation"]["loss_curve"] for report in (cut, whole)]
    assert [step for step, _ in curves[0]] == [step for step, _ in curves[1]]
    for (_, left), (_, right) in zip(*curves, strict=True):
        assert left == pytest.approx(right, rel=0.05)


@pytest.mark.slow
def test_texts_that_cannot_be_shared_out_are_one_line(run, tmp_path):
    launcher = begun(words_of(run, tmp_path / "odd", {**WORDS, "batch_size": 3}))
    said = launcher.communicate(timeout=120)[1]
    assert launcher.returncode == 1 and said.count("error: ") == 1
    assert "error: a step of 3 texts (adaptation.batch_size times accumulation) cannot be shared out" in said


@pytest.mark.slow
def test_two_processes_compare_as_one(run, tmp_path):
    questions = tmp_path / "questions.jsonl"
    keys = ("premise", "choice1", "choice2", "question", "label")
    asked = [dict(zip(keys, row, strict=True)) for row in XCOPA]
    questions.write_text("".join(json.dumps(row) + "\n" for row in asked), encoding="utf-8")
    recipe = recipe_for(
        run.parent,
        compare={
            "rows": ["sft", "fused+distill"],
            "alphas": [0.5],
            "seeds": [0, 1],
            "domains": {"Malay": "samples:malay"},
            "tasks": ["xcopa_id"],
            "task_data": {"xcopa_id": str(questions)},
        },
        adaptation={**WORDS, "steps": 4},
    )
    (tmp_path / "recipe.yaml").write_text(recipe.to_yaml())
    alone = compare(recipe, tmp_path / "alone")
    launcher = begun(["compare", str(tmp_path / "recipe.yaml"), "--out", str(tmp_path / "together")])
    output, said = launcher.communicate(timeout=500)
    assert launcher.returncode == 0, said
    together = read_comparison(tmp_path / "together/compare.json")
    assert [row.name for row in together.rows] == [row.name for row in alone.rows]
    for one, two in zip(alone.rows, together.rows, strict=True):
        # What was not trained is the same to the bit.
        within = LOSS if one.kind == "trained" else 0.0
        assert two.value == pytest.approx(one.value, rel=within, abs=0), one.name
        assert two.domains["Malay"].value == pytest.approx(one.domains["Malay"].value, rel=within, abs=0), one.name
        # Requests are batched with others.
        assert two.tasks["xcopa_id"].value == one.tasks["xcopa_id"].value, one.name
    assert len(re.findall(r"sft, seed 0: 4/4 steps", said)) == 1, said


@pytest.mark.parametrize(
    ("batch_size", "accumulation", "processes", "expected"),
    [(8, 1, 1, (8, 1)), (8, 1, 2, (4, 1)), (8, 4, 8, (4, 1)), (3, 2, 2, (3, 1)), (1, 8, 4, (1, 2)), (5, 2, 2, (5, 1))],
)
def test_a_step_is_shared_out_in_passes_no_larger_than_one_processs(batch_size, accumulation, processes, expected):
    share = StepShare.of(settings(batch_size=batch_size, accumulation=accumulation), processes)
    assert (share.texts, share.passes) == expected
    assert share.texts * share.passes * processes == batch_size * accumulation


def test_what_cannot_be_shared_out_is_refused():
    with pytest.raises(AdaptationError, match="a step of 6 texts .* among 4 processes"):
        StepShare.of(settings(batch_size=6, accumulation=1), 4)


def test_one_process_trains_on_one_card_however_many_it_sees(run, tmp_path, monkeypatch):
    """As where four cards are visible: transformers would wrap the model, and read four times the texts a step."""
    look, made, make = TrainingArguments.__dict__["_setup_devices"], [], training.make_trainer

    def four_cards(self):
        seen = "_n_gpu" in vars(self)
        device = look.__get__(self, TrainingArguments)
        if not seen:
            self._n_gpu = 4
        return device

    monkeypatch.setattr(TrainingArguments, "_setup_devices", property(four_cards))
    monkeypatch.setattr(training, "make_trainer", lambda *words: made.append(make(*words)) or made[-1])
    adapt_run(run, tmp_path / "out", {**WORDS, "steps": 1})
    assert made[0].args.n_gpu == 1 and made[0].args.train_batch_size == WORDS["batch_size"]


def test_several_on_the_processor_of_a_machine_with_cards_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(AdaptationError, match="CUDA_VISIBLE_DEVICES"):
        adapt(loaded(pico_model("llama")), TEXTS, settings(), seed=0, work=tmp_path, processes=Together(2).of(1))


def test_several_are_not_put_on_one_card(tmp_path):
    one = loaded(pico_model("llama"))
    object.__setattr__(one, "device", torch.device("cuda:1"))
    with pytest.raises(AdaptationError, match="device is cuda:1, .* set device: auto"):
        adapt(one, TEXTS, settings(), seed=0, work=tmp_path, processes=Together(2).of(1))
