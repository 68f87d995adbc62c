"""What a reconstruction reads: the models, the tokens that are rows, what each projection should give, and where it is.

The goals of a block are mapped files, as those of all tokens are more than fits in memory; they go with the block.
"""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tmerge.calibration.batches import encode, length_batches, padded
from tmerge.calibration.positions import common_ends, token_positions
from tmerge.errors import FusionError, NotEnoughDiskError
from tmerge.fusion.carry import Shuffle
from tmerge.fusion.maps import unmatched
from tmerge.models import Architecture, LoadedModel, Projection, Tap, feature_key
from tmerge.processes import ALONE, Processes, on_this_machine
from tmerge.quantities import bytes_words
from tmerge.transport import Transport

__all__ = ["Goals", "Passage", "Reading", "Rows", "Wanted", "readings"]


@dataclass(frozen=True)
class Reading:
    """One model's texts as batches, and which of its tokens are which rows.

    Attributes:
        batches: Token ids and masks.
        places: Per batch: (r, 2) text of the batch and position, and (r,) the row of each.
    """

    batches: list[tuple[Tensor, Tensor | None]]
    places: list[tuple[Tensor, Tensor]]

    @classmethod
    def of(
        cls,
        loaded: LoadedModel,
        texts: Sequence[str],
        positions: Sequence[Sequence[int]],
        rows: Sequence[Sequence[int]],
        max_tokens: int,
        batch_tokens: int,
    ) -> Reading:
        """Batches of like length, of the texts that have rows."""
        encoded = encode(loaded, texts, max_tokens)
        used_texts = [text for text, text_positions in enumerate(positions) if text_positions]
        batches, token_rows = [], []
        for members in reversed(length_batches([encoded.lengths[text] for text in used_texts], batch_tokens)):
            chosen = [used_texts[member] for member in members]
            batches.append(padded([encoded.ids[text] for text in chosen], loaded.pad_id))
            read = [(number, position) for number, text in enumerate(chosen) for position in positions[text]]
            index = torch.tensor(read, dtype=torch.int64).reshape(-1, 2)
            token_rows.append((index, torch.tensor([row for text in chosen for row in rows[text]], dtype=torch.int64)))
        return cls(batches, token_rows)

    @property
    def rows(self) -> Tensor:
        """(r,) that its tokens are, ascending."""
        return torch.cat([row for _, row in self.places]).sort().values

    def token_counts(self, tokens: int, rows: int) -> Tensor:
        """(V,) how often each token of a vocabulary is one of the first rows."""
        counts = torch.zeros(tokens, dtype=torch.int64)
        for (ids, _), (index, row) in zip(self.batches, self.places, strict=True):
            chosen = index[row < rows]
            counts += torch.bincount(ids[chosen[:, 0], chosen[:, 1]], minlength=tokens)
        return counts

    def rows_of(self, batch: int, features: Tensor) -> Tensor:
        """(r, n) of (B, S, n): the batch's rows, float32."""
        index = self.places[batch][0].to(features.device)
        return features[index[:, 0], index[:, 1]].float()


@dataclass(frozen=True)
class Rows:
    """The tokens that are fitted on, in all processes that do it together.

    Attributes:
        texts: Those on which the target is drawn to the source; they are numbered first.
        kept: Those on which it is to stay as it is.
        choosing: Those on which lambda is chosen, of texts on which the target is drawn to the source; numbered next.
        choosing_kept: Likewise, of texts on which it is to stay as it is; numbered last.
        keep_share: Of a fit's weight, that of all the kept ones together.
    """

    texts: int
    kept: int
    keep_share: float
    choosing: int = 0
    choosing_kept: int = 0

    @property
    def fitted(self) -> int:
        """R."""
        return self.texts + self.kept

    @property
    def count(self) -> int:
        """All of them, those on which lambda is chosen too."""
        return self.fitted + self.choosing + self.choosing_kept

    def weights(self, rows: Tensor) -> Tensor | None:
        """(r,) what rows (r,) of X and Y are multiplied by; None where all are alike."""
        if not self.kept and not self.choosing_kept:
            return None
        weights = torch.ones(len(rows))
        for start, drawn, kept in (
            (self.texts, self.texts, self.kept),
            (self.fitted + self.choosing, self.choosing, self.choosing_kept),
        ):
            if drawn and kept:
                share = self.keep_share / (1 - self.keep_share)
                weights[(rows >= start) & (rows < start + kept)] = (share * drawn / kept) ** 0.5
        return None if bool((weights == 1).all()) else weights


