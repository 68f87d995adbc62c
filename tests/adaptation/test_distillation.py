"""Distillation: which places are common, what is carried, and the loss against a plain computation."""

from contextlib import nullcontext

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tests.adaptation.test_training import TEXTS, settings, trained
from tests.evaluation.test_choose import loaded
from tests.meeting import Together
from tests.pico import pico_model, pico_tokenizer, save_pico
from tmerge.adaptation import distillation
from tmerge.adaptation.distillation import Teacher, common_positions, distillation_loss, first_pieces, read_teacher
from tmerge.adaptation.training import _encode
from tmerge.models import Model, load_model
from tmerge.models.loading import open_by_blocks
from tmerge.processes import ALONE
from tmerge.recipe import AdaptationSettings


def words_tokenizer(words, space="▁"):
    """A sentencepiece-like tokenizer of whole words, with an unknown token."""
    vocabulary = {word: place for place, word in enumerate(["<unk>", *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement=space, prepend_scheme="always")
    tokenizer.decoder = decoders.Metaspace(replacement=space, prepend_scheme="always")
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")


@pytest.mark.parametrize(
    ("mine", "theirs", "expected"),
    [
        ([3, 7, 12], [3, 12], [(0, 0)]),
        ([3, 7, 12, -1], [-1, 3, 7, 12], [(0, 1), (1, 2)]),
        # Three tokens write one character: it is there with the last of them.
        ([1, 2, 2, 2, 3], [1, 2, 3], [(0, 0), (3, 1)]),
        ([5], [5], []),
        ([], [], []),
    ],
)
def test_common_positions(mine, theirs, expected):
    assert common_positions(mine, theirs) == expected


def test_a_source_token_is_carried_to_the_first_piece_of_its_string():
    source = words_tokenizer(["a", "▁a", "▁the", "▁France", "ing", "▁สวัสดี"])
    target = pico_tokenizer()
    pieces = first_pieces(source, target)
    for word, string in [("▁the", " the"), ("▁France", " France"), ("ing", "ing"), ("▁สวัสดี", " สวัสดี")]:
        expected = target(string, add_special_tokens=False)["input_ids"][0]
        assert int(pieces[source.convert_tokens_to_ids(word)]) == expected, word
    assert int(pieces[0]) == -1  # the unknown token means nothing
    # A model's own tokenizer: every token is its own first piece, but for parts of characters.
    own = first_pieces(target, target)
    whole = [token for token in range(3, len(target)) if "\ufffd" not in target.decode([token])]
    kept = [token for token in whole if int(own[token]) == token]
    assert len(kept) > 0.9 * len(whole)


def teacher_for(student, source, **words):
    asked = settings(objective="distill", **words)
    encoded, ends = _encode(student, TEXTS[:4], asked)
    return encoded, asked, ends


def test_the_loss_is_cross_entropy_plus_kl_at_common_positions(tmp_path):
    """Against float64 loops, with a source of the same tokenizer: each of its tokens ends where the target's does."""
    student, source = loaded(pico_model("llama")), loaded(pico_model("qwen2"))
    encoded, asked, ends = teacher_for(student, source, distill_weight=0.7)
    teacher = read_teacher(
        lambda: nullcontext(source), student.tokenizer, TEXTS[:4], encoded, ends, asked, tmp_path / "t.safetensors"
    )
    assert teacher.aligned_share > 0.8
    longest = max(map(len, encoded))
    ids = torch.tensor([row + [2] * (longest - len(row)) for row in encoded])
    mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in encoded])
    labels = ids.masked_fill(mask == 0, -100)
    with torch.no_grad():
        logits = student.model(input_ids=ids, attention_mask=mask).logits
        loss = distillation_loss(logits, labels, teacher, [0, 1, 2, 3], asked)
        chances = torch.log_softmax(logits.double(), -1)
        pieces = first_pieces(source.tokenizer, student.tokenizer)
        total, tokens, places = 0.0, 0, 0
        for row, text in enumerate(encoded):
            theirs = torch.softmax(source.model(torch.tensor([text])).logits[0].double(), -1)
            for position in range(len(text) - 1):
                total -= float(chances[row, position, text[position + 1]])
                tokens += 1
                end = ends[row][position]
                if end < 0 or end in ends[row][position + 1 :] or end == max(ends[row]):
                    continue
                top, which = theirs[position].topk(128)
                q = torch.zeros(384, dtype=torch.float64)
                for chance, token in zip(top, which, strict=True):
                    if int(token) < len(pieces) and int(pieces[token]) >= 0:
                        q[int(pieces[token])] += chance
                q /= q.sum()
                total += 0.7 * float((torch.xlogy(q, q) - q * chances[row, position]).sum())
                places += 1
    assert places == len(teacher.positions)
    assert float(loss) == pytest.approx(total / tokens, rel=1e-4)


def test_the_teacher_is_read_once_and_known_by_its_texts(tmp_path):
    student, source = loaded(pico_model("llama")), loaded(pico_model("qwen2"))
    encoded, asked, ends = teacher_for(student, source)
    path, calls = tmp_path / "t.safetensors", []

    def load():
        calls.append(1)
        return nullcontext(source)

    def read(texts):
        encoded, ends = _encode(student, texts, asked)
        return read_teacher(load, student.tokenizer, texts, encoded, ends, asked, path)

    first, again = read(TEXTS[:4]), read(TEXTS[:4])
    assert len(calls) == 1
    for name in ("starts", "positions", "ids", "chances"):
        assert torch.equal(getattr(first, name), getattr(again, name))
    read(TEXTS[1:5])
    assert len(calls) == 2


