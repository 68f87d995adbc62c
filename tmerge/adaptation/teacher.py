"""What a source predicts on the texts that the target trains on: read once, in the target's vocabulary, and kept.

A training reads the same texts again and again, and the source, which is the larger model, need not be in memory
meanwhile.
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

from tmerge.adaptation.pieces import Pieces, ToldPosition, common_positions, inner_positions
from tmerge.calibration import Span, complete_ends, length_batches, padded
from tmerge.errors import TokenizerError
from tmerge.models import LoadedModel, refuse_without_rows
from tmerge.models.blocks import run_passes
from tmerge.processes import ALONE, Processes
from tmerge.recipe import AdaptationSettings
from tmerge.store import write_tensors

__all__ = ["Reading", "Teacher", "read_teacher"]

Reading = Callable[[str], Callable[[int, int], None]]
"""``texts``, or ``blocks`` of a source that is read by blocks -> what is called with (so many done, all)."""

# Of what is read: what was kept by an earlier form is read anew.
_FORM = 2
_TOP = 128
# Logits of one batch of the source: tokens x vocabulary.
_LOGITS_AT_ONCE = 1 << 26


@dataclass(frozen=True)
class Teacher:
    """What the source predicts, in the target's vocabulary.

    Attributes:
        starts: (T + 1,) where each text's positions begin in the arrays below.
        positions: (N,) position of the target's token, within its text, behind which the next is told.
        offsets: (N + 1,) where each position's ids begin.
        ids: (E,) target token ids, int32.
        chances: (E,) their probabilities m q; a position's sum m is the share of the source's belief that is told. For
            ``uld`` the source's own, sorted.
        aligned_share: Of all target tokens but each text's last, behind how many something is told.
    """

    starts: Tensor
    positions: Tensor
    offsets: Tensor
    ids: Tensor
    chances: Tensor
    aligned_share: float

    def at(self, chosen: Tensor) -> tuple[Tensor, Tensor]:
        """(k, top) ids, -1 where there is none, and (k, top) chances of some positions (k,)."""
        first, last = self.offsets[chosen], self.offsets[chosen + 1]
        index = first.unsqueeze(1) + torch.arange(int((last - first).max()))
        inside = index < last.unsqueeze(1)
        index = index.masked_fill(~inside, 0)
        return self.ids[index].long().masked_fill(~inside, -1), self.chances[index].masked_fill(~inside, 0.0)


@dataclass(frozen=True)
class _Told:
    """Of one text: (P,) how many ids each position has, and (E,) these and their chances."""

    counts: Tensor
    ids: Tensor
    chances: Tensor

    @classmethod
    def of(cls, rows: Sequence[tuple[Tensor, Tensor]]) -> _Told:
        """From ids and chances of each position, of which those that have none are left out."""
        kept = [(ids[chances > 0], chances[chances > 0]) for ids, chances in rows]
        return cls(
            torch.tensor([len(ids) for ids, _ in kept], dtype=torch.int64),
            torch.cat([torch.zeros(0, dtype=torch.int32), *(ids.to(torch.int32) for ids, _ in kept)]),
            torch.cat([torch.zeros(0), *(chances for _, chances in kept)]),
        )


def read_teacher(
    source: Callable[[], AbstractContextManager[LoadedModel]],
    target_tokenizer: Any,
    texts: Sequence[str],
    encoded: Sequence[Sequence[int]],
    spans: Sequence[Sequence[Span]],
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
        spans: Where each of those tokens lies in its text.
        settings: The recipe's ``adaptation`` section.
        path: A safetensors file, written here.
        processes: That read it together: each reads a share of the batches, and all have all of it.
        reading: Hears of what this process reads.

    Raises:
        TokenizerError: A tokenizer does not know where in the text its tokens lie.
    """
    asked = json.dumps([_FORM, list(texts), [list(ids) for ids in encoded], settings.distill_loss, settings.max_tokens])
    key = hashlib.sha256(asked.encode()).hexdigest()
    # All read the file, or none: the first, which writes it, says.
    if processes.from_first(lambda: _key_of(path)) == key:
        return _load(path)
    if not target_tokenizer.is_fast:
        raise TokenizerError(
            "distillation needs to know where tokens lie in a text; the target's tokenizer is a slow one"
        )
    with source() as model:
        positions, told = _predictions(model, target_tokenizer, texts, encoded, spans, settings, processes, reading)
    counts = torch.cat([torch.zeros(1, dtype=torch.int64), *(of_text.counts for of_text in told)])
    predictions = sum(max(len(ids) - 1, 0) for ids in encoded)
    teacher = Teacher(
        torch.tensor([0, *(len(of_text) for of_text in positions)]).cumsum(0),
        torch.tensor([position.target for of_text in positions for position in of_text], dtype=torch.int64),
        counts.cumsum(0),
        torch.cat([of_text.ids for of_text in told]),
        torch.cat([of_text.chances for of_text in told]),
        int((counts > 0).sum()) / max(predictions, 1),
    )
    processes.from_first(lambda: _save(teacher, path, key))
    return teacher


