r"""Reconstruction: what each neuron of the target should do, fitted in closed form, block by block.

The source and the target advance over the same texts, one block at a time. In the order in which the target's block
computes (q k v; o; gate up; down), each projection W is changed by

    dW = argmin |X (W + dW)^T - Y|^2 + lambda m |dW|^2          (`tmerge.fusion.ridge`)

X (R, in) is what it reads now, after all that was fitted before it; a row is a token that both models end in the same
place, the first of each text left out. Y (R, out) is

* for q k v gate up: what the counterparts give in the source's block, before rotary angles and the activation;
* for o: the source's stream after its attention, less the target's stream before it;
* for down: the source's stream as it enters the next paired block, less the target's stream after its attention: what
  blocks without a counterpart would add is folded into the block before them.

The stream's rows are weighted by one over their root mean square. Texts to be kept have the target's own activations,
from before any change, as their Y. What has no counterpart keeps what it has. Nothing is trained.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tmerge.calibration.batches import encode, length_batches, padded
from tmerge.calibration.positions import common_ends, token_positions
from tmerge.errors import UnsupportedModelError
from tmerge.fusion.maps import unmatched
from tmerge.fusion.merge import TransportedNeurons, fuse
from tmerge.fusion.ridge import Fit, Regression
from tmerge.fusion.selection import COLUMN_PROJECTIONS
from tmerge.models import Architecture, LoadedModel, Projection, Tap, feature_key
from tmerge.models.blocks import BlockCall, Steps, hidden_of, stepped
from tmerge.transport import Transport

__all__ = ["FittedBlock", "Passage", "Shuffle", "reconstruct"]

# In the order of a block's own computation; those of one group read the same input.
GROUPS = (("q", "k", "v"), ("o",), ("gate", "up"), ("down",))
# A block that adds what o and down give, and nothing else, does so to this part of what it gives, in bfloat16 as well.
_ADDS = 0.02

Errors = dict[str, tuple[float | None, float | None]]
"""Projection -> |Y - X W^T|^2 / |Y|^2 before and after its fit."""

Shuffle = Callable[[int, str, int], Tensor]
"""(layer, feature key, n) -> a permutation (n,) of the target's neurons."""


@dataclass(frozen=True)
class FittedBlock:
    """What a block of the target is changed by.

    Attributes:
        layer: Its number.
        items: The change of each projection that was fitted; none where it has no counterpart.
        errors: Of each.
        norms: Of each the change's norm to the weight's own; None where that is zero.
        rows: R, that were fitted.
    """

    layer: int
    items: list[TransportedNeurons]
    errors: Errors
    norms: dict[str, float | None]
    rows: int

    def note(self) -> dict[str, Any]:
        """All but the changes themselves, as JSON values."""
        errors = {name: list(pair) for name, pair in self.errors.items()}
        return {"errors": errors, "norms": self.norms, "rows": self.rows}


class _Enough(Exception):
    """Ends a block's pass where the last feature that is wanted has been caught."""


@dataclass(frozen=True)
class _Reading:
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
    ) -> _Reading:
        """Batches of like length, of the texts that have rows."""
        encoded = encode(loaded, texts, max_tokens)
        wanted = [text for text, found in enumerate(positions) if found]
        batches, places = [], []
        for members in reversed(length_batches([encoded.lengths[text] for text in wanted], batch_tokens)):
            chosen = [wanted[member] for member in members]
            batches.append(padded([encoded.ids[text] for text in chosen], loaded.pad_id))
            read = [(place, position) for place, text in enumerate(chosen) for position in positions[text]]
            index = torch.tensor(read, dtype=torch.int64).reshape(-1, 2)
            places.append((index, torch.tensor([row for text in chosen for row in rows[text]], dtype=torch.int64)))
        return cls(batches, places)

    def rows_of(self, batch: int, features: Tensor) -> Tensor:
        """(r, n) of (B, S, n): the batch's rows, float32."""
        index = self.places[batch][0].to(features.device)
        return features[index[:, 0], index[:, 1]].float()


