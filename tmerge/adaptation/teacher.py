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
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from torch.nn import functional

from tmerge.adaptation.pieces import Pieces, ToldPosition, common_positions, inner_positions
from tmerge.calibration import (
    Room,
    Span,
    batch_limit,
    complete_ends,
    length_batches,
    padded,
    padded_tokens,
    run_batches,
)
from tmerge.errors import NotEnoughMemoryError, TokenizerError
from tmerge.models import LoadedModel, read_logits, refuse_without_rows
from tmerge.models.device import out_of_memory_as
from tmerge.processes import ALONE, Processes
from tmerge.recipe import AdaptationSettings
from tmerge.store import write_tensors

__all__ = ["Reading", "Teacher", "read_teacher"]

Reading = Callable[[str], Callable[[int, int], None]]
"""``texts``, or ``blocks`` of a source that is read by blocks -> what is called with (so many done, all)."""

# Of what is read: what was kept by an earlier form is read anew.
_FORM = 2
_TOP = 128


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
    *,
    batch_tokens: int = 2048,
    note: Callable[[str], None] | None = None,
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
        batch_tokens: Most padded tokens of one forward pass.
        note: Told that a batch did not fit and is read by halves.

    Raises:
        TokenizerError: A tokenizer does not know where in the text its tokens lie.
        NotEnoughMemoryError: A text did not fit, or, of a source that is read by blocks, a block's weights.
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
        batches = _Batches(model, batch_tokens, note, processes, reading)
        positions, told = _predictions(batches, target_tokenizer, texts, encoded, spans, settings)
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


@dataclass(frozen=True)
class _Batches:
    """How the source reads its texts; arguments as `read_teacher`."""

    model: LoadedModel
    batch_tokens: int
    note: Callable[[str], None] | None
    processes: Processes
    reading: Reading | None

    def run(self, wanted: Sequence[int], lengths: Sequence[int], read: Callable[[list[int]], None]) -> None:
        """Read this process's share.

        Args:
            wanted: Texts to read.
            lengths: Tokens of every text.
            read: Called with the texts of each batch; of a source that is read by blocks, again with those of another.
        """
        model = self.model
        limit = batch_limit(model.device, self.batch_tokens)
        cut = length_batches([lengths[text] for text in wanted], limit)
        all_batches = [[wanted[index] for index in batch] for batch in cut]
        batches = self.processes.mine(all_batches, [padded_tokens(batch, lengths) for batch in all_batches])
        done, of = 0, sum(map(len, batches))
        heard = None if self.reading is None else self.reading("texts" if model.block_weights is None else "blocks")

        def after(texts: list[int]) -> None:
            nonlocal done
            done += len(texts)
            if heard is not None:
                heard(done, of)

        with out_of_memory_as(
            lambda: NotEnoughMemoryError(
                f"{model.reference}: out of memory on {model.device} while it is read for distillation; lower "
                f"calibration.batch_tokens (now {self.batch_tokens}) or adaptation.max_tokens, or use --device cpu"
            )
        ):
            run_batches(model, batches, lengths, read, Room(), note=self.note, after=after, progress=heard)


def _predictions(
    batches: _Batches,
    target_tokenizer: Any,
    texts: Sequence[str],
    encoded: Sequence[Sequence[int]],
    spans: Sequence[Sequence[Span]],
    settings: AdaptationSettings,
) -> tuple[list[list[ToldPosition]], list[_Told]]:
    """The positions of each text, and what is told there."""
    model, tokenizer = batches.model, batches.model.tokenizer
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
    told: dict[int, _Told] = {}

    def read(chosen: list[int]) -> None:
        sequences, asked = [source_ids[text] for text in chosen], [positions[text] for text in chosen]
        of_texts = _read(model, sequences, asked, [encoded[text] for text in chosen], pieces)
        told.update(zip(chosen, of_texts, strict=True))

    wanted = [text for text, of_text in enumerate(positions) if of_text]
    batches.run(wanted, [len(ids) for ids in source_ids], read)
    all_told = {text: of_text for share in batches.processes.gathered(told) for text, of_text in share.items()}
    return positions, [all_told.get(text, _Told.of([])) for text in range(len(texts))]


