"""What carries over between two models: every setting of transport on one pair, each on the same held-out texts.

    python -m tests.bench.transfer --pair FOLDER [--only NAME ...]

FOLDER is what ``tests.bench.relatives`` wrote. Each row is printed as one JSON line and kept in FOLDER/rows.jsonl; a
row that is there is not measured again. Where the truth is known, an oracle is measured beside: the same task vector
through the true correspondence.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from tests.bench.pair import ALL, ATTENTION, Pair
from tests.bench.rivals import Rivals
from tmerge.evaluation import applied, difference, noise, resamples, score_texts, shrink
from tmerge.fusion import TransportedNeurons
from tmerge.recipe import Apart, Shared, TaskVector, TransportSettings, Weights
from tmerge.transport import relatedness


def as_large_as_learned(
    pair: Pair, items: list[TransportedNeurons], others: dict[int, int]
) -> list[TransportedNeurons]:
    """Each transported weight of the size of what it came from: the same root mean square, which averaging took."""
    source, base = (pair.layouts[role].views for role in ("source", "base"))
    last = {len(pair.layouts["target"].layers): len(pair.layouts["source"].layers)}
    scaled = []
    for item in items:
        layer = (others | last)[item.layer]
        learned = source[layer][item.projection].weight() - base[layer][item.projection].weight()
        factor = learned.square().mean().sqrt() / item.weight.square().mean().sqrt()
        scaled.append(replace(item, weight=item.weight * factor))
    return scaled


def shared(**more: Any) -> Shared:
    return Shared(**more)


def rows_of(pair: Pair) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Name -> what is measured: a merge as (transported, alpha), or figures."""

    def merge(
        kind: str, transport: TransportSettings, control: str = "", alpha: float = 1.0, **fusion: Any
    ) -> Callable[[], tuple[list[TransportedNeurons], float]]:
        own: dict[str, Any] = {"projections": ALL, "top_k": 1.0, "alpha": alpha} | fusion
        settings = Weights(**own) if own.get("what") == "weights" else TaskVector(**{"stream": False} | own)

        def build() -> tuple[list[TransportedNeurons], float]:
            carried = pair.carried(kind, transport, settings, control == "permuted")
            items = carried.permuted if control == "permuted" else carried.transported
            if control == "noise":
                items = noise(pair.layouts["target"].views, items, 0)
            if control == "shrink":
                items = shrink(pair.layouts["target"].views, items)
            if control == "norm":
                items = as_large_as_learned(pair, items, pair.structure(kind, transport.epsilon, False).pairs)
            return items, alpha

        return build

    def true(alpha: float, projections: tuple[str, ...] = ALL, stream: bool = False, what: str = "task-vector") -> Any:
        return lambda: (pair.oracle(projections, stream, what), alpha)

    def related(kind: str) -> Any:
        target, source = pair.sides(kind)
        pairs = pair.structure(kind, None, False).pairs
        return relatedness(target, source, pairs, pair.store("target", kind).texts, seed=0).to_dict()

    def by_weights(kind: str) -> Any:
        agreement = pair.structure(kind, None, False, True).agreement
        assert agreement is not None  # both have weights
        return asdict(agreement)

    if pair.truth is not None:
        for kind in ("tokens", "texts"):
            yield f"found/{kind}", lambda kind=kind: pair.found(kind, None)
        yield "found/by-weights", lambda: pair.found("tokens", None, False, True)
        yield "found/signed", lambda: pair.found("tokens", None, True)
        yield "found/entropic-0.03", lambda: pair.found("tokens", 0.03)
    for kind in ("tokens", "texts"):
        yield f"relatedness{'' if kind == 'tokens' else '/texts'}", lambda kind=kind: related(kind)
    yield "relatedness/weights", lambda: by_weights("tokens")
    for alpha in (0.5, 1.0, 1.5, 2.0):
        yield f"all+stream/alpha-{alpha:g}", merge("tokens", shared(), alpha=alpha, stream=True)
        yield f"all/alpha-{alpha:g}", merge("tokens", shared(), alpha=alpha)
        if pair.truth is not None:
            yield f"oracle/all+stream/alpha-{alpha:g}", true(alpha, stream=True)
            yield f"oracle/all/alpha-{alpha:g}", true(alpha)
    for control in ("permuted", "noise", "shrink"):
        yield f"control/{control}", merge("tokens", shared(), control, stream=True)
    for alpha in (1.0, 1.5):
        yield f"attention/alpha-{alpha:g}", merge("tokens", shared(), alpha=alpha, projections=ATTENTION)
        if pair.truth is not None:
            yield f"oracle/attention/alpha-{alpha:g}", true(alpha, ATTENTION)
    for top_k in (0.1, 0.5):
        yield f"top-{top_k:g}", merge("tokens", shared(), stream=True, top_k=top_k)
    yield "mlp/alpha-1", merge("tokens", shared(), projections=ALL[4:])
    yield "texts", merge("texts", shared(), stream=True)
    yield "signed", merge("tokens", shared(signed=True), stream=True)
    for epsilon in (0.1, 0.03, 0.01, 0.005):
        yield f"entropic-{epsilon:g}", merge("tokens", shared(matching="entropic", epsilon=epsilon), stream=True)
        entropic = {kept: shared(matching="entropic", epsilon=epsilon, entries_kept=kept) for kept in (1, 4, 16, 128)}
        for kept in (1, 4, 16):
            yield f"entropic-{epsilon:g}/mutual-{kept}", merge("tokens", entropic[kept], stream=True)
        yield f"entropic-{epsilon:g}/norm", merge("tokens", entropic[128], "norm", stream=True)
    for kind in ("last", "first", "tokens-250", "tokens-500", "tokens-1000"):
        if pair.truth is not None:
            yield f"found/{kind}", lambda kind=kind: pair.found(kind, None)
        yield f"features/{kind}", merge(kind, shared(), stream=True)
    for kind in ("tokens", "texts"):
        for rival in ("procrustes", "ridge"):
            yield f"{rival}/{kind}", merge(kind, shared(map=rival))
        yield f"plan-beside-rivals/{kind}", merge(kind, shared())
    for penalty in (0.0001, 0.001, 0.01, 1.0):
        yield f"ridge-{penalty:g}/tokens", merge("tokens", shared(map="ridge", ridge=penalty))
    for alpha in (0.1, 0.3, 1.0):
        yield f"weights/alpha-{alpha:g}", merge("tokens", shared(), alpha=alpha, what="weights")
    for control in ("permuted", "noise", "shrink"):
        yield f"weights-control/{control}", merge("tokens", shared(), control, alpha=0.3, what="weights")
    if pair.layouts["target"].layers[0]["q"].has_bias:
        for alpha in (0.1, 0.3, 1.0):
            yield f"affine/weights/alpha-{alpha:g}", merge("tokens", shared(), alpha=alpha, what="weights", affine=True)
        for alpha in (1.0, 1.5):
            yield f"affine/all/alpha-{alpha:g}", merge("tokens", shared(), alpha=alpha, affine=True)
            yield f"affine/all+stream/alpha-{alpha:g}", merge("tokens", shared(), alpha=alpha, affine=True, stream=True)
    if pair.truth is not None:
        rivals = Rivals(pair)
        yield "rival/weight-matching/found", rivals.found_by_weights
        for name, way in rivals.ways().items():
            for alpha in (0.5, 1.0, 2.0, 4.0):
                yield f"rival/{name}/alpha-{alpha:g}", lambda way=way, alpha=alpha: (way(), alpha)
    yield from apart(pair, merge)