class _Goals:
    """What each feature of the block at hand should be, a row for each token: mapped files, and gone with the block."""

    def __init__(self, folder: Path, rows: int) -> None:
        self._folder, self._rows = folder, rows
        self._arrays: dict[str, np.memmap[Any, Any]] = {}

    def begin(self) -> None:
        for name in list(self._arrays):
            del self._arrays[name]
            (self._folder / f"{name}.npy").unlink()

    def write(self, name: str, rows: Tensor, values: Tensor) -> None:
        """Rows (r,) of a feature, (r, n)."""
        if name not in self._arrays:
            self._folder.mkdir(parents=True, exist_ok=True)
            self._arrays[name] = np.lib.format.open_memmap(
                self._folder / f"{name}.npy", mode="w+", dtype=np.float32, shape=(self._rows, values.shape[1])
            )
        self._arrays[name][rows.numpy()] = values.cpu().numpy()

    def read(self, name: str, rows: Tensor) -> Tensor:
        return torch.from_numpy(self._arrays[name][rows.numpy()])

    def __contains__(self, name: str) -> bool:
        return name in self._arrays


@dataclass(frozen=True)
class _Wanted:
    """Of one projection of a block: through which map its outputs get their goals.

    Attributes:
        view: The target's.
        out_map: (out, out') Phi_out, times what makes scores the size that they were.
        matched: (m,) outputs that have a counterpart.
    """

    view: Projection
    out_map: Tensor
    matched: Tensor

    def carried(self, features: Tensor) -> Tensor:
        """(r, m) goals of the matched outputs, from the source's (r, out')."""
        rows = self.out_map.index_select(0, self.matched)
        return (rows @ features.cpu().T).T.contiguous()


@dataclass(frozen=True)
class Passage:
    """What is reconstructed from what, over which texts.

    Attributes:
        target: In memory; each block's weights are changed as it is passed.
        views: Its projections.
        source: Of which the target's activations are drawn.
        source_views: Its projections.
        transport: One structure for all layers, which pairs them.
        projections: To be fitted.
        ridge: lambda.
        rank: Most of each change; full if None.
        max_tokens: Longer texts are cut.
        batch_tokens: Most padded tokens of a batch.
        factor: (projection, target layer, source layer) -> what its goals are multiplied by.
        shuffle: For the control ``permuted``.
        other_rows: Seed of a shuffle of the source's rows, for the control ``texts``: right norms, wrong tokens.
    """

    target: LoadedModel
    views: Architecture
    source: LoadedModel
    source_views: Architecture
    transport: Transport
    projections: Sequence[str]
    ridge: float
    rank: int | None
    max_tokens: int
    batch_tokens: int
    factor: Callable[[str, int, int], float]
    shuffle: Shuffle | None = None
    other_rows: int | None = None

    @cached_property
    def pairs(self) -> dict[int, int]:
        """Target block -> source block, where the source advances: of blocks with one source block the first."""
        found = {layer: of.sources(layer)[0] for of in self.transport.layer_maps.values() for layer in of.target_layers}
        pairs, last = {}, -1
        for layer, other in sorted(found.items()):
            if other > last:
                pairs[layer], last = other, other
        return pairs

    def next_paired(self, layer: int) -> int:
        """The source block before which the goal of a target block's end is read."""
        later = [other for paired, other in self.pairs.items() if paired > layer]
        return min(later, default=len(self.source_views.layers))

    def wanted(self, layer: int) -> dict[str, _Wanted]:
        """What is fitted of a target block; empty where it has no counterpart."""
        if layer not in self.pairs:
            return {}
        other, found = self.pairs[layer], {}
        maps = self.transport.feature_maps(layer)
        for projection in self.transport.projections_of(layer):
            key = feature_key(projection, "post")
            if projection not in self.projections or (key, other) not in maps:
                continue
            out_map = maps[key, other].phi_out("barycentric")
            if self.shuffle is not None:
                out_map = out_map.index_select(0, self.shuffle(layer, key, out_map.shape[0]))
            matched = (~unmatched(out_map, 0)).nonzero().flatten()
            found[projection] = _Wanted(
                self.views.layers[layer][projection], out_map * self.factor(projection, layer, other), matched
            )
        return found