def _predictions(
    model: LoadedModel,
    target_tokenizer: Any,
    texts: Sequence[str],
    encoded: Sequence[Sequence[int]],
    spans: Sequence[Sequence[Span]],
    settings: AdaptationSettings,
    processes: Processes,
    reading: Reading | None,
) -> tuple[list[list[ToldPosition]], list[_Told]]:
    """The positions of each text, and what is told there."""
    tokenizer = model.tokenizer
    if not tokenizer.is_fast:
        raise TokenizerError(
            f"{model.reference}: distillation needs to know where tokens lie in a text; this tokenizer is a slow one"
        )
    vocabulary = model.model.get_output_embeddings().weight.shape[0]
    pieces = None if settings.distill_loss == "uld" else Pieces.of(tokenizer, target_tokenizer, vocabulary)
    refuse_without_rows(model.reference.text, tokenizer, model.embedding_rows, texts)
    tokens_of = tokenizer(list(texts), return_offsets_mapping=True, verbose=False)
    # Its tokens are often fewer than the target's, so the same limit reaches at least as far.
    limit = settings.max_tokens
    source_ids = [list(ids[:limit]) for ids in tokens_of["input_ids"]]
    positions = []
    for of_target, of_source in zip(spans, tokens_of["offset_mapping"], strict=True):
        common = common_positions(complete_ends(of_target), complete_ends(of_source)[:limit])
        inner = inner_positions(common, of_target, of_source[:limit]) if settings.distill_loss == "pieces" else []
        positions.append([*common, *inner])
    wanted = [text for text in range(len(texts)) if positions[text]]
    told: dict[int, _Told] = {}
    all_batches = length_batches([len(source_ids[text]) for text in wanted], max(1, _LOGITS_AT_ONCE // vocabulary))
    work = [len(batch) * len(source_ids[wanted[batch[-1]]]) for batch in all_batches]
    batches = [[wanted[index] for index in batch] for batch in processes.mine(all_batches, work)]

    def read(chosen: list[int]) -> None:
        sequences, asked = [source_ids[text] for text in chosen], [positions[text] for text in chosen]
        of_texts = _read(model, sequences, asked, [encoded[text] for text in chosen], pieces)
        told.update(zip(chosen, of_texts, strict=True))

    done = list(itertools.accumulate(len(chosen) for chosen in batches))
    heard = None if reading is None else reading("texts" if model.block_weights is None else "blocks")

    def after(number: int) -> None:
        if heard is not None:
            heard(done[number], done[-1])

    tokens = [len(chosen) * max(len(source_ids[text]) for text in chosen) for chosen in batches]
    run_passes(model, [partial(read, chosen) for chosen in batches], tokens, after=after, progress=heard)
    all_told = {text: of_text for share in processes.gathered(told) for text, of_text in share.items()}
    return positions, [all_told.get(text, _Told.of([])) for text in range(len(texts))]


@torch.inference_mode()
def _read(
    model: LoadedModel,
    sequences: Sequence[list[int]],
    positions: Sequence[Sequence[ToldPosition]],
    encoded: Sequence[Sequence[int]],
    pieces: Pieces | None,
) -> list[_Told]:
    """What is told of one batch's texts."""
    ids, mask = padded(sequences, model.pad_id)
    device = model.device
    mask = None if mask is None else mask.to(device)
    logits = model.model(input_ids=ids.to(device), attention_mask=mask, use_cache=False).logits
    return [_told_of(logits[row], asked, encoded[row], pieces) for row, asked in enumerate(positions)]


def _told_of(
    logits: Tensor, positions: Sequence[ToldPosition], target_ids: Sequence[int], pieces: Pieces | None
) -> _Told:
    """Of one text, from the source's (S, V): what its likeliest tokens give, or without `pieces` these themselves."""
    common = [position for position in positions if position.depth == 0]
    rows = {position.source: row for row, position in enumerate(common)}
    chances = functional.softmax(logits[list(rows)].float(), -1)
    top = chances.topk(min(_TOP, chances.shape[1]), -1)
    ids, top_chances = top.indices.cpu(), top.values.cpu()
    if pieces is None:
        return _Told.of(list(zip(ids, top_chances, strict=True)))
    known = pieces.known(chances).cpu()
    told = list(zip(*pieces.firsts(ids, top_chances, known), strict=True))
    inner = positions[len(common) :]
    begun = [pieces.beginning(target_ids[at.target - at.depth + 1 : at.target + 1]) for at in inner]
    if inner:
        # One journey from the device for all of them.
        counts = [len(tokens) for tokens in begun]
        at_rows = torch.tensor([rows[position.source] for position in inner]).repeat_interleave(torch.tensor(counts))
        of_begun = chances[at_rows.to(chances.device), torch.cat(begun).to(chances.device)].cpu().split(counts)
        for position, tokens, of_tokens in zip(inner, begun, of_begun, strict=True):
            of_all = float(known[rows[position.source]])
            told.append(pieces.following(tokens, of_tokens, of_all, position.depth, ids.shape[1]))
    return _Told.of(told)


def _save(teacher: Teacher, path: Path, key: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = {
        "starts": teacher.starts,
        "positions": teacher.positions,
        "offsets": teacher.offsets,
        "ids": teacher.ids,
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
        tensors["offsets"],
        tensors["ids"],
        tensors["chances"],
        float(facts["aligned_share"]),
    )
