"""Bits per byte against a plain float64 computation, one text at a time."""

import itertools
import math

import pytest
import torch

from tests.meeting import Together
from tests.pico import pico_model, pico_tokenizer
from tmerge.calibration import Room
from tmerge.errors import DeviceError, NotEnoughMemoryError, TokenizerError
from tmerge.evaluation import score_texts
from tmerge.models import LoadedModel, ModelReference

TEXTS = ["Kucing itu tidur.", "A", "The cat sat on the mat while the rain fell.", "你好, สวัสดี", "one two three four"]


def loaded(family="llama", **options):
    model = pico_model(family)
    tokenizer = pico_tokenizer(None, **options)
    return LoadedModel(
        ModelReference.parse("user/pico"), "sha256:0", model, tokenizer, None, torch.device("cpu"), torch.float32
    )


def by_hand(one, text):
    tokenizer = one.tokenizer
    ids = [tokenizer.bos_token_id, *tokenizer(text, add_special_tokens=False)["input_ids"]]
    with torch.no_grad():
        logits = one.model(torch.tensor([ids])).logits[0].double()
    chances = torch.log_softmax(logits, -1)
    return -sum(float(chances[place, token]) for place, token in enumerate(ids[1:])) / math.log(2)


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "cohere"])
@pytest.mark.parametrize("bos", [True, False])
@pytest.mark.parametrize("batch_tokens", [8, 4096])
def test_equals_the_sum_over_tokens(family, bos, batch_tokens):
    one = loaded(family, bos=bos, pad=False)
    scores = score_texts(one, TEXTS, batch_tokens=batch_tokens)
    expected = torch.tensor([by_hand(one, text) for text in TEXTS], dtype=torch.float64)
    # float32 logits and log-softmax: a few roundings of 6e-8 over tens of tokens.
    torch.testing.assert_close(scores.bits, expected, rtol=2e-6, atol=1e-4)
    assert scores.bytes.tolist() == [len(text.encode()) for text in TEXTS]
    assert scores.bits_per_byte == pytest.approx(float(expected.sum()) / float(scores.bytes.sum()), rel=2e-6)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_a_text_longer_than_the_model_reads_goes_through_in_windows(family):
    one = loaded(family)
    reach = one.model.config.max_position_embeddings
    texts = ["A short one.", "The cat sat on the mat while the rain fell. " * (3 * reach // 10), TEXTS[3]]
    ids = [one.tokenizer.bos_token_id, *one.tokenizer(texts[1], add_special_tokens=False)["input_ids"]]
    assert len(ids) > 2 * reach
    wanted, place = 0.0, 0
    while place < len(ids) - 1:
        window = ids[place : place + reach]
        with torch.no_grad():
            chances = torch.log_softmax(one.model(torch.tensor([window])).logits[0].double(), -1)
        wanted -= sum(float(chances[index, token]) for index, token in enumerate(window[1:])) / math.log(2)
        place += len(window) - 1
    seen = []
    scores = score_texts(one, texts, batch_tokens=64, progress=lambda done, total: seen.append(done))
    assert float(scores.bits[1]) == pytest.approx(wanted, rel=1e-5)
    assert float(scores.bits[0]) == pytest.approx(by_hand(one, texts[0]), rel=1e-5)
    assert scores.tokens == sum(len(one.tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts)
    assert seen == sorted(seen) and seen[-1] == 3


def test_progress_counts_every_text_and_may_stop():
    one, seen = loaded(), []
    score_texts(one, TEXTS, batch_tokens=16, progress=lambda done, total: seen.append((done, total)))
    assert seen[-1] == (len(TEXTS), len(TEXTS)) and [done for done, _ in seen] == sorted(done for done, _ in seen)

    def stop(done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        score_texts(one, TEXTS, progress=stop)


def test_no_token_to_start_from_is_said():
    one = loaded()
    one.tokenizer.bos_token = None
    one.tokenizer.eos_token = None
    with pytest.raises(TokenizerError, match="neither a BOS nor an EOS"):
        score_texts(one, TEXTS)


@pytest.mark.parametrize(
    ("dtype", "remedy"),
    [(torch.float32, "lower fusion.alpha, or use another model"), (torch.float16, "set dtype: float32")],
)
def test_a_score_that_is_not_finite_is_named_with_its_text(dtype, remedy):
    """Only the second text has the token whose row is spoilt, as an overflow on the way would spoil it."""
    one = loaded()
    one.model.to(dtype)
    (token,) = set(one.tokenizer("A")["input_ids"]) - set(one.tokenizer(TEXTS[0])["input_ids"])
    with torch.no_grad():
        one.model.get_input_embeddings().weight[token] = torch.inf
    with pytest.raises(DeviceError) as caught:
        score_texts(one, [TEXTS[0], "AA"])
    name = str(dtype).removeprefix("torch.")
    assert str(caught.value).startswith(f"user/pico: the score of text 1 (1 of 2) is not finite, in {name}; ")
    assert str(caught.value).endswith(remedy)


def test_a_batch_that_does_not_fit_is_scored_by_halves(monkeypatch):
    one, notes, sizes, texts = loaded(), [], [], TEXTS * 3
    wanted, forward = score_texts(one, texts, batch_tokens=8), one.model.forward

    def small(input_ids, **named):
        sizes.append(len(input_ids))
        if len(input_ids) > 1:
            raise torch.OutOfMemoryError
        return forward(input_ids=input_ids, **named)

    monkeypatch.setattr(one.model, "forward", small)
    found = score_texts(one, texts, batch_tokens=4096, note=notes.append)
    assert max(sizes) > 2 and sizes.count(1) == len(texts)
    assert len(notes) == 1 and notes[0].endswith("texts: read by halves")
    torch.testing.assert_close(found.bits, wanted.bits)
    # What did not fit once is not tried again: from one size to its half, down to a text alone.
    tried = [size for size in sizes if size > 1]
    assert all(after <= before / 2 + 1 for before, after in itertools.pairwise(tried)) and len(tried) < len(texts) / 2
    sizes.clear()
    room = Room()
    for _ in range(2):
        score_texts(one, texts, batch_tokens=4096, note=notes.append, room=room)
    assert sorted(size for size in sizes if size > 1) == sorted(tried) and len(notes) == 2

    def full(**_):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(one.model, "forward", full)
    with pytest.raises(NotEnoughMemoryError, match="out of memory on cpu while scoring"):
        score_texts(one, TEXTS)


@pytest.mark.parametrize("count", [2, 3, 7])
def test_processes_score_every_text_once(count):
    """Each process cuts its own batches: were they others, texts would be lost or counted twice."""
    one = loaded()
    alone = score_texts(one, TEXTS)
    together = Together(count).run(lambda processes: score_texts(one, TEXTS, batch_tokens=32, processes=processes))
    for scores in together:
        torch.testing.assert_close(scores.bits, alone.bits, rtol=1e-6, atol=0)
        assert scores.tokens == alone.tokens
