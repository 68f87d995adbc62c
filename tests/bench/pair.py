"""A pair of relatives as the benchmarks read it: three models, their texts and features, and the true correspondence.

What is computed once is kept: features in the pair's folder, structures and plans in memory.
"""

# ruff: noqa: B019 - there is one pair a process, and it lives as long
from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from tests.bench.relatives import SPLIT_SEED
from tests.bench.surgery import slices
from tmerge.calibration import FeatureStore, capture, common_ends
from tmerge.fusion import Carried, TransportedNeurons, carry, generator_for
from tmerge.fusion.stream import carry_stream
from tmerge.models import Architecture, LoadedModel, describe, head_facts, load_model
from tmerge.recipe import Apart, FusionSettings, Shared, TaskVector, TransportSettings
from tmerge.transport import (
    FeaturePlans,
    Side,
    Solver,
    Structure,
    apart_transport,
    feature_keys,
    find_structure,
    layer_plans,
    shared_transport,
    solve_features,
)

__all__ = ["ALL", "ATTENTION", "Pair"]

ALL = ("q", "k", "v", "o", "gate", "up", "down")
ATTENTION = ALL[:4]
ROLES = ("target", "source", "base")
TEXTS = 200


def biased(loaded: LoadedModel) -> LoadedModel:
    """The same llama with biases of zero wherever its configuration allows one."""
    config = copy.deepcopy(loaded.model.config)
    config.attention_bias = config.mlp_bias = True
    model = type(loaded.model)(config).to(loaded.model.dtype)
    missing = model.load_state_dict(loaded.model.state_dict(), strict=False).missing_keys
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in missing:
                assert name.endswith("bias"), name
                parameter.zero_()
    return replace(loaded, model=model.eval().requires_grad_(False))


def ends_with_first(tokenizer: Any, texts: Sequence[str], limit: int) -> list[dict[int, int]]:
    """As `tmerge.calibration.positions` has it, the first token kept."""
    found = tokenizer(list(texts), return_offsets_mapping=True, verbose=False)["offset_mapping"]
    return [{end: place for place, (begin, end) in enumerate(offsets[:limit]) if end > begin} for offsets in found]


