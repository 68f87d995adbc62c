"""Completions only: what is asked of a prompt with its completion, and that plain texts are refused."""

import json

import pytest
import torch

from tests.adaptation.test_training import TEXTS, settings
from tests.evaluation.test_choose import loaded
from tests.pico import pico_model, pico_tokenizer
from tmerge.adaptation import adapt
from tmerge.adaptation.training import _encode, _labels
from tmerge.calibration import read_texts
from tmerge.errors import AdaptationError
from tmerge.recipe import CalibrationSettings

pytest.importorskip("trl")


def asked(one, texts, prompts):
    """The parts of the texts that are asked for, as strings."""
    encoded, spans = _encode(one, texts, settings(max_tokens=200))
    labels = _labels(one, encoded, spans, prompts)
    return [one.tokenizer.decode([token for token in row if token >= 0]) for row in labels]


def rows_of(tmp_path, rows, **words):
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return read_texts(
        CalibrationSettings(dataset=str(path), held_out=0.3, **words), seed=0, chat_tokenizer=words.get("t")
    )


def test_prompt_and_completion_columns(tmp_path):
    rows = [{"prompt": f"What is {n} and one?", "completion": f"It is {n + 1}."} for n in range(60)]
    found = rows_of(tmp_path, rows)
    one = loaded(pico_model("llama"))
    for text, part in zip(found.texts, asked(one, found.texts, found.prompts), strict=True):
        assert part == text.split("\n")[1] + "</s>" and "What" not in part


def test_chats_ask_for_the_last_answer(tmp_path):
    one = loaded(pico_model("llama"))
    chat = pico_tokenizer(chat=True)
    path = tmp_path / "chat.jsonl"
    rows = [
        {"messages": [{"role": "user", "content": f"Say {n}."}, {"role": "assistant", "content": f"Here: {n}"}]}
        for n in range(60)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    found = read_texts(CalibrationSettings(dataset=str(path), held_out=0.3), seed=0, chat_tokenizer=chat)
    for text, part in zip(found.texts, asked(one, found.texts, found.prompts), strict=True):
        number = text.split("Say ")[1].split(".")[0]
        assert part.startswith(f"Here: {number}") and "Say" not in part


def test_the_loss_counts_completions_only(tmp_path):
    rows = [{"prompt": TEXTS[n % len(TEXTS)] + str(n), "completion": "Yes."} for n in range(60)]
    found = rows_of(tmp_path, rows)
    one = loaded(pico_model("llama"))
    words = {"steps": 1, "batch_size": 4, "learning_rate": 1e-9, "max_tokens": 200}
    report = adapt(
        one, found.texts, settings(completions_only=True, **words), seed=0, work=tmp_path / "w", prompts=found.prompts
    )
    # By hand over the same first batch.
    from tmerge.adaptation.training import text_order

    other = loaded(pico_model("llama"))
    encoded, spans = _encode(other, found.texts, settings(max_tokens=200))
    labels = _labels(other, encoded, spans, found.prompts)
    total, count = 0.0, 0
    with torch.no_grad():
        for place in text_order(len(encoded), 4, 0):
            chances = torch.log_softmax(other.model(torch.tensor([encoded[place]])).logits[0].double(), -1)
            for position, label in enumerate(labels[place][1:]):
                if label >= 0:
                    total, count = total - float(chances[position, label]), count + 1
    assert report.loss_curve[0][1] == pytest.approx(total / count, rel=2e-2)  # bfloat16 products


def test_plain_texts_have_no_completions(tmp_path):
    with pytest.raises(AdaptationError, match="plain texts"):
        adapt(
            loaded(pico_model("llama")),
            TEXTS,
            settings(completions_only=True),
            seed=0,
            work=tmp_path / "w",
            prompts=[0] * len(TEXTS),
        )