def apart(pair: Pair, merge: Callable[..., Any]) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Each side of each projection solved by itself, as the paper has it, and the ways to plan its layers."""
    ways = {
        "": {},
        "/semi-relaxed": {"layer_marginals": "semi-relaxed"},
        "/plain": {"layer_cost": "plain"},
        "/plain-semi-relaxed": {"layer_cost": "plain", "layer_marginals": "semi-relaxed"},
    }
    for epsilon in (0.03, 0.1):
        for way, settings in ways.items():
            transport = {kept: Apart(epsilon=epsilon, layers_kept=kept, **settings) for kept in (1, 3)}
            if pair.truth is not None:
                yield f"found-apart-{epsilon:g}{way}", lambda one=transport[1]: pair.found_apart("texts", one)
            for kept, one in transport.items():
                yield f"apart-{epsilon:g}{way}/layers-{kept}", merge("texts", one)
                one_to_one = one.model_copy(update={"entries_kept": 1})
                yield f"apart-{epsilon:g}{way}/layers-{kept}/mutual-1", merge("texts", one_to_one)
                yield f"apart-{epsilon:g}{way}/layers-{kept}/attention", merge("texts", one, projections=ATTENTION)


def measure(pair: Pair, only: list[str], counts: dict[str, torch.Tensor], base: dict[str, Any], biased: bool) -> None:
    """Every row that is asked for and not there yet."""
    kept = pair.folder / f"rows{'' if pair.texts == 'train' else '-' + pair.texts}{'-biased' if biased else ''}.jsonl"
    known = {json.loads(line)["row"] for line in kept.read_text().splitlines()} if kept.exists() else set()
    for name, build in rows_of(pair):
        if name in known or (only and not any(name.startswith(word) for word in only)):
            continue
        began = time.perf_counter()
        made = build()
        row: dict[str, Any] = {"row": name}
        if isinstance(made, tuple):
            items, alpha = made
            with applied(pair.layouts["target"].views, items, alpha):
                for what, texts in (("held_out", pair.held_out), ("english", pair.english)):
                    scores = score_texts(pair.models["target"], texts)
                    row[what] = {
                        "bits_per_byte": scores.bits_per_byte,
                        **difference(scores, base[what], counts[what]).to_dict(),
                    }
        else:
            row |= made
        row["seconds"] = round(time.perf_counter() - began, 1)
        line = json.dumps(row)
        with kept.open("a") as file:
            file.write(line + "\n")
        sys.stdout.write(line + "\n")
        sys.stdout.flush()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--pair", type=Path, required=True)
    parser.add_argument("--rows", type=int, default=2000, help="token rows of calibration")
    parser.add_argument("--texts", default="train", help="what is calibrated on: train, or english_train")
    parser.add_argument("--only", nargs="*", default=[], help="rows whose names begin so")
    parser.add_argument("--biases", action="store_true", help="give the target biases (of zero), for affine maps")
    given = parser.parse_args()
    pair = Pair(given.pair, given.rows, given.texts, given.biases)
    counts = {
        name: resamples(len(texts), 2000, 0) for name, texts in (("held_out", pair.held_out), ("english", pair.english))
    }
    base = {
        "held_out": score_texts(pair.models["target"], pair.held_out),
        "english": score_texts(pair.models["target"], pair.english),
    }
    for role in ("target", "source"):
        scores = base if role == "target" else {"held_out": score_texts(pair.models[role], pair.held_out)}
        sys.stdout.write(json.dumps({role: {name: item.bits_per_byte for name, item in scores.items()}}) + "\n")
    measure(pair, given.only, counts, base, given.biases)


if __name__ == "__main__":
    main()