class Goals:
    """What each feature of the block at hand should be, a row for each token: mapped files, and gone with the block.

    Args:
        folder: For the files.
        rows: (r,) that are written and read, ascending.
    """

    def __init__(self, folder: Path, rows: Tensor) -> None:
        self._folder, self._rows = folder, rows
        self._arrays: dict[str, np.memmap[Any, Any]] = {}

    def begin(self) -> None:
        """Forget the block before."""
        for name in list(self._arrays):
            del self._arrays[name]
            (self._folder / f"{name}.npy").unlink()

    close = begin

    def write(self, name: str, rows: Tensor, values: Tensor) -> None:
        """Rows (r,) of a feature, (r, n)."""
        if name not in self._arrays:
            self._folder.mkdir(parents=True, exist_ok=True)
            # Each process of this machine takes as much, at the same time.
            self._reserve(on_this_machine() * 4 * len(self._rows) * values.shape[1])
            self._arrays[name] = np.lib.format.open_memmap(
                self._folder / f"{name}.npy", mode="w+", dtype=np.float32, shape=(len(self._rows), values.shape[1])
            )
        self._arrays[name][self._lines(rows)] = values.cpu().numpy()

    def _reserve(self, size: int) -> None:
        # A mapped file that finds no room when it is written to ends the process.
        free = shutil.disk_usage(self._folder).free
        if size > free:
            raise NotEnoughDiskError(
                f"the goals of a block take {bytes_words(size)} in {self._folder}, where {bytes_words(free)} are free; "
                "make room, or fit on fewer texts (calibration.texts)"
            )

    def read(self, name: str, rows: Tensor) -> Tensor:
        """Rows (r,) of a feature."""
        return torch.from_numpy(self._arrays[name][self._lines(rows)])

    def _lines(self, rows: Tensor) -> np.ndarray[Any, Any]:
        return torch.searchsorted(self._rows, rows).numpy()


@dataclass(frozen=True)
class Wanted:
    """Of one projection of a block: through which map its outputs get their goals.

    Attributes:
        view: The target's.
        out_map: (out, out') Phi_out, times what makes scores the size that they were.
        matched: (m,) outputs that have a counterpart.
        norm: Where the source's outputs are caught as its norm leaves them, which the target has not; None where they
            are caught as they are.
    """

    view: Projection
    out_map: Tensor
    matched: Tensor
    norm: Tap | None = None

    def carried(self, features: Tensor) -> Tensor:
        """(r, m) goals of the matched outputs, from the source's (r, out')."""
        rows = self.out_map.index_select(0, self.matched)
        return (rows @ features.cpu().T).T.contiguous()


