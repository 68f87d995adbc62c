"""Distillation: which places are common, what is carried, and the loss against a plain computation."""

import math
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tests.adaptation.test_training import TEXTS, settings, trained
from tests.evaluation.test_choose import loaded
from tests.meeting import Together
from tests.pico import PICO_VOCAB, pico_model, pico_tokenizer, save_pico
from tmerge.adaptation.distillation import distillation_loss
from tmerge.adaptation.pieces import Pieces, common_positions, inner_positions
from tmerge.adaptation.teacher import Teacher, read_teacher
from tmerge.adaptation.training import _encode
from tmerge.calibration import complete_ends
from tmerge.errors import NotEnoughMemoryError
from tmerge.models import Model, head, load_model
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


def spans_of(*ends):
    """Tokens that lie one behind the other; -1 is a special one."""
    spans, at = [], 0
    for end in ends:
        spans.append((at, end) if end >= 0 else (0, 0))
        at = max(at, end)
    return spans


@pytest.mark.parametrize(
    ("target", "source", "common", "inner"),
    [
        # "abc|defg|hijkl" in three pieces and in two, and with special tokens.
        (spans_of(3, 7, 12), spans_of(3, 12), [(0, 0, 0)], [(1, 0, 1)]),
        (spans_of(3, 7, 12, -1), spans_of(-1, 3, 7, 12), [(0, 1, 0), (1, 2, 0)], []),
        # Three tokens write one character: it is there with the last of them.
        ([(0, 1), (1, 2), (1, 2), (1, 2), (2, 3)], spans_of(1, 2, 3), [(0, 0, 0), (3, 1, 0)], [(1, 0, 1), (2, 0, 2)]),
        # So it is where the last of them writes the next character too, in either model.
        (spans_of(1, 2, 3, 4), [(0, 1), (1, 2), (1, 3), (3, 4)], [(0, 0, 0), (2, 2, 0)], [(1, 0, 1)]),
        ([(0, 1), (1, 2), (1, 3), (3, 4)], spans_of(1, 2, 3, 4), [(0, 0, 0), (2, 2, 0)], [(1, 0, 1)]),
        # Behind the text's last token comes none but a special one, which is not the source's to tell.
        (spans_of(1, 3, 4, -1), spans_of(1, 4), [(0, 0, 0)], [(1, 0, 1)]),
        (spans_of(1, 3, 4), spans_of(1, 9), [(0, 0, 0)], [(1, 0, 1)]),
        (spans_of(1, 3, 4, 5, 6, 7), spans_of(1, 5, 7), [(0, 0, 0), (3, 1, 0)], [(1, 0, 1), (2, 0, 2), (4, 1, 1)]),
        # Nothing lies within what the source does not end: a special token, or the limit. One may reach past its end.
        (spans_of(1, 3, 4, 5), spans_of(1, -1), [(0, 0, 0)], []),
        (spans_of(1, 3, 4, 5), spans_of(1), [(0, 0, 0)], []),
        (spans_of(1, 3, 6, 7), spans_of(1, 5, 7), [(0, 0, 0)], [(1, 0, 1)]),
        (spans_of(5), spans_of(5), [], []),
        ([], [], [], []),
    ],
)
def test_where_the_source_tells_what_comes_next(target, source, common, inner):
    found = common_positions(complete_ends(target), complete_ends(source))
    assert found == common
    assert inner_positions(found, target, source) == inner


def test_a_source_token_is_carried_to_the_first_piece_of_its_string():
    source = words_tokenizer(["a", "▁a", "▁the", "▁France", "ing", "▁สวัสดี"])
    target = pico_tokenizer()
    pieces = Pieces.of(source, target).table[:, 0]
    for word, string in [("▁the", " the"), ("▁France", " France"), ("ing", "ing"), ("▁สวัสดี", " สวัสดี")]:
        expected = target(string, add_special_tokens=False)["input_ids"][0]
        assert int(pieces[source.convert_tokens_to_ids(word)]) == expected, word
    assert int(pieces[0]) == -1  # the unknown token means nothing
    # A model's own tokenizer: every token is its own first piece, but for parts of characters.
    own = Pieces.of(target, target).table[:, 0]
    whole = [token for token in range(3, len(target)) if "\ufffd" not in target.decode([token])]
    kept = [token for token in whole if int(own[token]) == token]
    assert len(kept) > 0.9 * len(whole)