def test_processes_share_the_teachers_batches_and_all_have_all_of_it(tmp_path, monkeypatch):
    student = loaded(pico_model("llama"))
    sources = [loaded(pico_model("qwen2")) for _ in range(2)]
    encoded, asked, ends = teacher_for(student, sources[0])
    monkeypatch.setattr(distillation, "_LOGITS_AT_ONCE", 1)  # a batch for each text

    def read(name, processes=ALONE):
        opened = nullcontext(sources[processes.rank])
        path = tmp_path / name
        return read_teacher(lambda: opened, student.tokenizer, TEXTS[:4], encoded, ends, asked, path, processes)

    alone = read("alone")
    together = Together(2).run(lambda processes: read("together", processes))
    again = Together(2).run(lambda processes: read("together", processes))
    for teacher in (*together, *again):
        for name in ("starts", "positions", "ids", "chances"):
            assert torch.equal(getattr(teacher, name), getattr(alone, name))
    assert (tmp_path / "alone").read_bytes() == (tmp_path / "together").read_bytes()


@pytest.mark.parametrize("memory", ["resident", "blocks"])
def test_the_teachers_reading_is_heard_in_texts_or_blocks(tmp_path, monkeypatch, memory):
    student = loaded(pico_model("llama"))
    source = Model(str(save_pico("qwen2", tmp_path / "source", layers=3)), device="cpu", memory=memory).open()
    encoded, asked, ends = teacher_for(student, source)
    monkeypatch.setattr(distillation, "_LOGITS_AT_ONCE", 1)  # a batch for each text
    heard = []

    def read(name, reading):
        path = tmp_path / name
        return read_teacher(
            lambda: nullcontext(source), student.tokenizer, TEXTS[:4], encoded, ends, asked, path, reading=reading
        )

    told = read("told", lambda unit: lambda done, total: heard.append((unit, done, total)))
    unit, total = ("texts", 4) if memory == "resident" else ("blocks", 3)
    assert heard == [(unit, done, total) for done in range(1, total + 1)]
    assert torch.equal(told.chances, read("untold", None).chances)
    heard.clear()
    read("told", lambda unit: heard.append)
    assert not heard  # what is there already is not read


@pytest.mark.parametrize("loss", ["first-piece", "uld"])
def test_distillation_draws_the_student_to_the_teacher(tmp_path, loss):
    source = loaded(pico_model("qwen2", seed=5))
    words = {"objective": "distill", "distill_loss": loss, "source": lambda: nullcontext(source), "steps": 20}
    light, report, _ = trained(tmp_path, name="a", distill_weight=0.0, **words)
    heavy, _, _ = trained(tmp_path, name="b", distill_weight=5.0, **words)
    plain, curve, _ = trained(tmp_path, name="c", steps=20)
    assert 0 < report.aligned <= 1
    # Without its second term it is plain training (Adam makes more of roundings than the loss does).
    for (_, left), (_, right) in zip(report.loss_curve, curve.loss_curve, strict=True):
        assert left == pytest.approx(right, abs=2e-2)
    ids = torch.tensor([plain.tokenizer(TEXTS[0])["input_ids"][:30]])
    with torch.no_grad():
        theirs = torch.softmax(source.model(ids).logits, -1)
        far, near = (
            float((theirs * (theirs.log() - torch.log_softmax(one.model(ids).logits, -1))).sum(-1).mean())
            for one in (light, heavy)
        )
    if loss == "first-piece":
        assert near < far


def test_uld_of_equal_distributions_is_zero():
    logits = torch.randn(1, 4, 200, generator=torch.Generator().manual_seed(0))
    top = torch.softmax(logits[0, :3], -1).topk(128)
    teacher = Teacher(torch.tensor([0, 3]), torch.arange(3), top.indices, top.values, 1.0)
    labels = torch.tensor([[5, 6, 7, 8]])
    words = {"objective": "distill", "distill_loss": "uld"}
    zero = distillation_loss(logits, labels, teacher, [0], AdaptationSettings(**words, distill_weight=1.0))
    plain = distillation_loss(logits, labels, teacher, [0], AdaptationSettings(**words, distill_weight=0.0))
    assert float(zero) == pytest.approx(float(plain), abs=1e-6)


def test_a_teacher_that_is_read_block_by_block_says_the_same(tmp_path):
    save_pico("qwen2", tmp_path / "source", layers=3)
    student = loaded(pico_model("llama"))
    found = []
    for name, open_source in (("whole", load_model), ("blocks", open_by_blocks)):
        source = open_source(str(tmp_path / "source"))
        encoded, asked, ends = teacher_for(student, source)
        path = tmp_path / f"{name}.safetensors"
        read_teacher(
            lambda source=source: nullcontext(source), student.tokenizer, TEXTS[:4], encoded, ends, asked, path
        )
        found.append(load_file(path))
    for name, values in found[0].items():
        assert torch.equal(found[1][name], values), name