@dataclass(frozen=True)
class Passage:
    """What is reconstructed from what, over which texts.

    Attributes:
        target: In memory, or read by blocks; each block's weights are changed as it is passed.
        views: Its projections.
        source: Of which the target's activations are drawn.
        source_views: Its projections.
        transport: One structure for all layers, which pairs them.
        projections: To be fitted.
        ridges: Each a lambda, of which every fit takes one.
        rank: Most of each change; full if None.
        keep_share: Of a fit's weight, that of all texts together that are kept.
        max_tokens: Longer texts are cut.
        batch_tokens: Most padded tokens of a batch.
        vocabulary: (2, v) ids in the target and in the source of the tokens that both have, whose logits in the source
            are the last block's goal. None where that is the source's stream.
        factor: (projection, target layer, source layer) -> what its goals are multiplied by, where the target does not
            norm them.
        shuffle: For the control ``permuted``.
        other_rows: Seed of a shuffle of the source's rows, for the control ``texts``: right norms, wrong tokens.
        processes: That reconstruct together: each reads a share of the texts, and all have the fits.
    """

    target: LoadedModel
    views: Architecture
    source: LoadedModel
    source_views: Architecture
    transport: Transport
    projections: Sequence[str]
    ridges: Sequence[float]
    rank: int | None
    keep_share: float
    max_tokens: int
    batch_tokens: int
    vocabulary: Tensor | None
    factor: Callable[[str, int, int], float]
    shuffle: Shuffle | None = None
    other_rows: int | None = None
    processes: Processes = ALONE

    @cached_property
    def pairs(self) -> dict[int, int]:
        """Target block -> source block, where the source advances: of blocks with one source block the first."""
        first_sources = {
            layer: layer_map.sources(layer)[0]
            for layer_map in self.transport.layer_maps.values()
            for layer in layer_map.target_layers
        }
        pairs, last_source = {}, -1
        for layer, source_layer in sorted(first_sources.items()):
            if source_layer > last_source:
                pairs[layer], last_source = source_layer, source_layer
        return pairs

    def next_paired(self, layer: int) -> int:
        """The source block before which the goal of a target block's end is read."""
        later = [source_layer for paired, source_layer in self.pairs.items() if paired > layer]
        return min(later, default=len(self.source_views.layers))

    def wanted(self, layer: int) -> dict[str, Wanted]:
        """What is fitted of a target block; empty where it has no counterpart."""
        if layer not in self.pairs:
            return {}
        source_layer, wanted = self.pairs[layer], {}
        maps = self.transport.feature_maps(layer)
        for projection in self.transport.projections_of(layer):
            key = feature_key(projection, "post")
            if projection not in self.projections or (key, source_layer) not in maps:
                continue
            out_map = maps[key, source_layer].phi_out("barycentric")
            if self.shuffle is not None:
                out_map = out_map.index_select(0, self.shuffle(layer, key, out_map.shape[0]))
            matched = (~unmatched(out_map, 0)).nonzero().flatten()
            heads, norm = self.views.attention[layer], None
            if heads is not None and projection in heads.normed:
                factor = self._own_size((layer, source_layer), key, out_map, matched)
            else:
                factor = self.factor(projection, layer, source_layer)
                # Scores are made of what is behind the source's norm, and do not tell how large what is before it was.
                norm = self.source_views.norm_taps[source_layer].get(projection)
            wanted[projection] = Wanted(self.views.layers[layer][projection], out_map * factor, matched, norm)
        return wanted

    def _own_size(self, layers: tuple[int, int], key: str, out_map: Tensor, matched: Tensor) -> float:
        """What makes goals as large as the target's own outputs, where its own norm makes their size of no account.

        Much smaller ones would hardly count beside what the weights give as they are, which a ridge holds on to.
        """
        statistics, (layer, source_layer) = self.transport.statistics, layers
        own = statistics.target[layer, key].magnitude[matched].mean()
        goals = (out_map.index_select(0, matched) @ statistics.source[source_layer, key].magnitude).abs().mean()
        return float(own / goals) if own > 0 and goals > 0 else 1.0