def teacher_for(student, source, **words):
    asked = settings(objective="distill", **words)
    encoded, spans = _encode(student, TEXTS[:4], asked)
    return encoded, asked, spans


def told(words, target_ids, chances):
    """{id: q m} of what comes after some of the target's tokens, by the strings of the source's words: float64."""
    following, begun = {}, 0.0
    for ids, chance in zip(words, chances, strict=True):
        if ids[: len(target_ids)] == target_ids:
            begun += chance
            if len(ids) > len(target_ids):
                following[ids[len(target_ids)]] = following.get(ids[len(target_ids)], 0.0) + chance
    # Of what has no word it is not known whether it begins so.
    return {token: chance / (begun + 1 - sum(chances)) for token, chance in following.items()}


@pytest.mark.parametrize("distill_loss", ["pieces", "first-piece"])
def test_the_loss_is_cross_entropy_plus_what_the_source_tells(tmp_path, distill_loss):
    """Against plain loops over strings, with a source whose tokens are words, of several of the target's tokens."""
    student = loaded(pico_model("llama"))
    names = list(dict.fromkeys(word for text in TEXTS[:4] for word in text.split()))[:100]
    source = replace(
        loaded(pico_model("qwen2", vocab_size=120)), tokenizer=words_tokenizer([f"▁{name}" for name in names])
    )
    encoded, asked, spans = teacher_for(student, source, distill_weight=0.7, distill_loss=distill_loss)
    teacher = read_teacher(
        lambda: nullcontext(source), student.tokenizer, TEXTS[:4], encoded, spans, asked, tmp_path / "t.safetensors"
    )
    longest = max(map(len, encoded))
    ids = torch.tensor([row + [2] * (longest - len(row)) for row in encoded])
    mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in encoded])
    labels = ids.masked_fill(mask == 0, -100)
    words = [student.tokenizer(f" {name}", add_special_tokens=False)["input_ids"] for name in names]
    total, tokens, places, inside = 0.0, 0, 0, 0
    with torch.no_grad():
        logits = student.model(input_ids=ids, attention_mask=mask).logits
        loss = distillation_loss(logits, labels, teacher, [0, 1, 2, 3], asked)
        logs = torch.log_softmax(logits.double(), -1)
        for row, text in enumerate(encoded):
            found = source.tokenizer(TEXTS[row], return_offsets_mapping=True)
            theirs = torch.softmax(source.model(torch.tensor([found["input_ids"]])).logits[0].double(), -1)
            # The unknown word, 0, has no string, and rows behind the words no token. All are among the likeliest.
            theirs = theirs[:, 1 : len(names) + 1].tolist()
            word_ends = [end for _, end in found["offset_mapping"]]
            since = None
            for position in range(len(text) - 1):
                total -= float(logs[row, position, text[position + 1]])
                tokens += 1
                if spans[row][position][1] in word_ends:
                    since = position
                if since is None:
                    continue
                word = word_ends.index(spans[row][since][1])
                written = text[since + 1 : position + 1]
                if written and (distill_loss == "first-piece" or len(written) > 15):
                    continue
                known = told(words, written, theirs[word])
                places += bool(known)
                inside += bool(known and written)
                held = sum(known.values())
                for token, chance in known.items():
                    total += 0.7 * chance * (math.log(chance / held) - float(logs[row, position, token]))
    predictions = sum(len(text) - 1 for text in encoded)
    assert (inside > 50) == (distill_loss == "pieces")
    assert teacher.aligned_share == pytest.approx(places / predictions)
    assert float(loss) == pytest.approx(total / tokens, rel=1e-4)


