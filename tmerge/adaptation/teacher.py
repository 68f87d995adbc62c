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

from tmerge.adaptation.pieces import Pieces, Place, common_positions, inner_positions
from tmerge.calibration import length_batches, padded
from tmerge.errors import TokenizerError
from tmerge.models import LoadedModel, refuse_without_rows
from tmerge.models.blocks import run_passes
from tmerge.processes import ALONE, Processes
from tmerge.recipe import AdaptationSettings
from tmerge.store import write_tensors

__all__ = ["Reading", "Teacher", "read_teacher"]

Reading = Callable[[str], Callable[[int, int], None]]
"""``texts``, or ``blocks`` of a source that is read by blocks -> what is called with (so many done, all)."""

_TOP = 128
# Logits of one batch of the source: tokens x vocabulary.
_LOGITS_AT_ONCE = 1 << 26


@dataclass(frozen=True)
class Teacher:
    """What the source predicts, in the target's vocabulary.

    Attributes:
        starts: (T + 1,) where each text's positions begin in the arrays below.
        positions: (N,) position of the target's token, within its text, at whose end a prediction is known.
        ids: (N, top) target token ids, -1 where there is none.
        chances: (N, top) their probabilities m q; a row's sum m is 1 where both tokenizers end a token, and within a
            token of the source's what it holds of going on so. For ``uld`` the source's own, sorted.
        aligned_share: Of all target tokens but each text's last, at how many something is known.
    """

    starts: Tensor
    positions: Tensor
    ids: Tensor
    chances: Tensor
    aligned_share: float


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
        width = min(_TOP, model.model.get_output_embeddings().weight.shape[0])
        places, told = _predictions(model, target_tokenizer, texts, encoded, ends, settings, processes, reading)
    nothing = (torch.zeros(0, width, dtype=torch.int64), torch.zeros(0, width))
    chances = torch.cat([told.get(text, nothing)[1] for text in range(len(texts))])
    predictions = sum(max(len(ids) - 1, 0) for ids in encoded)
    teacher = Teacher(
        torch.tensor([0, *(len(of_text) for of_text in places)]).cumsum(0),
        torch.tensor([place.position for of_text in places for place in of_text], dtype=torch.int64),
        torch.cat([told.get(text, nothing)[0] for text in range(len(texts))]),
        chances,
        int((chances.sum(1) > 0).sum()) / max(predictions, 1),
    )
    processes.from_first(lambda: _save(teacher, path, key))
    return teacher


def _predictions(
    model: LoadedModel,
    target_tokenizer: Any,
    texts: Sequence[str],
    encoded: Sequence[Sequence[int]],
    ends: Sequence[Sequence[int]],
    settings: AdaptationSettings,
    processes: Processes,
    reading: Reading | None,
) -> tuple[list[list[Place]], dict[int, tuple[Tensor, Tensor]]]:
    """The places of each text, and, of each that has some, the likeliest ids there and their chances."""
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
    source_ids = [list(ids[: settings.max_tokens]) for ids in tokens_of["input_ids"]]
    places = []
    for text, offsets in enumerate(tokens_of["offset_mapping"]):
        source_ends = [end if end > start else -1 for start, end in offsets[: settings.max_tokens]]
        places.append(common_positions(ends[text], source_ends))
        if settings.distill_loss == "pieces":
            places[-1] += inner_positions(ends[text], source_ends)
    wanted = [text for text in range(len(texts)) if places[text]]
    told: dict[int, tuple[Tensor, Tensor]] = {}
    limit = max(1, _LOGITS_AT_ONCE // vocabulary)
    all_batches = length_batches([len(source_ids[text]) for text in wanted], limit)
    batches = [[wanted[index] for index in batch] for batch in processes.mine(all_batches)]

    def read(chosen: list[int]) -> None:
        sequences, asked = [source_ids[text] for text in chosen], [places[text] for text in chosen]
        found = _read(model, sequences, asked, [encoded[text] for text in chosen], pieces)
        told.update(zip(chosen, found, strict=True))

    done = list(itertools.accumulate(len(chosen) for chosen in batches))
    heard = None if reading is None else reading("texts" if model.block_weights is None else "blocks")

    def after(number: int) -> None:
        if heard is not None:
            heard(done[number], done[-1])

    tokens = [len(chosen) * max(len(source_ids[text]) for text in chosen) for chosen in batches]
    run_passes(model, [partial(read, chosen) for chosen in batches], tokens, after=after, progress=heard)
    return places, {text: what for share in processes.gathered(told) for text, what in share.items()}


@torch.inference_mode()
def _read(
    model: LoadedModel,
    sequences: Sequence[list[int]],
    places: Sequence[Sequence[Place]],
    encoded: Sequence[Sequence[int]],
    pieces: Pieces | None,
) -> list[tuple[Tensor, Tensor]]:
    """What is told of one batch's texts at their places: (P, top) ids and chances of each."""
    ids, mask = padded(sequences, model.pad_id)
    device = model.device
    mask = None if mask is None else mask.to(device)
    logits = model.model(input_ids=ids.to(device), attention_mask=mask, use_cache=False).logits
    return [_told(logits[row], asked, encoded[row], pieces) for row, asked in enumerate(places)]


def _told(
    logits: Tensor, places: Sequence[Place], target_ids: Sequence[int], pieces: Pieces | None
) -> tuple[Tensor, Tensor]:
    """Of one text, from the source's (S, V): the likeliest tokens, or without `pieces` the source's own."""
    common = [place for place in places if place.depth == 0]
    rows = {place.source_position: row for row, place in enumerate(common)}
    chances = functional.softmax(logits[list(rows)].float(), -1)
    top = chances.topk(min(_TOP, chances.shape[1]), -1)
    ids, found = top.indices.cpu(), top.values.cpu()
    if pieces is None:
        return ids, found
    told = [pieces.firsts(ids, found)]
    for place in places[len(common) :]:
        begun = pieces.beginning(target_ids[place.position - place.depth + 1 : place.position + 1])
        of_begun = chances[rows[place.source_position], begun.to(chances.device)].cpu()
        inner_ids, inner_chances = pieces.following(begun, of_begun, place.depth, ids.shape[1])
        told.append((inner_ids.unsqueeze(0), inner_chances.unsqueeze(0)))
    return torch.cat([ids for ids, _ in told]), torch.cat([found for _, found in told])


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