@dataclass(frozen=True)
class _Asked:
    """What is asked of one text.

    Attributes:
        places: (P,) positions of the source's tokens whose predictions are asked for.
        inner: Positions within its tokens.
        rows: (I,) which of the P places comes before each inner position.
        begun: (I,) tensors of the source's tokens that begin as the target's are written there.
    """

    places: list[int]
    inner: list[ToldPosition]
    rows: list[int]
    begun: list[Tensor]

    @classmethod
    def of(cls, positions: Sequence[ToldPosition], target_ids: Sequence[int], pieces: Pieces | None) -> _Asked:
        places = [position.source for position in positions if position.depth == 0]
        if pieces is None:
            return cls(places, [], [], [])
        row_of = {place: row for row, place in enumerate(places)}
        inner = list(positions[len(places) :])
        begun = [pieces.beginning(target_ids[at.target - at.depth + 1 : at.target + 1]) for at in inner]
        return cls(places, inner, [row_of[at.source] for at in inner], begun)


@torch.inference_mode()
def _read(
    model: LoadedModel,
    sequences: Sequence[list[int]],
    positions: Sequence[Sequence[ToldPosition]],
    encoded: Sequence[Sequence[int]],
    pieces: Pieces | None,
) -> list[_Told]:
    """What is told of one batch's texts: what the source's likeliest tokens give, or without `pieces` these."""
    ids, mask = padded(sequences, model.pad_id)
    device = model.device
    mask = None if mask is None else mask.to(device)
    asked = [_Asked.of(*of_text, pieces) for of_text in zip(positions, encoded, strict=True)]
    sizes = [len(of_text.places) for of_text in asked]
    starts = [0, *itertools.accumulate(sizes)]
    at = [(text, place) for text, of_text in enumerate(asked) for place in of_text.places]
    in_texts, places = torch.tensor(at, dtype=torch.int64).reshape(-1, 2).T.contiguous().to(device)
    begun = [tokens for of_text in asked for tokens in of_text.begun]
    counts = [len(tokens) for tokens in begun]
    before = [start + row for start, of_text in zip(starts, asked, strict=False) for row in of_text.rows]
    begun_rows = torch.tensor(before, dtype=torch.int64).repeat_interleave(torch.tensor(counts, dtype=torch.int64))
    begun_tokens = torch.cat([torch.zeros(0, dtype=torch.int64), *begun])
    begun_chances = torch.zeros(len(begun_tokens))
    likeliest: list[tuple[Tensor, Tensor, Tensor]] = []

    def keep(stretch: slice, logits: Tensor) -> None:
        chances = functional.softmax(logits.float(), -1)
        top = chances.topk(min(_TOP, chances.shape[1]), -1)
        known = chances.new_zeros(len(chances)) if pieces is None else pieces.known(chances)
        likeliest.append((top.indices.cpu(), top.values.cpu(), known.cpu()))
        # One journey from the device for all of them.
        inside = (begun_rows >= stretch.start) & (begun_rows < stretch.stop)
        rows = (begun_rows[inside] - stretch.start).to(device)
        begun_chances[inside] = chances[rows, begun_tokens[inside].to(device)].cpu()

    read_logits(model.model, ids.to(device), mask, in_texts, places, keep)
    tokens, chances, known = (torch.cat(parts).split(sizes) for parts in zip(*likeliest, strict=True))
    if pieces is None:
        return [_Told.of(list(zip(*of_text, strict=True))) for of_text in zip(tokens, chances, strict=True)]
    of_begun = iter(begun_chances.split(counts))
    told = []
    for text, of_text in enumerate(asked):
        rows = list(zip(*pieces.firsts(tokens[text], chances[text], known[text]), strict=True))
        for position, row, of_tokens in zip(of_text.inner, of_text.rows, of_text.begun, strict=True):
            belief, most = float(known[text][row]), tokens[text].shape[1]
            rows.append(pieces.following(of_tokens, next(of_begun), belief, position.depth, most))
        told.append(_Told.of(rows))
    return told


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