def test_pieces_that_follow_are_weighed_by_what_goes_on():
    """ "a" is a token of its own, "ab", "ac" and "abd" begin with it, "x" does not; the last has no string."""
    table = torch.full((6, 16), -1, dtype=torch.int32)
    for token, ids in enumerate([[1], [1, 2], [1, 3], [1, 2, 4], [7]]):
        table[token, : len(ids)] = torch.tensor(ids)
    pieces = Pieces(table, torch.tensor([1, 2, 2, 3, 1, 0]))
    chances = torch.tensor([0.1, 0.2, 0.2, 0.15, 0.25, 0.1])
    known = float(pieces.known(torch.cat([chances, torch.zeros(3)]).unsqueeze(0)))  # rows of no token
    assert known == pytest.approx(0.9)

    def following(prefix):
        begun = pieces.beginning(prefix)
        ids, found = pieces.following(begun, chances[begun], known, len(prefix), 3)
        return dict(zip(ids.tolist(), found.tolist(), strict=True))

    assert sorted(pieces.beginning([1]).tolist()) == [0, 1, 2, 3]
    assert following([1]) == pytest.approx({2: 0.35 / 0.75, 3: 0.2 / 0.75})
    assert following([1, 2]) == pytest.approx({4: 0.15 / 0.45})
    assert following([1, 3]) == following([8]) == {}
    ids, found = pieces.firsts(torch.arange(6).unsqueeze(0), chances.unsqueeze(0), torch.tensor([known]))
    told = dict(zip(ids[0].tolist(), found[0].tolist(), strict=True))
    assert {token: chance for token, chance in told.items() if chance} == pytest.approx({1: 0.65, 7: 0.25})


def test_of_tokens_that_are_parts_of_characters_nothing_is_made_up(tmp_path):
    """A source that is sure of the next byte of a character has no piece for it, and what is left of its belief is told
    with the weight that it has."""
    text = "กา ฆฬ มา"
    student = loaded(pico_model("llama"))
    source = loaded(pico_model("qwen2"))
    encoded, spans = _encode(student, [text], settings())
    ids = source.tokenizer(text)["input_ids"]
    sure = torch.full((len(ids), 384), 0.0)
    sure[torch.arange(len(ids) - 1), torch.tensor(ids[1:])] = 12.0
    source.model.forward = lambda **_: SimpleNamespace(logits=sure.unsqueeze(0))
    asked = settings(objective="distill")
    path = tmp_path / "t.safetensors"
    teacher = read_teacher(lambda: nullcontext(source), student.tokenizer, [text], encoded, spans, asked, path)
    assert len(teacher.positions) > 3
    parts = 0
    for number, position in enumerate(teacher.positions.tolist()):
        told, chances = teacher.at(torch.tensor([number]))
        following = encoded[0][position + 1]
        of_next = float(chances[told == following].sum())
        if "\ufffd" in student.tokenizer.decode([following]):
            parts += 1
            assert float(chances.sum()) < 0.01
        else:
            assert of_next > 0.99
    assert parts > 3


def test_the_teacher_is_read_once_and_known_by_its_texts(tmp_path):
    student, source = loaded(pico_model("llama")), loaded(pico_model("qwen2"))
    encoded, asked, spans = teacher_for(student, source)
    path, calls = tmp_path / "t.safetensors", []

    def load():
        calls.append(1)
        return nullcontext(source)

    def read(texts):
        encoded, spans = _encode(student, texts, asked)
        return read_teacher(load, student.tokenizer, texts, encoded, spans, asked, path)

    first, again = read(TEXTS[:4]), read(TEXTS[:4])
    assert len(calls) == 1
    for name in ("starts", "positions", "offsets", "ids", "chances"):
        assert torch.equal(getattr(first, name), getattr(again, name))
    read(TEXTS[1:5])
    assert len(calls) == 2


def test_processes_share_the_teachers_batches_and_all_have_all_of_it(tmp_path):
    student = loaded(pico_model("llama"))
    sources = [loaded(pico_model("qwen2")) for _ in range(2)]
    encoded, asked, spans = teacher_for(student, sources[0])

    def read(name, processes=ALONE):
        opened = nullcontext(sources[processes.rank])
        path = tmp_path / name
        told = (student.tokenizer, TEXTS[:4], encoded, spans, asked, path, processes)
        return read_teacher(lambda: opened, *told, batch_tokens=1)  # a batch for each text

    alone = read("alone")
    together = Together(2).run(lambda processes: read("together", processes))
    again = Together(2).run(lambda processes: read("together", processes))
    for teacher in (*together, *again):
        for name in ("starts", "positions", "offsets", "ids", "chances"):
            assert torch.equal(getattr(teacher, name), getattr(alone, name))
    assert (tmp_path / "alone").read_bytes() == (tmp_path / "together").read_bytes()


