"""What carries over between two models: every setting of transport on one pair, each on the same held-out texts.

    python -m tests.bench.transfer --pair FOLDER [--only NAME ...]

FOLDER is what ``tests.bench.relatives`` wrote. Each row is printed as one JSON line and kept in FOLDER/rows.jsonl; a
row that is there is not measured again. Where the truth is known, an oracle is measured beside: the same task vector
through the true correspondence.
"""

# ruff: noqa: B019 - there is one pair a process, and it lives as long
from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import torch

from tests.bench.relatives import SPLIT_SEED, slices
from tmerge.calibration import FeatureStore, capture, common_ends
from tmerge.check import keys_of
from tmerge.evaluation import applied, control_generator, difference, noise, resamples, score_texts, shrink
from tmerge.fusion import Carried, TransportedNeurons, carry, layers_with, solved_inputs, structured_inputs
from tmerge.fusion.stream import carry_stream
from tmerge.models import Architecture, describe, head_facts, load_model
from tmerge.recipe import FusionSettings, TransportSettings
from tmerge.transport import FeaturePlans, Heads, Side, Structure, pair_layers, relatedness, solve_features
from tmerge.transport.structure import solve_structure

ALL = ("q", "k", "v", "o", "gate", "up", "down")
ATTENTION = ALL[:4]
ROLES = ("target", "source", "base")
TEXTS = 200


class Pair:
    """Three models, the texts, and everything that is computed once."""

    def __init__(self, folder: Path, rows: int, texts: str) -> None:
        self.folder, self.rows, self.texts = folder, rows, texts
        self.models = {role: load_model(str(folder / role), dtype="float32") for role in ROLES}
        self.layouts: dict[str, Architecture] = {role: describe(item.model) for role, item in self.models.items()}
        self.train = self._texts(texts)[: 2 * TEXTS]
        self.held_out, self.english = self._texts("held_out")[:TEXTS], self._texts("english_held_out")[:TEXTS]
        truth = folder / "truth.json"
        self.truth = json.loads(truth.read_text()) if truth.exists() else None

    def _texts(self, name: str) -> list[str]:
        lines = (self.folder / f"{name}.jsonl").read_text(encoding="utf-8").split("\n")
        return [json.loads(line)["text"] for line in lines if line.strip()]

    @cache
    def store(self, role: str, kind: str) -> FeatureStore:
        folder = self.folder / f"features-{self.texts}-{kind}-{self.rows}" / role
        if not FeatureStore.is_finished(folder, kind):
            folder.parent.mkdir(exist_ok=True)
            ends = self._ends if kind == "tokens" else None
            model = self.models[role]
            capture(
                model,
                self.layouts[role],
                self.train,
                ALL,
                folder,
                max_tokens=256,
                batch_tokens=2048,
                key=kind,
                ends=ends,
            )
        return FeatureStore(folder)

    @cached_property
    def _ends(self) -> tuple[tuple[int, ...], ...]:
        tokenizers = [self.models[role].tokenizer for role in ("target", "source")]
        return common_ends(*tokenizers, self.train, limits=(256, 256), wanted=self.rows, seed=SPLIT_SEED)

    @cache
    def sides(self, kind: str) -> tuple[Side, Side]:
        return tuple(self._side(role, kind) for role in ("target", "source"))  # type: ignore[return-value]

    def _side(self, role: str, kind: str) -> Side:
        store = self.store(role, kind)
        facts = head_facts(self.models[role].model, self.layouts[role])
        heads = {int(layer): Heads.of(item) for layer, item in facts.items()}
        return Side(store.get, {layer: store.keys(layer) for layer in store.layers}, heads)

    @cache
    def structure(self, kind: str, epsilon: float | None, signed: bool) -> Structure:
        target, source = self.sides(kind)
        pairs, cost, layers = pair_layers(target, source, keys_of(list(ALL)), signed=signed)
        return Structure(pairs, cost, layers, *solve_structure(target, source, pairs, epsilon=epsilon, signed=signed))

    @cache
    def plans(self, kind: str, epsilon: float) -> dict[str, FeaturePlans]:
        mine, theirs = (self.store(role, kind) for role in ("target", "source"))
        return {
            key: solve_features(
                key,
                lambda layer, key=key: mine.get(layer, key),
                lambda layer, key=key: theirs.get(layer, key),
                layers_with(mine, key),
                layers_with(theirs, key),
                epsilon=epsilon,
            )
            for key in keys_of(list(ALL))
        }

    def carried(self, kind: str, transport: TransportSettings, fusion: FusionSettings, permuted: bool) -> Carried:
        target, source = (self.store(role, kind) for role in ("target", "source"))
        projections = list(fusion.projections)
        if transport.structure == "shared":
            epsilon = transport.epsilon if transport.matching == "entropic" else None
            inputs = structured_inputs(
                self.structure(kind, epsilon, transport.signed), target, source, projections, transport
            )
        else:
            inputs = solved_inputs(self.plans(kind, transport.epsilon), target, source, projections, transport)

        def shuffle(layer: int, key: str, neurons: int) -> torch.Tensor:
            return torch.randperm(neurons, generator=control_generator(0, "permuted", layer, key))

        return carry(
            self.layouts["target"],
            self.layouts["source"],
            inputs.pairs,
            inputs.couplings,
            inputs.statistics,
            fusion,
            transport,
            source_base=self.layouts["base"] if fusion.what == "task-vector" else None,
            shuffle=shuffle if permuted else None,
            vocabulary=self.models["target"].model.config.vocab_size,
        )

    def oracle(self, projections: tuple[str, ...], stream: bool, what: str) -> list[TransportedNeurons]:
        """Through the true correspondence."""
        items = []
        learned = what == "task-vector"
        for layer, views in enumerate(self.layouts["target"].layers):
            other = self.truth["layers"][layer]
            for name, (rows, columns) in slices(self.truth, layer).items():
                if name not in projections:
                    continue
                weight = self.layouts["source"].layers[other][name].weight()[rows][:, columns].clone()
                if learned:
                    weight -= self.layouts["base"].layers[other][name].weight()[rows][:, columns]
                by_columns = name in ("o", "down")
                neurons = torch.arange(views[name].in_features if by_columns else views[name].out_features)
                items.append(TransportedNeurons(layer, name, neurons, weight, None, learned))
        if stream:
            residual = torch.tensor(self.truth["residual"])
            out = torch.zeros(len(residual), self.layouts["source"].hidden_size)
            out[torch.arange(len(residual)), residual] = 1.0
            pairs = dict(enumerate(self.truth["layers"]))
            vocabulary = self.models["target"].model.config.vocab_size
            layouts = (self.layouts[role] for role in ROLES)
            items += carry_stream(*layouts, pairs, (out, out.T), vocabulary)
        return items

    def found(self, kind: str, epsilon: float | None, signed: bool = False) -> dict[str, float]:
        """The share of layers, and by feature of neurons, for which the true one was found."""
        structure = self.structure(kind, epsilon, signed)
        layers = [structure.pairs[layer] == other for layer, other in enumerate(self.truth["layers"])]
        keys = {"q": "q.post", "k": "k.post", "v": "v.post", "o": "o.pre", "mlp": "up.post"}
        shares: dict[str, list[float]] = {name: [] for name in keys}
        for layer, index in enumerate(self.truth["indices"]):
            for name, key in keys.items():
                hit = structure.inner[layer, key].partner() == torch.tensor(index[name])
                shares[name].append(float(hit.double().mean()))
        stream = structure.stream.partner() == torch.tensor(self.truth["residual"])
        means = {name: sum(values) / len(values) for name, values in shares.items()}
        return {"layers": sum(layers) / len(layers), "stream": float(stream.double().mean()), **means}