def readings(
    passage: Passage,
    texts: Sequence[str],
    keep: Sequence[str],
    choosing: tuple[Sequence[str], Sequence[str]] = ((), ()),
) -> tuple[Reading, Reading, Reading, Rows]:
    """The target's reading of all texts, its reading of those to be kept, the source's of the others, and the rows.

    Args:
        passage: The models, and how.
        texts: On which the target is drawn to the source.
        keep: On which it is to stay as it is.
        choosing: Of either kind, those on which lambda is chosen.

    Raises:
        FusionError: There are fewer texts than processes.
    """
    target, source, most = passage.target, passage.source, passage.max_tokens
    limits = encode(target, [], most).limit, encode(source, [], most).limit

    def ends_of(some_texts: Sequence[str], model: LoadedModel, limit: int) -> tuple[tuple[int, ...], ...]:
        if not some_texts:
            return ()
        both_limits, all_positions = (limits[0], limit), len(some_texts) * most
        return common_ends(
            target.tokenizer, model.tokenizer, some_texts, limits=both_limits, wanted=all_positions, seed=0
        )

    drawn, own = [*texts, *choosing[0]], [*keep, *choosing[1]]
    drawn_ends, own_ends = ends_of(drawn, source, limits[1]), ends_of(own, target, limits[0])
    drawn_count, kept_count = len(texts), len(keep)
    # In the order in which rows are numbered.
    ordered = [*drawn_ends[:drawn_count], *own_ends[:kept_count], *drawn_ends[drawn_count:], *own_ends[kept_count:]]
    listed = [*texts, *keep, *choosing[0], *choosing[1]]
    rows, count = [], 0
    for text_ends in ordered:
        rows.append(list(range(count, count + len(text_ends))))
        count += len(text_ends)
    first, second, third = itertools.accumulate((drawn_count, kept_count, len(choosing[0])))
    fit, keeping, chosen, chosen_kept = rows[:first], rows[first:second], rows[second:third], rows[third:]
    here = token_positions(target.tokenizer, listed, ordered, limits[0])
    there = token_positions(source.tokenizer, drawn, drawn_ends, limits[1])
    size = most, passage.batch_tokens
    source_rows = [*_source_rows(fit, passage.other_rows), *_source_rows(chosen, passage.other_rows)]
    counts = [sum(map(len, group)) for group in (fit, keeping, chosen, chosen_kept)]
    mine = _share(rows, passage.processes)
    return (
        Reading.of(target, listed, *_only(mine, here, rows), *size),
        Reading.of(target, own, *_only(mine, [*here[first:second], *here[third:]], [*keeping, *chosen_kept]), *size),
        Reading.of(source, drawn, *_only(mine, there, source_rows), *size),
        Rows(counts[0], counts[1], passage.keep_share, counts[2], counts[3]),
    )


def _share(rows: Sequence[Sequence[int]], processes: Processes) -> set[int]:
    """The rows of the texts that this process reads: long and short ones, as the others do."""
    texts = sorted(filter(None, rows), key=len, reverse=True)
    if len(texts) < processes.count:
        raise FusionError(
            f"{processes.count} processes have {len(texts)} texts to reconstruct on; begin fewer of them, or give more "
            "texts (calibration.texts)"
        )
    return set(itertools.chain.from_iterable(processes.mine(texts)))


def _only(
    mine: set[int], positions: Sequence[Sequence[int]], rows: Sequence[Sequence[int]]
) -> tuple[list[list[int]], list[list[int]]]:
    """Of each text's tokens and their rows, those that this process reads."""
    kept = [
        [(position, row) for position, row in zip(of_text, text_rows, strict=True) if row in mine]
        for of_text, text_rows in zip(positions, rows, strict=True)
    ]
    return [[position for position, _ in of_text] for of_text in kept], [
        [row for _, row in of_text] for of_text in kept
    ]


def _source_rows(rows: list[list[int]], seed: int | None) -> list[list[int]]:
    """Whose goals the source's tokens are: their own, or, with a seed, those of any others."""
    if seed is None:
        return rows
    numbers = [row for text_rows in rows for row in text_rows]
    order = iter(torch.randperm(len(numbers), generator=torch.Generator().manual_seed(seed)).tolist())
    return [[numbers[next(order)] for _ in text_rows] for text_rows in rows]