@pytest.mark.parametrize("memory", ["resident", "blocks"])
def test_the_teachers_reading_is_heard_in_texts_or_blocks(tmp_path, memory):
    student = loaded(pico_model("llama"))
    source = Model(str(save_pico("qwen2", tmp_path / "source", layers=3)), device="cpu", memory=memory).open()
    encoded, asked, spans = teacher_for(student, source)
    heard = []

    def read(name, reading):
        path = tmp_path / name
        told = (student.tokenizer, TEXTS[:4], encoded, spans, asked, path)
        # A batch for each text.
        return read_teacher(lambda: nullcontext(source), *told, reading=reading, batch_tokens=1)

    told = read("told", lambda unit: lambda done, total: heard.append((unit, done, total)))
    unit, total = ("texts", 4) if memory == "resident" else ("blocks", 3)
    assert heard == [(unit, done, total) for done in range(1, total + 1)]
    assert torch.equal(told.chances, read("untold", None).chances)
    heard.clear()
    read("told", lambda unit: heard.append)
    assert not heard  # what is there already is not read


@pytest.mark.parametrize("loss", ["pieces", "first-piece", "uld"])
def test_rows_read_some_at_a_time_tell_the_same_and_what_does_not_fit_is_halved(tmp_path, monkeypatch, loss):
    student, source, notes, sizes = loaded(pico_model("llama")), loaded(pico_model("gemma2")), [], []
    encoded, asked, spans = teacher_for(student, source, distill_loss=loss)

    def read(name, **words):
        told = (student.tokenizer, TEXTS[:4], encoded, spans, asked, tmp_path / name)
        return read_teacher(lambda: nullcontext(source), *told, note=notes.append, **words)

    wanted = read("wanted", batch_tokens=1)
    rows = []
    source.model.lm_head.register_forward_hook(lambda module, inputs, output: rows.append(output[..., 0].numel()))
    monkeypatch.setattr(head, "LOGITS_AT_ONCE", 7 * PICO_VOCAB)
    some = read("some")
    assert max(rows) == 7 and not notes
    forward = source.base.forward

    def small(input_ids, **named):
        sizes.append(len(input_ids))
        if len(input_ids) > 1:
            raise torch.OutOfMemoryError
        return forward(input_ids=input_ids, **named)

    monkeypatch.setattr(source.base, "forward", small)
    halved = read("halved")
    assert max(sizes) > 1 and sizes.count(1) == 4
    assert len(notes) == 1 and notes[0].endswith("texts: read by halves")
    for teacher in (some, halved):
        for name in ("starts", "positions", "offsets", "ids"):
            assert torch.equal(getattr(teacher, name), getattr(wanted, name)), name
        torch.testing.assert_close(teacher.chances, wanted.chances)

    def full(**_):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(source.base, "forward", full)
    with pytest.raises(NotEnoughMemoryError, match=r"while it is read for distillation; lower .* \(now 2048\)"):
        read("full")


@pytest.mark.parametrize("loss", ["pieces", "first-piece", "uld"])
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
    if loss != "uld":
        assert near < far


def test_uld_of_equal_distributions_is_zero():
    logits = torch.randn(1, 4, 200, generator=torch.Generator().manual_seed(0))
    top = torch.softmax(logits[0, :3], -1).topk(128)
    offsets = torch.arange(0, 3 * 128 + 1, 128)
    teacher = Teacher(torch.tensor([0, 3]), torch.arange(3), offsets, top.indices.flatten(), top.values.flatten(), 1.0)
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
        encoded, asked, spans = teacher_for(student, source)
        path = tmp_path / f"{name}.safetensors"
        read_teacher(
            lambda source=source: nullcontext(source), student.tokenizer, TEXTS[:4], encoded, spans, asked, path
        )
        found.append(load_file(path))
    for name, values in found[0].items():
        assert torch.equal(found[1][name], values), name
