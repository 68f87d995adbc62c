r"""Reconstruction: what each neuron of the target should do, fitted in closed form, block by block.

The source and the target advance over the same texts, one block at a time. In the order in which the target's block
computes (q k v; o; gate up; down), each projection W is changed by

    dW = argmin |X (W + dW)^T - Y|^2 + lambda m |dW|^2          (`tmerge.fusion.ridge`)

X (R, in) is what it reads now, after all that was fitted before it; a row is a token that both models end in the same
place, the first of each text left out. Y (R, out) is

* for q k v gate up: what the counterparts give in the source's block, before rotary angles and the activation; behind
  the source's norm of q and k where the target has none, as its scores do not depend on the size before it;
* for o: the source's stream after its attention, less the target's stream before it;
* for down: the source's stream as it enters the next paired block, less the target's stream after its attention: what
  blocks without a counterpart would add is folded into the block before them;
* where a block scales or norms what o and down give before it adds it, the output that is then added as the above
  (`tmerge.fusion.addition`);
* for the last down, where both have one vocabulary: the stream that gives the source's logits through the target's own
  norm and head (`tmerge.fusion.logit_goal`), less the same.

The stream's rows are weighted by one over their root mean square. Texts to be kept have the target's own activations,
from before any change, as their Y, and, however many they are, a share of all the weight that is given. What has no
counterpart keeps what it has. Nothing is trained.

Several processes read a share of the texts each, and add up their sums.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from tmerge.fusion.addition import ADDING, Addition, additions_of
from tmerge.fusion.block_fit import BlockFit, FittedBlock, caught_in, taps_of
from tmerge.fusion.logit_goal import FinalGoal, LogitGoal
from tmerge.fusion.merge import TransportedNeurons, fuse
from tmerge.fusion.passage import Goals, Passage, Reading, Rows, Wanted, readings
from tmerge.fusion.selection import COLUMN_PROJECTIONS
from tmerge.models import LoadedModel, Readout, feature_key
from tmerge.models.blocks import BlockCall, Steps, base_pass, hidden_of, stepped

__all__ = ["reconstruct"]


def reconstruct(
    passage: Passage,
    texts: Sequence[str],
    keep: Sequence[str],
    folder: Path,
    *,
    choosing: tuple[Sequence[str], Sequence[str]] = ((), ()),
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
        choosing: Of either kind, those on which each fit's lambda is chosen.
        finished: What was fitted of the first blocks before, in an earlier run of the same: it is not fitted again.
        take: Is handed each block that was fitted, to be kept; in their order. The same in all processes.
        progress: Called with (blocks done, all); may raise to stop.

    Raises:
        FusionError: A fit has no single solution; or there are fewer texts than processes.
        TokenizerError: The two tokenizers hardly ever end a token in the same place.
        UnsupportedModelError: A block does more to its stream than adding what its attention and its MLP give.
    """
    target_reading, own_reading, source_reading, rows = readings(passage, texts, keep, choosing)
    goals = Goals(folder, target_reading.rows)
    final = _final_goal(passage, target_reading, rows)
    layers = len(passage.views.layers)
    fits = len(target_reading.batches)
    with (
        closing(goals),
        stepped(passage.target, _passes(passage.target, target_reading, own_reading)) as steps,
        stepped(passage.source, _passes(passage.source, source_reading)) as source_steps,
    ):
        source = _Source(passage, source_steps, source_reading, final)
        for layer in range(layers):
            began = time.perf_counter()
            goals.begin()
            calls = steps.calls(layer)
            wanted = passage.wanted(layer)
            done_before = layer < len(finished)
            if wanted:
                source.advance(layer, wanted, None if done_before else goals)
            additions: dict[str, Addition] = {}
            if not done_before and not wanted.keys().isdisjoint(ADDING):
                additions = additions_of(passage.target, layer, calls[0], passage.views.layers[layer], ADDING)
            ends = _own(passage, layer, wanted, additions, calls[fits:], own_reading, None if done_before else goals)
            block = None
            if done_before:
                fuse(passage.views.layers, finished[layer], 1.0)
            else:
                goal: FinalGoal = "stream" if final is None or layer + 1 < layers else "logits"
                block = BlockFit(
                    passage, layer, wanted, additions, calls[:fits], target_reading, goals, rows, goal
                ).fitted()
            for batch, call in enumerate(calls[:fits]):
                steps.go_on(batch, call.run())
            for batch, result in enumerate(ends):
                steps.go_on(fits + batch, result)
            del calls, ends
            if block is not None:
                timed = block.note.model_copy(update={"seconds": time.perf_counter() - began})
                take(replace(block, note=timed))
            if progress is not None:
                progress(layer + 1, layers)


def _passes(loaded: LoadedModel, *readings: Reading) -> list[Callable[[], Any]]:
    return [base_pass(loaded, batch) for reading in readings for batch in reading.batches]