def reconstruct(
    passage: Passage,
    texts: Sequence[str],
    keep: Sequence[str],
    folder: Path,
    *,
    finished: Sequence[Sequence[TransportedNeurons]] = (),
    take: Callable[[FittedBlock], None],
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Fit every block of the target.

    Args:
        passage: The models, and how.
        texts: On which the target should do what the source does.
        keep: On which it should go on doing what it does.
        folder: For the goals of the block at hand; emptied after each.
        finished: What was fitted of the first blocks before, in an earlier run of the same: it is not fitted again.
        take: Is handed each block that was fitted, to be kept; in their order.
        progress: Called with (blocks done, all); may raise to stop.

    Raises:
        FusionError: A fit has no single solution.
        TokenizerError: The two tokenizers hardly ever end a token in the same place.
        UnsupportedModelError: A block does more to its stream than adding what its attention and its MLP give.
    """
    target_reading, own_reading, source_reading, rows = _readings(passage, texts, keep)
    goals = _Goals(folder, rows)
    layers = len(passage.views.layers)
    fits = len(target_reading.batches)
    with (
        stepped(passage.target, target_reading.batches + own_reading.batches) as steps,
        stepped(passage.source, source_reading.batches) as source_steps,
    ):
        source = _Source(passage, source_steps, source_reading)
        for layer in range(layers):
            goals.begin()
            calls = steps.calls(layer)
            wanted = passage.wanted(layer)
            done_before = layer < len(finished)
            if wanted:
                source.advance(layer, wanted, None if done_before else goals)
            ends = _own(passage, layer, wanted, calls[fits:], own_reading, None if done_before else goals)
            if done_before:
                fuse(passage.views.layers, finished[layer], 1.0)
            else:
                block = _Block(passage, layer, wanted, calls[:fits], target_reading, goals)
                take(block.fitted(rows))
            for batch, call in enumerate(calls[:fits]):
                steps.go_on(batch, call.run())
            for batch, result in enumerate(ends):
                steps.go_on(fits + batch, result)
            del calls, ends
            if progress is not None:
                progress(layer + 1, layers)
        goals.begin()


def _readings(passage: Passage, texts: Sequence[str], keep: Sequence[str]) -> tuple[_Reading, _Reading, _Reading, int]:
    """The target's reading of all texts, its reading of those to be kept, the source's of the others, and R."""
    target, source, most = passage.target, passage.source, passage.max_tokens
    limits = encode(target, [], most).limit, encode(source, [], most).limit
    everything = max(1, len(texts)) * most
    ends = common_ends(target.tokenizer, source.tokenizer, texts, limits=limits, wanted=everything, seed=0)
    kept_ends: tuple[tuple[int, ...], ...] = ()
    if keep:
        both = limits[0], limits[0]
        everything = len(keep) * most
        kept_ends = common_ends(target.tokenizer, target.tokenizer, keep, limits=both, wanted=everything, seed=0)
    rows, count = [], 0
    for found in (*ends, *kept_ends):
        rows.append(list(range(count, count + len(found))))
        count += len(found)
    own_rows = rows[len(texts) :]
    here = token_positions(target.tokenizer, [*texts, *keep], [*ends, *kept_ends], limits[0])
    there = token_positions(source.tokenizer, texts, ends, limits[1])
    size = most, passage.batch_tokens
    return (
        _Reading.of(target, [*texts, *keep], here, rows, *size),
        _Reading.of(target, keep, here[len(texts) :], own_rows, *size),
        _Reading.of(source, texts, there, _source_rows(rows[: len(texts)], passage.other_rows), *size),
        count,
    )


def _source_rows(rows: list[list[int]], seed: int | None) -> list[list[int]]:
    """Whose goals the source's tokens are: their own, or, with a seed, those of any others."""
    if seed is None:
        return rows
    count = sum(map(len, rows))
    order = iter(torch.randperm(count, generator=torch.Generator().manual_seed(seed)).tolist())
    return [[next(order) for _ in found] for found in rows]


class _Source:
    """The source's passes, which stand before a block that some target block is paired with."""

    def __init__(self, passage: Passage, steps: Steps, reading: _Reading) -> None:
        self._passage, self._steps, self._reading = passage, steps, reading
        self._at = 0

    def advance(self, layer: int, wanted: Mapping[str, _Wanted], goals: _Goals | None) -> None:
        """Read the goals of a target block on its paired block, and go on to the next paired one."""
        passage, other = self._passage, self._passage.pairs[layer]
        while self._at < other:
            self._pass({}, None)
        self._pass(wanted, goals)
        following = passage.next_paired(layer)
        while self._at < following:
            self._pass({}, None)
        if goals is not None and "down" in wanted:
            for batch, rows in enumerate(self._ends):
                goals.write("out", self._reading.places[batch][1], wanted["down"].carried(rows))

    def _pass(self, wanted: Mapping[str, _Wanted], goals: _Goals | None) -> None:
        views = self._passage.source_views.layers[self._at]
        taps = _taps(self._passage.source_views, self._at, [*wanted, "o"] if "o" in views else [*wanted])
        self._ends: list[Tensor] = []
        for batch, call in enumerate(self._steps.calls(self._at)):
            if goals is None or not wanted:
                result = call.run()
            else:
                if batch == 0 and {"o", "down"} & wanted.keys():
                    _refuse_unless_it_adds(self._passage.source, self._at, call, views)
                result, caught = _caught(call, taps)
                self._goals_of(batch, call, caught, wanted, goals)
            self._ends.append(self._reading.rows_of(batch, hidden_of(result)))
            self._steps.go_on(batch, result)
        self._at += 1

    def _goals_of(
        self, batch: int, call: BlockCall, caught: Mapping[str, Tensor], wanted: Mapping[str, _Wanted], goals: _Goals
    ) -> None:
        rows = self._reading.places[batch][1]
        for projection, of in wanted.items():
            if projection in COLUMN_PROJECTIONS:
                continue
            found = self._reading.rows_of(batch, caught[feature_key(projection, "post")])
            goals.write(projection, rows, of.carried(found))
        if "o" in wanted:
            middle = self._reading.rows_of(batch, call.hidden) + self._reading.rows_of(batch, caught["o.post"])
            goals.write("middle", rows, wanted["o"].carried(middle))


def _own(
    passage: Passage,
    layer: int,
    wanted: Mapping[str, _Wanted],
    calls: Sequence[BlockCall],
    reading: _Reading,
    goals: _Goals | None,
) -> list[Any]:
    """What the block gives, unchanged, on the texts that are kept: their goals, and where their passes go on from."""
    results = []
    has_attention = "o" in passage.views.layers[layer]
    taps = _taps(passage.views, layer, [*wanted, "o"] if has_attention else [*wanted])
    for batch, call in enumerate(calls):
        if goals is None or not wanted:
            results.append(call.run())
            continue
        result, caught = _caught(call, taps)
        rows = reading.places[batch][1]
        for projection, of in wanted.items():
            if projection not in COLUMN_PROJECTIONS:
                found = reading.rows_of(batch, caught[feature_key(projection, "post")])
                goals.write(projection, rows, found[:, of.matched])
        if "o" in wanted:
            middle = reading.rows_of(batch, call.hidden) + reading.rows_of(batch, caught["o.post"])
            goals.write("middle", rows, middle[:, wanted["o"].matched])
        if "down" in wanted:
            goals.write("out", rows, reading.rows_of(batch, hidden_of(result))[:, wanted["down"].matched])
        results.append(result)
    return results


@dataclass(frozen=True)
class _Block:
    """The fits of one target block."""

    passage: Passage
    layer: int
    wanted: Mapping[str, _Wanted]
    calls: Sequence[BlockCall]
    reading: _Reading
    goals: _Goals

    def fitted(self, rows: int) -> FittedBlock:
        """Fit group after group, each written into the target before the next is read."""
        items: list[TransportedNeurons] = []
        errors: Errors = {}
        norms: dict[str, float | None] = {}
        if {"o", "down"} & self.wanted.keys():
            _refuse_unless_it_adds(
                self.passage.target, self.layer, self.calls[0], self.passage.views.layers[self.layer]
            )
        for group in GROUPS:
            names = [name for name in group if name in self.wanted]
            if not names:
                continue
            for name, fit in self._fits(names).items():
                items.append(self._item(name, fit))
                errors[name] = fit.before, fit.after
                own = float(torch.linalg.vector_norm(self.wanted[name].view.weight().double()))
                norms[name] = float(torch.linalg.vector_norm(fit.weight.double())) / own if own else None
            fuse(self.passage.views.layers, items[-len(names) :], 1.0)
        return FittedBlock(self.layer, items, errors, norms, rows)

    def _fits(self, names: Sequence[str]) -> dict[str, Fit]:
        device = self.wanted[names[0]].view.weight().device
        sums = {
            name: Regression(of.view.in_features, len(of.matched), has_bias=of.view.has_bias, device=device)
            for name, of in ((name, self.wanted[name]) for name in names)
        }
        taps = _taps(self.passage.views, self.layer, [*names, "o"] if names == ["down"] else names, outputs=True)
        weights = {name: self.wanted[name].view.weight().float() for name in names}
        biases = {name: self.wanted[name].view.bias() for name in names}
        for batch, call in enumerate(self.calls):
            caught = _caught(call, taps, whole=False)[1]
            rows = self.reading.places[batch][1]
            for name in names:
                of = self.wanted[name]
                inputs = self.reading.rows_of(batch, caught[feature_key(name, "pre")])
                wanted, weighting = self._goal(name, batch, call, caught, rows)
                wanted = wanted.to(device)
                given = inputs @ weights[name][of.matched].T
                bias = biases[name]
                if bias is not None:
                    given = given + bias[of.matched].float()
                sums[name].add(inputs, wanted - given, wanted, None if weighting is None else weighting.to(device))
        return {name: of.solve(self.passage.ridge, self.passage.rank) for name, of in sums.items()}

    def _goal(
        self, name: str, batch: int, call: BlockCall, caught: Mapping[str, Tensor], rows: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """(r, m) that the projection should give, and (r,) the rows' weights."""
        if name not in COLUMN_PROJECTIONS:
            return self.goals.read(name, rows), None
        stream = self.reading.rows_of(batch, call.hidden)
        if name == "down" and "o.post" in caught:
            stream = stream + self.reading.rows_of(batch, caught["o.post"])
        goal = self.goals.read("middle" if name == "o" else "out", rows)
        weighting = goal.square().mean(1).clamp_min(torch.finfo(torch.float32).tiny).rsqrt()
        return goal - stream[:, self.wanted[name].matched].cpu(), weighting

    def _item(self, name: str, fit: Fit) -> TransportedNeurons:
        """A fit as what fusing adds: rows of the outputs with a counterpart, or all columns."""
        of = self.wanted[name]
        if name not in COLUMN_PROJECTIONS:
            bias = None if fit.bias is None else fit.bias.cpu()
            return TransportedNeurons(self.layer, name, of.matched, fit.weight.cpu(), bias, is_difference=True)
        weight = torch.zeros(of.view.out_features, of.view.in_features)
        weight[of.matched] = fit.weight.cpu()
        bias = None
        if fit.bias is not None:
            bias = torch.zeros(of.view.out_features)
            bias[of.matched] = fit.bias.cpu()
        neurons = torch.arange(of.view.in_features)
        return TransportedNeurons(self.layer, name, neurons, weight, bias, is_difference=True)


def _taps(views: Architecture, layer: int, projections: Sequence[str], *, outputs: bool = False) -> list[Tap]:
    """Where a block's features are caught: those after its projections, and with `outputs` false none before."""
    wanted = {feature_key(name, side) for name in projections for side in (("pre", "post") if outputs else ("post",))}
    return [tap for tap in views.taps(list(dict.fromkeys(projections))) if tap.layer == layer and tap.key in wanted]


def _caught(call: BlockCall, taps: Sequence[Tap], *, whole: bool = True) -> tuple[Any, dict[str, Tensor]]:
    """What a block makes of a batch, and the features caught on the way.

    Args:
        call: The batch.
        taps: What to catch.
        whole: Whether the block is run to its end; else up to the last tap, and nothing is returned of it.
    """
    caught: dict[str, Tensor] = {}
    batch = len(call.hidden)

    def hook(tap: Tap) -> Callable[..., None]:
        def hear(module: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
            caught[tap.key] = tap.read(inputs, output, batch)
            if not whole and len(caught) == len(taps):
                raise _Enough

        return hear

    handles = [tap.module.register_forward_hook(hook(tap)) for tap in taps]
    try:
        with torch.no_grad():
            return call.run(), caught
    except _Enough:
        return None, caught
    finally:
        for handle in handles:
            handle.remove()


def _refuse_unless_it_adds(loaded: LoadedModel, layer: int, call: BlockCall, views: Mapping[str, Projection]) -> None:
    """Check on one batch that the block's stream is what came in and what o and down give, unscaled and un-normed."""
    names = [name for name in ("o", "down") if name in views]
    taps = [
        Tap(feature_key(name, "post"), layer, views[name].module, "post", views[name].out_features, views[name].rows)
        for name in names
    ]
    result, caught = _caught(call, taps)
    made = hidden_of(result).float() - call.hidden.float()
    given = sum((caught[tap.key].float() for tap in taps), torch.zeros_like(made))
    if float((made - given).norm()) > _ADDS * float(made.norm()):
        raise UnsupportedModelError(
            f"{loaded.reference}: block {layer} of {loaded.model.config.model_type} does more to the residual stream "
            "than adding what its attention and its MLP give, so o and down cannot be reconstructed; set "
            "fusion.projections: [q, k, v, gate, up], or fusion.what: task-vector"
        )