def shared(**more: Any) -> TransportSettings:
    return TransportSettings(structure="shared", **more)


def rows_of(pair: Pair) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Name -> what is measured: a merge as (transported, alpha), or figures."""

    def merge(
        kind: str, transport: TransportSettings, control: str = "", alpha: float = 1.0, **fusion: Any
    ) -> Callable[[], tuple[list[TransportedNeurons], float]]:
        settings = FusionSettings(**{"what": "task-vector", "projections": ALL, "top_k": 1.0, "alpha": alpha} | fusion)

        def build() -> tuple[list[TransportedNeurons], float]:
            carried = pair.carried(kind, transport, settings, control == "permuted")
            items = carried.permuted if control == "permuted" else carried.transported
            if control == "noise":
                items = noise(pair.layouts["target"].views, items, 0)
            if control == "shrink":
                items = shrink(pair.layouts["target"].views, items)
            return items, alpha

        return build

    def true(alpha: float, projections: tuple[str, ...] = ALL, stream: bool = False, what: str = "task-vector") -> Any:
        return lambda: (pair.oracle(projections, stream, what), alpha)

    def related() -> Any:
        target, source = pair.sides("tokens")
        pairs = pair.structure("tokens", None, False).pairs
        return relatedness(target, source, pairs, pair.store("target", "tokens").texts, seed=0).to_dict()

    if pair.truth is not None:
        for kind in ("tokens", "texts"):
            yield f"found/{kind}", lambda kind=kind: pair.found(kind, None)
        yield "found/signed", lambda: pair.found("tokens", None, True)
        yield "found/entropic-0.03", lambda: pair.found("tokens", 0.03)
    yield "relatedness", related
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
    yield "mlp/alpha-1", merge("tokens", shared(), projections=ALL[4:])
    yield "texts", merge("texts", shared(), stream=True)
    yield "signed", merge("tokens", shared(signed=True), stream=True)
    for epsilon in (0.1, 0.03, 0.01, 0.005):
        yield f"entropic-{epsilon:g}", merge("tokens", shared(matching="entropic", epsilon=epsilon), stream=True)
    for kind in ("tokens", "texts"):
        for rival in ("procrustes", "ridge"):
            yield f"{rival}/{kind}", merge(kind, shared(map=rival))
        yield f"plan-beside-rivals/{kind}", merge(kind, shared())
    for alpha in (0.1, 0.3, 1.0):
        yield f"weights/alpha-{alpha:g}", merge("tokens", shared(), alpha=alpha, what="weights")
    for epsilon in (0.1, 0.03):
        yield f"apart-{epsilon:g}", merge("texts", TransportSettings(epsilon=epsilon, layers_kept=1))
        yield (
            f"apart-{epsilon:g}/attention",
            merge("texts", TransportSettings(epsilon=epsilon, layers_kept=1), projections=ATTENTION),
        )


def measure(pair: Pair, only: list[str], counts: dict[str, torch.Tensor], base: dict[str, Any]) -> None:
    """Every row that is asked for and not there yet."""
    kept = pair.folder / ("rows.jsonl" if pair.texts == "train" else f"rows-{pair.texts}.jsonl")
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
    given = parser.parse_args()
    pair = Pair(given.pair, given.rows, given.texts)
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
    measure(pair, given.only, counts, base)


if __name__ == "__main__":
    main()