def _final_goal(passage: Passage, reading: Reading, rows: Rows) -> LogitGoal | None:
    """What the last block's down is fitted to; None for the source's stream."""
    down = passage.wanted(len(passage.views.layers) - 1).get("down")
    if passage.vocabulary is None or down is None:
        return None
    target, source = Readout.of(passage.target), Readout.of(passage.source)
    # What neurons without a counterpart say would have to be taken off.
    if target is None or source is None or len(down.matched) < down.view.out_features:
        return None
    counts = reading.token_counts(passage.target.embedding_rows, rows.texts)
    passage.processes.summed(counts)
    return LogitGoal.of(target, source, passage.vocabulary, counts, passage.processes)


def _rowwise(wanted: Mapping[str, Wanted]) -> list[str]:
    """Those whose own outputs are the goals; of the others it is the stream."""
    return [name for name in wanted if name not in COLUMN_PROJECTIONS]


class _Source:
    """The source's passes, which stand before a block that some target block is paired with."""

    def __init__(self, passage: Passage, steps: Steps, reading: Reading, final: LogitGoal | None) -> None:
        self._passage, self._steps, self._reading, self._final = passage, steps, reading, final
        self._at = 0

    def advance(self, layer: int, wanted: Mapping[str, Wanted], goals: Goals | None) -> None:
        """Read the goals of a target block on its paired block, and go on to the next paired one."""
        passage, source_layer = self._passage, self._passage.pairs[layer]
        while self._at < source_layer:
            self._pass({}, None, None)
        following = passage.next_paired(layer)
        # The stream as it leaves the last block before the next paired one is what the target's block should give.
        down = wanted.get("down") if goals is not None else None
        self._pass(wanted, goals, down if self._at + 1 == following else None)
        while self._at < following:
            self._pass({}, goals, down if self._at + 1 == following else None)

    def _pass(self, wanted: Mapping[str, Wanted], goals: Goals | None, out: Wanted | None) -> None:
        views = self._passage.source_views.layers[self._at]
        plain = [name for name in _rowwise(wanted) if wanted[name].norm is None]
        taps, attention = taps_of(self._passage.source_views, self._at, plain, "post"), None
        taps += [norm for name in _rowwise(wanted) if (norm := wanted[name].norm) is not None]
        for batch, call in enumerate(self._steps.calls(self._at)):
            if goals is None or not wanted:
                result = call.run()
            else:
                if batch == 0 and "o" in wanted:
                    # The goal of o is made of what attention adds; that of down is read where the next block begins.
                    attention = additions_of(self._passage.source, self._at, call, views, ["o"])["o"]
                    taps.append(attention.tap)
                result, caught = caught_in(call, taps)
                self._goals_of(batch, call, caught, wanted, attention, goals)
            if out is not None and goals is not None:
                ends = self._reading.rows_of(batch, hidden_of(result))
                wanted_end = out.carried(ends)
                if self._final is not None and self._at + 1 == len(self._passage.source_views.layers):
                    wanted_end = self._final.stream(wanted_end, ends)
                goals.write("out", self._reading.places[batch][1], wanted_end)
            self._steps.go_on(batch, result)
        self._at += 1

    def _goals_of(
        self,
        batch: int,
        call: BlockCall,
        caught: Mapping[str, Tensor],
        wanted: Mapping[str, Wanted],
        attention: Addition | None,
        goals: Goals,
    ) -> None:
        rows = self._reading.places[batch][1]
        for projection in _rowwise(wanted):
            features = self._reading.rows_of(batch, caught[feature_key(projection, "post")])
            goals.write(projection, rows, wanted[projection].carried(features))
        if attention is not None:
            middle = self._reading.rows_of(batch, call.hidden) + self._reading.rows_of(batch, attention.added(caught))
            goals.write("middle", rows, wanted["o"].carried(middle))


def _own(
    passage: Passage,
    layer: int,
    wanted: Mapping[str, Wanted],
    additions: Mapping[str, Addition],
    calls: Sequence[BlockCall],
    reading: Reading,
    goals: Goals | None,
) -> list[Any]:
    """What the block gives, unchanged, on the texts that are kept: their goals, and where their passes go on from."""
    results = []
    taps = taps_of(passage.views, layer, _rowwise(wanted), "post")
    if "o" in additions and "o" in wanted:
        taps.append(additions["o"].tap)
    for batch, call in enumerate(calls):
        if goals is None or not wanted:
            results.append(call.run())
            continue
        result, caught = caught_in(call, taps)
        rows = reading.places[batch][1]
        for projection in _rowwise(wanted):
            features = reading.rows_of(batch, caught[feature_key(projection, "post")])
            goals.write(projection, rows, features[:, wanted[projection].matched])
        if "o" in wanted:
            middle = reading.rows_of(batch, call.hidden) + reading.rows_of(batch, additions["o"].added(caught))
            goals.write("middle", rows, middle[:, wanted["o"].matched])
        if "down" in wanted:
            goals.write("out", rows, reading.rows_of(batch, hidden_of(result))[:, wanted["down"].matched])
        results.append(result)
    return results
