"""Distillation between models of different tokenizers.

Both models read the same text. Where a token of the one and a token of the other end at the same character, both
predict what follows the same string. There the source's next-token distribution is carried to the target's vocabulary:
each of its likeliest tokens gives its probability to the *first piece* that the target's tokenizer makes of the token's
string, which is what the target would have to predict next to write it. With q the carried distribution, renormalised
over what could be carried, and p the target's own,

    loss = cross-entropy + weight * share * mean over common positions of KL(q || p)

where share is the part of the batch's target tokens at whose end both tokenizers end a token.

``distill_loss: uld`` is the universal logit distillation of trl's GOLD (arXiv 2402.12030): at the same positions, the
L1 distance of both distributions sorted by size, which needs no carrying and knows no words.

Measured: SmolLM2-135M-Instruct from Gemma 3 270M, 103 steps of 8 Indonesian sentences, bits per byte on 158 others:
next tokens alone 2.0766, first piece 2.0384, uld 2.0775; first piece minus uld -0.0391 [-0.0472, -0.0313].
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from torch.nn import functional

from tmerge.calibration import length_batches, padded
from tmerge.errors import TokenizerError
from tmerge.models import LoadedModel, refuse_without_rows
from tmerge.models.blocks import run_passes
from tmerge.processes import ALONE, Processes
from tmerge.recipe import AdaptationSettings
from tmerge.store import write_tensors

__all__ = ["Reading", "Teacher", "common_positions", "distillation_loss", "first_pieces", "read_teacher"]

Reading = Callable[[str], Callable[[int, int], None]]
"""``texts``, or ``blocks`` of a source that is read by blocks -> what is called with (so many done, all)."""

_TOP = 128
# Logits of one batch of the source: tokens x vocabulary.
_LOGITS_AT_ONCE = 1 << 26
_STRINGS_AT_ONCE = 20_000


@dataclass(frozen=True)
class Teacher:
    """What the source predicts, in the target's vocabulary.

    Attributes:
        starts: (T + 1,) where each text's positions begin in the arrays below.
        positions: (N,) position of the target's token, within its text, at whose end a prediction is known.
        ids: (N, top) target token ids, -1 where there is none.
        chances: (N, top) their probabilities, summing to 1 over a row; for ``uld`` the source's own, sorted.
        aligned_share: Of all target tokens but each text's last, how many such positions there are.
    """

    starts: Tensor
    positions: Tensor
    ids: Tensor
    chances: Tensor
    aligned_share: float


def common_positions(target_ends: Sequence[int], source_ends: Sequence[int]) -> list[tuple[int, int]]:
    """Positions (target, source) of tokens that end at the same character, neither being the text's last.

    Args:
        target_ends: Where each of the target's tokens ends, in characters; -1 for special tokens.
        source_ends: Likewise of the source.

    A character that several tokens write is complete only with the last of them.
    """
    last_of_source = {end: position for position, end in enumerate(source_ends) if end >= 0}
    last_of_target = {end: position for position, end in enumerate(target_ends) if end >= 0}
    text_end = max([*last_of_target, 0])
    return [
        (position, last_of_source[end])
        for end, position in last_of_target.items()
        if end in last_of_source and end < text_end
    ]


def first_pieces(source: Any, target: Any) -> Tensor:
    """For every source token id, the first target token of its string; -1 where it has none of its own.

    Strings are found in context (after another token), so that a leading space survives: sentencepiece decoders drop
    it at the start of a text.
    """
    size = len(source)
    anchor = source("a", add_special_tokens=False)["input_ids"][-1:]
    before = source.decode(anchor, skip_special_tokens=False)
    special = set(source.all_special_ids)
    strings: list[str] = []
    for start in range(0, size, _STRINGS_AT_ONCE):
        pairs = [[*anchor, token] for token in range(start, min(start + _STRINGS_AT_ONCE, size))]
        decoded = source.batch_decode(pairs, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        strings += [text[len(before) :] if text.startswith(before) else "" for text in decoded]
    # Half a character is no string, and a special token's name is not its meaning.
    usable = [token for token, text in enumerate(strings) if text and "\ufffd" not in text and token not in special]
    pieces = torch.full((size,), -1, dtype=torch.int64)
    lead = target("\n", add_special_tokens=False)["input_ids"]
    for start in range(0, len(usable), _STRINGS_AT_ONCE):
        part = usable[start : start + _STRINGS_AT_ONCE]
        # After a newline, for tokenizers that put a space before a text's first word.
        led = target(["\n" + strings[token] for token in part], add_special_tokens=False)["input_ids"]
        for token, ids in zip(part, led, strict=True):
            if ids[: len(lead)] != lead or len(ids) == len(lead):
                ids = lead + target(strings[token], add_special_tokens=False)["input_ids"]
            if len(ids) > len(lead):
                pieces[token] = ids[len(lead)]
    return pieces


def read_teacher(
    source: Callable[[], AbstractContextManager[LoadedModel]],
    target_tokenizer: Any,
    texts: Sequence[str],
    encoded: Sequence[Sequence[int]],
    ends: Sequence[Sequence[int]],
    settings: AdaptationSettings,
    path: Path,
    processes: Processes = ALONE,
    reading: Reading | None = None,
) -> Teacher:
    """What the source predicts on all texts, from `path` where it is there already.

    Args:
        source: Opens it, for as long as it is read; not called if `path` has what is asked for.
        target_tokenizer: The target's.
        texts: T texts.
        encoded: Their token ids in the target.
        ends: Where each of those tokens ends in its text, -1 for special tokens.
        settings: The recipe's ``adaptation`` section.
        path: A safetensors file, written here.
        processes: That read it together: each reads a share of the batches, and all have all of it.
        reading: Hears of what this process reads.

    Raises:
        TokenizerError: A tokenizer does not know where in the text its tokens lie.
    """
    asked = json.dumps([list(texts), [list(ids) for ids in encoded], settings.distill_loss, settings.max_tokens])
    key = hashlib.sha256(asked.encode()).hexdigest()
    # All read the file, or none: the first, which writes it, says.
    if processes.from_first(lambda: _key_of(path)) == key:
        return _load(path)
    if not target_tokenizer.is_fast:
        raise TokenizerError(
            "distillation needs to know where tokens lie in a text; the target's tokenizer is a slow one"
        )
    with source() as model:
        vocabulary = model.model.get_output_embeddings().weight.shape[0]
        positions, rows = _predictions(model, target_tokenizer, texts, ends, settings, processes, reading)
    starts = torch.tensor([0, *(len(item) for item in positions)]).cumsum(0)
    width = min(_TOP, vocabulary)
    empty = (torch.zeros(0, width, dtype=torch.int64), torch.zeros(0, width))
    predictions = sum(max(len(ids) - 1, 0) for ids in encoded)
    teacher = Teacher(
        starts,
        torch.tensor([position for item in positions for position, _ in item], dtype=torch.int64),
        torch.cat([rows.get(row, empty)[0] for row in range(len(texts))]),
        torch.cat([rows.get(row, empty)[1] for row in range(len(texts))]),
        len([1 for item in positions for _ in item]) / max(predictions, 1),
    )
    processes.from_first(lambda: _save(teacher, path, key))
    return teacher


def _predictions(
    model: LoadedModel,
    target_tokenizer: Any,
    texts: Sequence[str],
    ends: Sequence[Sequence[int]],
    settings: AdaptationSettings,
    processes: Processes,
    reading: Reading | None,
) -> tuple[list[list[tuple[int, int]]], dict[int, tuple[Tensor, Tensor]]]:
    """Common positions of each text, and, of each that has some, the likeliest tokens there and their probabilities."""
    tokenizer = model.tokenizer
    if not tokenizer.is_fast:
        raise TokenizerError(
            f"{model.reference}: distillation needs to know where tokens lie in a text; this tokenizer is a slow one"
        )
    carried = settings.distill_loss == "first-piece"
    pieces = first_pieces(tokenizer, target_tokenizer) if carried else None
    refuse_without_rows(model.reference.text, tokenizer, model.embedding_rows, texts)
    found = tokenizer(list(texts), return_offsets_mapping=True, verbose=False)
    # Its tokens are often fewer than the target's, so the same limit reaches at least as far.
    source_ids = [list(ids[: settings.max_tokens]) for ids in found["input_ids"]]
    positions = []
    for row, offsets in enumerate(found["offset_mapping"]):
        source_ends = [end if end > start else -1 for start, end in offsets[: settings.max_tokens]]
        positions.append(common_positions(ends[row], source_ends))
    wanted = [row for row in range(len(texts)) if positions[row]]
    rows: dict[int, tuple[Tensor, Tensor]] = {}
    vocabulary = model.model.get_output_embeddings().weight.shape[0]
    limit = max(1, _LOGITS_AT_ONCE // vocabulary)
    all_batches = length_batches([len(source_ids[row]) for row in wanted], limit)
    batches = [[wanted[index] for index in batch] for batch in processes.mine(all_batches)]

    def read(chosen: list[int]) -> None:
        tops = _top(model, [source_ids[row] for row in chosen], [positions[row] for row in chosen])
        for row, top in zip(chosen, tops, strict=True):
            rows[row] = _carried(top, pieces) if pieces is not None else top

    done = list(itertools.accumulate(len(chosen) for chosen in batches))
    heard = None if reading is None else reading("texts" if model.block_weights is None else "blocks")

    def after(number: int) -> None:
        if heard is not None:
            heard(done[number], done[-1])

    tokens = [len(chosen) * max(len(source_ids[row]) for row in chosen) for chosen in batches]
    run_passes(model, [partial(read, chosen) for chosen in batches], tokens, after=after, progress=heard)
    return positions, {row: top for share in processes.gathered(rows) for row, top in share.items()}


def distillation_loss(
    logits: Tensor,
    labels: Tensor,
    teacher: Teacher,
    texts: Sequence[int],
    settings: AdaptationSettings,
    items: Tensor | int | None = None,
) -> Tensor:
    """Cross-entropy plus what the teacher says.

    Args:
        logits: (B, S, V) of the target.
        labels: (B, S), -100 where nothing is asked.
        teacher: Its predictions.
        texts: Which text each row is.
        settings: Weight and kind of the second term.
        items: Tokens of all passes of this step, for accumulation; the batch's own when None.
    """
    asked = labels[:, 1:]
    mask = asked != -100
    # Indexed once: under autograd each further selection would allocate a gradient as large as all logits.
    rows, columns = mask.nonzero(as_tuple=True)
    chosen = logits[rows, columns].float()
    count = mask.sum() if items is None else torch.as_tensor(items, device=logits.device)
    loss = functional.cross_entropy(chosen, asked[rows, columns], reduction="sum")
    where = torch.full(mask.shape, -1, dtype=torch.int64)
    where[rows.cpu(), columns.cpu()] = torch.arange(len(rows))
    picked, known = [], []
    for row, text in enumerate(texts):
        first, last = int(teacher.starts[text]), int(teacher.starts[text + 1])
        positions = teacher.positions[first:last]
        inside = positions < mask.shape[1]
        slot = where[row, positions[inside]]
        picked.append(slot[slot >= 0])
        known.append(torch.arange(first, last)[inside][slot >= 0])
    index, entries = torch.cat(picked), torch.cat(known)
    if len(index):
        ids = teacher.ids[entries].to(logits.device)
        chances = teacher.chances[entries].to(logits.device)
        student = chosen[index.to(logits.device)]
        # A sum over common positions over the count of all tokens is their mean times their share.
        loss = loss + settings.distill_weight * _divergence(student, ids, chances, settings.distill_loss)
    return loss / count


def _divergence(student: Tensor, ids: Tensor, chances: Tensor, kind: str) -> Tensor:
    """Summed over rows: KL(q || p), or the sorted L1 distance."""
    if kind == "uld":
        own = functional.softmax(student, -1).topk(min(ids.shape[1], student.shape[1]), -1).values
        return (own - chances[:, : own.shape[1]]).abs().sum()
    logs = functional.log_softmax(student, -1).gather(1, ids.clamp(min=0))
    return (torch.xlogy(chances, chances) - chances * logs).sum()


@torch.inference_mode()
def _top(
    model: LoadedModel, sequences: Sequence[list[int]], positions: Sequence[list[tuple[int, int]]]
) -> list[tuple[Tensor, Tensor]]:
    """The likeliest tokens (ids, probabilities) at each asked position of each sequence."""
    ids, mask = padded(sequences, model.pad_id)
    device = model.device
    mask = None if mask is None else mask.to(device)
    logits = model.model(input_ids=ids.to(device), attention_mask=mask, use_cache=False).logits
    result = []
    for row, asked in enumerate(positions):
        at = torch.tensor([position for _, position in asked], device=device)
        chances, tokens = functional.softmax(logits[row, at].float(), -1).topk(min(_TOP, logits.shape[2]), -1)
        result.append((tokens.cpu(), chances.cpu()))
    return result


def _carried(top: tuple[Tensor, Tensor], pieces: Tensor) -> tuple[Tensor, Tensor]:
    """Source ids to the target's: probabilities of one piece are summed, rows renormalised to what was carried."""
    tokens, chances = top
    # A model's vocabulary may be padded past its tokenizer's.
    known = torch.where(tokens < len(pieces), pieces[tokens.clamp(max=len(pieces) - 1)], -1)
    chances = chances.masked_fill(known < 0, 0.0)
    order = known.argsort(dim=1, stable=True)
    known, chances = known.gather(1, order), chances.gather(1, order)
    is_first = torch.ones_like(known, dtype=torch.bool)
    is_first[:, 1:] = known[:, 1:] != known[:, :-1]
    group = is_first.long().cumsum(1) - 1
    summed = torch.zeros_like(chances).scatter_add_(1, group, chances)
    ids = torch.full_like(known, -1).scatter_(1, group, known)
    return ids, summed / summed.sum(1, keepdim=True).clamp(min=1e-9)


def _save(teacher: Teacher, path: Path, key: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = {
        "starts": teacher.starts,
        "positions": teacher.positions,
        "ids": teacher.ids.to(torch.int32),
        "chances": teacher.chances,
    }
    write_tensors(path, tensors, {"key": key, "aligned_share": repr(teacher.aligned_share)})


def _key_of(path: Path) -> str | None:
    if not path.is_file():
        return None
    with safe_open(path, "pt") as file:
        return (file.metadata() or {}).get("key")


def _load(path: Path) -> Teacher:
    with safe_open(path, "pt") as file:
        facts = file.metadata()
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    return Teacher(
        tensors["starts"],
        tensors["positions"],
        tensors["ids"].long(),
        tensors["chances"],
        float(facts["aligned_share"]),
    )
