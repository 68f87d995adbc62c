"""Tokens that a tokenizer has and an embedding has no row for: let pass until a text holds one, and then one line."""

from __future__ import annotations

import json

import pytest

from tests.pico import pico_tokenizer, save_pico
from tests.stages.test_merge import recipe_for
from tmerge.calibration.batches import encode
from tmerge.errors import TokenizerError
from tmerge.evaluation import score_texts
from tmerge.models import load_model
from tmerge.stages.merge import merge


def _with_token(folder, token="<image>", template=None):
    """A model whose tokenizer was given a token, and whose embedding was not resized."""
    save_pico("llama", folder)
    tokenizer = pico_tokenizer(chat=True)
    tokenizer.add_special_tokens({"additional_special_tokens": [token]})
    if template is not None:
        tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("read", [lambda loaded, texts: encode(loaded, texts, 64), score_texts], ids=["read", "score"])
def test_a_text_that_holds_one(tmp_path, read):
    loaded = load_model(str(_with_token(tmp_path)), device="cpu")
    read(loaded, ["plain", "text"])
    words = r"text 2 \('a <image> of'…\) holds '<image>', token 384 of its tokenizer, .* has 384 rows.*take"
    with pytest.raises(TokenizerError, match=words):
        read(loaded, ["plain", "a <image> of"])


@pytest.mark.parametrize("side", ["target", "source"])
def test_conversations_whose_template_writes_one(tmp_path, side):
    """As of a base model with the tokenizer of its chat version; seen before any weight is read."""
    template = "{% for m in messages %}<|im_start|>{{ m['content'] }}{% endfor %}"
    other = {"target": "source", "source": "target"}[side]
    _with_token(tmp_path / side, "<|im_start|>", template)
    save_pico("llama", tmp_path / other, chat=True)
    data = tmp_path / "chats.jsonl"
    # The target's template writes for both; as text the token reaches the source by what people wrote.
    said = "question {}" if side == "target" else "<|im_start|> question {}"
    rows = [{"messages": [{"role": "user", "content": said.format(row)}]} for row in range(60)]
    data.write_text("\n".join(map(json.dumps, rows)))
    steps = []
    with pytest.raises(TokenizerError, match="token 384.*which its chat template writes; name a column") as caught:
        merge(recipe_for(tmp_path, calibration={"dataset": str(data)}), tmp_path / "fused", listener=steps.append)
    assert repr(str(tmp_path / side)) in str(caught.value) and "\n" not in str(caught.value)
    assert {step.stage for step in steps} <= {"note", "texts"} and not (tmp_path / "fused").exists()


def test_one_that_the_tokenizer_puts_around_every_text(tmp_path):
    folder = _with_token(tmp_path)
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"bos_token": "<image>"}))
    with pytest.raises(TokenizerError, match=r"puts token 384 \('<image>'\) around texts, and its embedding has 384"):
        load_model(str(folder), device="cpu")