class Pair:
    """Three models, the texts, and everything that is computed once."""

    def __init__(self, folder: Path, rows: int, texts: str, with_biases: bool = False) -> None:
        self.folder, self.rows, self.texts = folder, rows, texts
        self.models = {role: load_model(str(folder / role), dtype="float32") for role in ROLES}
        if with_biases:
            self.models["target"] = biased(self.models["target"])
        self.layouts: dict[str, Architecture] = {role: describe(item.model) for role, item in self.models.items()}
        # The base's, in both.
        self.vocabulary = torch.arange(self.models["target"].model.config.vocab_size).repeat(2, 1)
        self.train = self._texts(texts)[: 2 * TEXTS]
        self.held_out, self.english = self._texts("held_out")[:TEXTS], self._texts("english_held_out")[:TEXTS]
        truth = folder / "truth.json"
        self.truth = json.loads(truth.read_text()) if truth.exists() else None

    def _texts(self, name: str) -> list[str]:
        lines = (self.folder / f"{name}.jsonl").read_text(encoding="utf-8").split("\n")
        return [json.loads(line)["text"] for line in lines if line.strip()]

    @cache
    def store(self, role: str, kind: str) -> FeatureStore:
        """Features of a model.

        Args:
            role: Which of the three.
            kind: ``texts`` (means), ``tokens``, ``tokens-N`` (another number of them), ``last`` (of each text), or
                ``first`` (tokens, and the first token of each text, which is left out otherwise).
        """
        folder = self.folder / f"features-{self.texts}-{kind}-{self.rows}" / role
        if not FeatureStore.is_finished(folder, kind):
            folder.parent.mkdir(exist_ok=True)
            with patch("tmerge.calibration.positions._ends", ends_with_first) if kind == "first" else nullcontext():
                capture(
                    self.models[role],
                    self.layouts[role],
                    self.train,
                    ALL,
                    folder,
                    max_tokens=256,
                    batch_tokens=2048,
                    key=kind,
                    ends=None if kind == "texts" else self._ends(kind),
                )
        return FeatureStore(folder)

    @cache
    def _ends(self, kind: str) -> tuple[tuple[int, ...], ...]:
        tokenizers = [self.models[role].tokenizer for role in ("target", "source")]
        name, _, count = kind.partition("-")
        wanted = None if kind == "last" else int(count or self.rows)
        ends = common_ends(*tokenizers, self.train, limits=(256, 256), wanted=wanted, seed=SPLIT_SEED)
        if name == "first":
            # The two tokenizers are one and the same.
            first = [min(of_text) for of_text in ends_with_first(tokenizers[0], self.train, 256)]
            ends = tuple((end, *others) for end, others in zip(first, ends, strict=True))
        return ends

    @cache
    def sides(self, kind: str, by_weights: bool = False) -> tuple[Side, Side]:
        return tuple(self._side(role, kind, by_weights) for role in ("target", "source"))  # type: ignore[return-value]

    def _side(self, role: str, kind: str, by_weights: bool) -> Side:
        store = self.store(role, kind)
        facts = head_facts(self.models[role].model, self.layouts[role])

        def weight(layer: int, name: str) -> torch.Tensor:
            return self.layouts[role].layers[layer][name].weight()

        side = Side.of(store, {str(layer): item for layer, item in facts.items()})
        if not by_weights:
            return side
        embedding = self.models[role].model.get_input_embeddings().weight
        return replace(side, weights=weight, embedding=lambda: embedding[:: -(-len(embedding) // 4096)].float())

    @cache
    def structure(self, kind: str, epsilon: float | None, signed: bool, by_weights: bool = False) -> Structure:
        target, source = self.sides(kind, by_weights)
        return find_structure(target, source, feature_keys(list(ALL)), Solver(epsilon, signed=signed))

    @cache
    def plans(self, kind: str, epsilon: float) -> dict[str, FeaturePlans]:
        """Every plan solved by itself, as the paper has it: 8250 of them."""
        mine, theirs = self.sides(kind)
        return {
            key: solve_features(
                key,
                lambda layer, key=key: mine.read(layer, key),
                lambda layer, key=key: theirs.read(layer, key),
                mine.layers_with(key),
                theirs.layers_with(key),
                epsilon=epsilon,
            )
            for key in feature_keys(list(ALL))
        }

    def carried(self, kind: str, transport: TransportSettings, fusion: FusionSettings, permuted: bool) -> Carried:
        reads = [side.read for side in self.sides(kind)]
        projections = list(fusion.projections)
        if isinstance(transport, Shared):
            epsilon = transport.epsilon if transport.matching == "entropic" else None
            found = self.structure(kind, epsilon, transport.signed, transport.weights)
            solved = shared_transport(found, *reads, projections, transport)
        else:
            solved = apart_transport(self.plans(kind, transport.epsilon), *reads, projections, transport)

        def shuffle(layer: int, key: str, neurons: int) -> torch.Tensor:
            return torch.randperm(neurons, generator=generator_for(0, "permuted", layer, key))

        return carry(
            self.layouts["target"],
            self.layouts["source"],
            solved,
            fusion,
            source_base=self.layouts["base"] if isinstance(fusion, TaskVector) else None,
            shuffle=shuffle if permuted else None,
            vocabulary=self.vocabulary,
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
            out = _map_of(self.truth["residual"], self.layouts["source"].hidden_size)
            pairs = dict(enumerate(self.truth["layers"]))

            def head_map(name: str, layer: int, source_layer: int) -> torch.Tensor:
                view = self.layouts["source"].layers[source_layer][name]
                return _map_of(self.truth["indices"][layer][name], view.out_features)

            layouts = (self.layouts[role] for role in ROLES)
            items += carry_stream(*layouts, pairs, (out, out.T), self.vocabulary, head_map)
        return items

    def found(
        self, kind: str, epsilon: float | None, signed: bool = False, by_weights: bool = False
    ) -> dict[str, float]:
        """The share of layers, and by feature of neurons, for which the true one was found."""
        structure = self.structure(kind, epsilon, signed, by_weights)
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

    def found_apart(self, kind: str, settings: Apart) -> dict[str, float]:
        """By feature key, the share of layers whose strongest source layer is the true one."""
        plans = self.plans(kind, settings.epsilon)
        truth = torch.tensor(self.truth["layers"])
        hits = {key: plan.plan.argmax(1) == truth for key, plan in layer_plans(plans, settings).items()}
        return {key: float(hit.double().mean()) for key, hit in hits.items()}


def _map_of(counterparts: list[int], neurons: int) -> torch.Tensor:
    """(n, n') Phi of neurons that each have one counterpart among n'."""
    mapping = torch.zeros(len(counterparts), neurons)
    mapping[torch.arange(len(counterparts)), torch.tensor(counterparts)] = 1.0
    return mapping
