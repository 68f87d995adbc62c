"""Reconstruction between strangers: SmolLM2 drawn to Gemma 3's residual stream through a linear map of it.

    python -m tests.bench.strangers [--texts 150] [--map english both] [--from 0 15 27] [--steps 0.1 0.5 1]

Blocks are paired in order. For each pair a ridge regression, fitted on tokens that both models end in the same place,
maps the source's stream to the target's; then ``down`` alone is fitted so that the target's stream is what the map
makes of the source's (`tmerge.fusion.reconstruct`). Prints, as JSON lines, the map's R^2 on held-out tokens, and bits
per byte on held-out Indonesian sentences, and on the English ones that are kept, at each step.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tmerge.calibration import sample_texts
from tmerge.calibration.texts import is_held_out
from tmerge.evaluation import applied, score_texts
from tmerge.fusion import Passage, TransportedNeurons, reconstruct
from tmerge.fusion.passage import Wanted, readings
from tmerge.fusion.ridge import Linear, Regression
from tmerge.models import LoadedModel, describe, load_model

TARGET, SOURCE = "demo:smollm2-135m-instruct", "demo:gemma-3-270m"
HELD_OUT, RIDGE = 0.25, 0.1


@dataclass(frozen=True)
class StrangePassage(Passage):
    """A passage through maps of the stream; there is no transport.

    Attributes:
        start: The first target block that is fitted.
        maps: Target block -> (n, n') of the stream as it leaves it.
    """

    start: int = 0
    maps: dict[int, Tensor] | None = None

    @cached_property
    def pairs(self) -> dict[int, int]:
        blocks, others = len(self.views.layers), len(self.source_views.layers)
        firsts = {other: -(-other * blocks // others) for other in range(others)}
        return {block: other for other, block in firsts.items() if block >= self.start}

    def wanted(self, layer: int) -> dict[str, Wanted]:
        if layer not in self.pairs or self.maps is None:
            return {}
        view = self.views.layers[layer]["down"]
        return {"down": Wanted(view, self.maps[layer], torch.arange(view.out_features))}


def passage(target: LoadedModel, source: LoadedModel, start: int, maps: dict[int, Tensor] | None) -> StrangePassage:
    models = target, describe(target.model), source, describe(source.model)
    how = {"projections": ["down"], "ridges": [RIDGE], "rank": None, "keep_share": 0.5, "vocabulary": None}
    sizes = {"max_tokens": 256, "batch_tokens": 2048}
    return StrangePassage(*models, None, **how, **sizes, factor=lambda *_: 1.0, start=start, maps=maps)  # type: ignore[arg-type]


@torch.no_grad()
def streams(loaded: LoadedModel, reading: Any, rows: int) -> list[Tensor]:
    """(R, n) of the stream as it enters each block."""
    found: list[Tensor] = []
    for batch, (ids, mask) in enumerate(reading.batches):
        heard = loaded.base(input_ids=ids, attention_mask=mask, use_cache=False, output_hidden_states=True)
        places = reading.places[batch][1]
        for place, hidden in enumerate(heard.hidden_states[:-1]):  # the last has been normed
            values = reading.rows_of(batch, hidden)
            if len(found) == place:
                found.append(torch.zeros(rows, values.shape[1]))
            found[place][places] = values
    return found


def stream_maps(
    target: LoadedModel, source: LoadedModel, texts: Sequence[str]
) -> tuple[dict[int, Tensor], dict[int, float]]:
    """Target block -> its map, and the map's R^2 on tokens of texts that it was not fitted on."""
    sides: tuple[list[str], list[str]] = ([], [])
    for text in texts:
        sides[is_held_out(text, 1, 0.2)].append(text)
    way = passage(target, source, 0, None)
    read = []
    for side in sides:
        mine, _, theirs, rows = readings(way, side, ())
        read.append((streams(target, mine, rows.count), streams(source, theirs, rows.count)))
    (mine, theirs), (mine_held, theirs_held) = read
    maps, explained = {}, {}
    for block in way.pairs:
        # Where its goal is read: before the next paired block; of the last, which no block follows, where it begins.
        here, there = min(block + 1, len(mine) - 1), min(way.next_paired(block), len(theirs) - 1)
        x, y = theirs[there], mine[here]
        sums = Regression(x.shape[1], [y.shape[1]], has_bias=False)
        sums.add(x, [y], y.square().mean(1).rsqrt())
        (fit,) = sums.solve([Linear(torch.zeros(y.shape[1], x.shape[1]))], [1e-2])
        maps[block] = fit.weight
        x, y = theirs_held[there], mine_held[here]
        weights = y.square().mean(1, keepdim=True).rsqrt()
        y, made = y * weights, x @ fit.weight.T * weights
        explained[block] = 1 - float((y - made).square().sum() / (y - y.mean(0)).square().sum())
    return maps, explained


def fitted(way: StrangePassage, texts: Sequence[str], keep: Sequence[str]) -> list[TransportedNeurons]:
    """What every block's ``down`` is changed by."""
    items: list[TransportedNeurons] = []
    with tempfile.TemporaryDirectory() as folder:
        reconstruct(way, texts, keep, Path(folder), take=lambda block: items.extend(block.items))
    return items


def main() -> None:
    """Fit, and score."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--texts", type=int, default=150)
    parser.add_argument("--map", nargs="+", choices=["english", "both"], default=["english", "both"])
    parser.add_argument("--from", dest="starts", type=int, nargs="+", default=[0, 15, 27])
    parser.add_argument("--steps", type=float, nargs="+", default=[0.1, 0.5, 1.0])
    asked = parser.parse_args()
    indonesian, english = (sample_texts(name) for name in ("indonesian", "english"))
    held_out = [text for text in indonesian if is_held_out(text, 0, HELD_OUT)]
    texts = [text for text in indonesian if not is_held_out(text, 0, HELD_OUT)][: asked.texts]
    target, source = (load_model(name, dtype="float32", device="cpu") for name in (TARGET, SOURCE))
    say({"target": score_texts(target, held_out).bits_per_byte, "source": score_texts(source, held_out).bits_per_byte})
    for kind in asked.map:
        maps, explained = stream_maps(target, source, [*english, *(texts if kind == "both" else [])])
        say({"map": kind, "R2": {block: round(value, 3) for block, value in explained.items()}})
        for start in asked.starts:
            target = load_model(TARGET, dtype="float32", device="cpu")
            items = fitted(passage(target, source, start, maps), texts, english)
            target = load_model(TARGET, dtype="float32", device="cpu")
            for step in asked.steps:
                with applied(describe(target.model).layers, items, step):
                    found = [score_texts(target, of).bits_per_byte for of in (held_out, english)]
                say({"map": kind, "from": start, "blocks": len(items), "step": step, "indonesian, english": found})


def say(line: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(line) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
