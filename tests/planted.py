"""A source with a known answer: function-preserving surgery on a small model F.

`plant` builds from F a model of another width and depth that computes the same function, and says which neuron of
F each of its neurons copies, and which layer of F each of its layers is. What it does, and why it changes nothing:

- The residual stream is widened by one whole factor and permuted. Mean, mean square and so RMSNorm and LayerNorm
  (their eps included) see the same numbers; whatever reads the stream (q k v gate up, the head) has its columns
  divided by the factor, since it now adds up that many copies.
- MLP neurons are copied and permuted; the columns of down are divided by the copies.
- Kv heads are copied and permuted together with their query heads, query heads permuted within their group; the
  columns of o are divided by the copies.
- Within a head, v (and o's columns) may be permuted freely, and so may the dimensions of q and k that RoPE does not
  rotate. The two halves of a RoPE pair move together, by one permutation for the whole model, and the rotary
  frequencies move with them: a pair moved to another frequency would be another function. (Sign flips and rotations
  within a pair preserve the function too, but a plan over correlations could not see them.)
- Inserted layers have random weights and zero o and down, biases included, so they add nothing to the stream.

Copies are equal in number for all neurons of a kind, as uniform marginals ask for.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from tests.pico import pico_model
from tmerge.models import HEAD_NORMS, Architecture, Projection, describe, feature_key, head_facts
from tmerge.transport import Heads, Side, one_thread_each

__all__ = [
    "PLANTED_BIASED",
    "PLANTED_FAMILIES",
    "PLANTED_LAYERS",
    "PLANTED_NOISE",
    "Planted",
    "PlantedCase",
    "noisy",
    "plant",
    "planted_case",
    "planted_model",
    "pooled_features",
    "relative_errors",
    "side_of",
]

PLANTED_LAYERS = 4
"""Depth of F."""
PLANTED_NOISE = 0.02
"""The target's distance from F, relative to each projection's norm."""

# Family -> config keys of F, and how often its heads are copied. Widths double everywhere else.
PLANTED_FAMILIES: dict[str, tuple[dict[str, int], int]] = {
    "llama": ({"head_dim": 16, "intermediate_size": 128}, 1),
    "qwen2": ({"intermediate_size": 128}, 2),  # head_dim is hidden / heads there: twice the width, twice the heads
    "gpt_neox": ({"intermediate_size": 128}, 2),
    "qwen3": ({"head_dim": 16, "intermediate_size": 128}, 1),
}
PLANTED_BIASED = ("qwen2", "gpt_neox")
"""Those whose projections have biases."""
_LAYER = re.compile(r"(\.layers\.)(\d+)\.")


@dataclass(frozen=True)
class Planted:
    """A planted source.

    Attributes:
        model: The source, in F's dtype.
        layers: Per layer of the source the layer of F it is, or None where it was inserted.
        origin: (source layer, feature key) -> (n',) the neuron of F that each source neuron copies; without the
            inserted layers.
    """

    model: PreTrainedModel
    layers: tuple[int | None, ...]
    origin: Mapping[tuple[int, str], Tensor]

    def source_layer(self, layer: int) -> int:
        """Where a layer of F ended up."""
        return self.layers.index(layer)


def planted_model(family: str, *, seed: int = 0) -> PreTrainedModel:
    """F: a pico model of 4 layers and width 64, float64, whose attention is sharp.

    Where attention is nearly uniform, query heads that share a kv head write nearly the same features, and no plan
    over correlations can tell them apart.
    """
    options, _ = PLANTED_FAMILIES[family]
    model = pico_model(family, layers=PLANTED_LAYERS, seed=seed, **options).double()
    for view in describe(model).projections(("q", "k")):
        view.write(view.weight() * 6.0)
    generator = torch.Generator().manual_seed(seed)
    for view in (layer[name] for layer in describe(model).stream for name in HEAD_NORMS if name in layer):
        # Where q and k are normed it is their gains that make it sharp.
        view.write(2.0 + torch.rand(view.out_features, 1, generator=generator, dtype=torch.float64))
    for view in describe(model).projections():
        if view.has_bias:
            # The pico's 0.02 would be lost among the features' own size.
            view.write(bias=view.bias() * 10.0)
    return model


def noisy(model: PreTrainedModel, relative: float, *, seed: int) -> PreTrainedModel:
    """A copy whose seven projections, biases too, have Gaussian noise of this size relative to their own norm."""
    generator = torch.Generator().manual_seed(seed)
    other = copy.deepcopy(model)

    def shaken(values: Tensor) -> Tensor:
        noise = torch.randn(values.shape, generator=generator, dtype=values.dtype)
        return values + noise * (relative * values.norm() / noise.norm())

    for view in describe(other).projections():
        bias = view.bias()
        view.write(shaken(view.weight()), bias=None if bias is None else shaken(bias))
    return other


def plant(
    model: PreTrainedModel, *, widen: int = 2, head_copies: int = 1, inserted: Sequence[int] = (1, 4), seed: int = 0
) -> Planted:
    """Surgery on F.

    Args:
        model: F, of a family in `PLANTED_FAMILIES`, with an untied head.
        widen: Copies of every residual and MLP neuron.
        head_copies: Copies of every kv head with its query heads.
        inserted: Indices of the source's layers that are inserted ones.
        seed: Of all permutations and of the inserted layers' weights.
    """
    generator = torch.Generator().manual_seed(seed)
    depth = model.config.num_hidden_layers + len(inserted)
    kept = iter(range(model.config.num_hidden_layers))
    layers = tuple(None if layer in inserted else next(kept) for layer in range(depth))
    source = _random_source(model, depth, widen, head_copies, seed)

    residual = _copies(model.config.hidden_size, widen, generator)
    mine, theirs = describe(model), describe(source)
    pairs = _move_rotary_pairs(model, source, generator)
    origin: dict[tuple[int, str], Tensor] = {}
    for layer, old in enumerate(layers):
        if old is None:
            for name in ("o", "down"):
                _fill(theirs.layers[layer][name], 0.0)
            continue
        index = _Index(mine, old, residual, pairs, widen, head_copies, generator)
        for name, view in theirs.layers[layer].items():
            pre, post = index.of(name, "pre"), index.of(name, "post")
            own = mine.layers[old][name]
            copies = len(pre) // own.in_features
            bias = own.bias()
            view.write(own.weight()[post][:, pre] / copies, bias=None if bias is None else bias[post])
            origin[layer, feature_key(name, "pre")], origin[layer, feature_key(name, "post")] = pre, post
    _copy_the_rest(model, source, theirs, layers, residual, torch.cat([pairs, pairs + len(pairs)]), widen)
    return Planted(source, layers, origin)


def pooled_features(model: PreTrainedModel, tokens: Tensor, *, batch: int = 100) -> dict[tuple[int, str], Tensor]:
    """Mean over each sequence's tokens of every feature: (layer, key) -> (T, n). Plain on purpose: a reference."""
    taps = describe(model).taps(("q", "k", "v", "o", "gate", "up", "down"))
    caught: dict[tuple[int, str], list[Tensor]] = {(tap.layer, tap.key): [] for tap in taps}

    def catch(tap):
        def hook(_module, inputs, output):
            caught[tap.layer, tap.key].append(tap.read(inputs, output).mean(1))

        return tap.module.register_forward_hook(hook)

    hooks = [catch(tap) for tap in taps]
    try:
        # Operations this small only wait for each other on several threads.
        with torch.no_grad(), one_thread_each():
            for part in tokens.split(batch):
                model(part, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return {place: torch.cat(parts) for place, parts in caught.items()}


@dataclass(frozen=True)
class PlantedCase:
    """F, the target and the source of one family, with their features."""

    original: PreTrainedModel
    target: PreTrainedModel
    planted: Planted
    tokens: Tensor
    target_features: dict[tuple[int, str], Tensor]
    source_features: dict[tuple[int, str], Tensor]

    @property
    def keys(self) -> list[str]:
        return list(dict.fromkeys(key for _, key in self.target_features))

    @property
    def source_layers(self) -> list[int]:
        """Where each layer of F is in the source."""
        return [self.planted.source_layer(layer) for layer in range(PLANTED_LAYERS)]

    @torch.no_grad()
    def loss(self, model: torch.nn.Module) -> float:
        """Cross-entropy against what F itself predicts, whose minimum is F's own."""
        wanted = torch.softmax(self.original(self.tokens[:100]).logits, -1)
        return float(cross_entropy(model(self.tokens[:100]).logits.flatten(0, 1), wanted.flatten(0, 1)))


@cache
def planted_case(family: str) -> PlantedCase:
    """The case of a family, made once; nobody may change its models."""
    original = planted_model(family)
    planted = plant(original, head_copies=PLANTED_FAMILIES[family][1])
    target = noisy(original, PLANTED_NOISE, seed=1)
    tokens = torch.randint(3, original.config.vocab_size, (400, 10), generator=torch.Generator().manual_seed(2))
    return PlantedCase(
        original, target, planted, tokens, pooled_features(target, tokens), pooled_features(planted.model, tokens)
    )


def relative_errors(model: PreTrainedModel, original: PreTrainedModel) -> dict[str, float]:
    """Projection, or ``projection.bias``, -> its largest relative distance from the original's over the layers."""
    errors: dict[str, float] = {}
    pairs = zip(describe(model).projections(), describe(original).projections(), strict=True)
    for got, want in pairs:
        parts = {got.name: (got.weight(), want.weight())}
        if want.has_bias:
            parts[f"{got.name}.bias"] = (got.bias(), want.bias())
        for name, (ours, theirs) in parts.items():
            errors[name] = max(errors.get(name, 0.0), float((ours - theirs).norm() / theirs.norm()))
    return errors


def side_of(model: PreTrainedModel, features: Mapping[tuple[int, str], Tensor]) -> Side:
    """A model and its features, as `tmerge.transport.find_structure` takes them."""
    keys: dict[int, list[str]] = {}
    for layer, key in features:
        keys.setdefault(layer, []).append(key)
    heads = {int(layer): Heads.of(facts) for layer, facts in head_facts(model, describe(model)).items()}
    return Side(lambda layer, key: features[layer, key], keys, heads)


class _Index:
    """Which neuron of F each neuron of one planted layer copies."""

    def __init__(
        self,
        architecture: Architecture,
        layer: int,
        residual: Tensor,
        pairs: Tensor,
        widen: int,
        head_copies: int,
        generator: torch.Generator,
    ) -> None:
        heads = architecture.attention[layer]
        assert heads is not None
        group, size = heads.heads // heads.kv_heads, heads.head_dim
        kv_heads = _copies(heads.kv_heads, head_copies, generator).tolist()
        queries, keys, values, outputs = [], [], [], []
        for kv_head in kv_heads:
            # Rotated dimensions by pairs, the others freely, and alike for a key and all queries that meet it.
            rotated = 2 * len(pairs)
            rest = rotated + torch.randperm(size - rotated, generator=generator)
            inside = torch.cat([pairs, pairs + len(pairs), rest])
            inside_value = torch.randperm(size, generator=generator)
            keys.append(kv_head * size + inside)
            values.append(kv_head * size + inside_value)
            for member in torch.randperm(group, generator=generator).tolist():
                queries.append((kv_head * group + member) * size + inside)
                outputs.append((kv_head * group + member) * size + inside_value)
        mlp = _copies(architecture.layers[layer]["up"].out_features, widen, generator)
        self._by_key = {
            "qkv.pre": residual,
            "q.post": torch.cat(queries),
            "k.post": torch.cat(keys),
            "v.post": torch.cat(values),
            "o.pre": torch.cat(outputs),
            "o.post": residual,
            "mlp.pre": residual,
            "gate.post": mlp,
            "up.post": mlp,
            "down.pre": mlp,
            "down.post": residual,
        }

    def of(self, projection: str, side: str) -> Tensor:
        return self._by_key[feature_key(projection, side)]


def _copies(neurons: int, factor: int, generator: torch.Generator) -> Tensor:
    """Every neuron `factor` times, in random order."""
    return torch.arange(neurons).repeat(factor)[torch.randperm(neurons * factor, generator=generator)]


def _random_source(model: PreTrainedModel, depth: int, widen: int, head_copies: int, seed: int) -> PreTrainedModel:
    """A model of the source's shape with random weights everywhere."""
    config = model.config
    family = next(name for name in PLANTED_FAMILIES if name == config.model_type)
    shape = {
        "hidden_size": config.hidden_size * widen,
        "intermediate_size": config.intermediate_size * widen,
        "num_attention_heads": config.num_attention_heads * head_copies,
    }
    if hasattr(config, "num_key_value_heads"):
        shape["num_key_value_heads"] = config.num_key_value_heads * head_copies
    if "head_dim" in PLANTED_FAMILIES[family][0]:
        shape["head_dim"] = config.head_dim
    return pico_model(family, layers=depth, seed=seed + 1, **shape).to(model.dtype)


def _move_rotary_pairs(model: PreTrainedModel, source: PreTrainedModel, generator: torch.Generator) -> Tensor:
    """Permute the source's rotary frequencies, and return which pair of F each of its pairs is."""
    old, new = (next(m for m in whole.modules() if hasattr(m, "inv_freq")) for whole in (model, source))
    pairs = torch.randperm(len(old.inv_freq), generator=generator)
    new.inv_freq = old.inv_freq[pairs].clone()
    return pairs


def _fill(view: Projection, value: float) -> None:
    bias = view.bias()
    view.write(torch.full_like(view.weight(), value), bias=None if bias is None else torch.full_like(bias, value))


@torch.no_grad()
def _copy_the_rest(
    model: PreTrainedModel,
    source: PreTrainedModel,
    described: Architecture,
    layers: Sequence[int | None],
    residual: Tensor,
    inside: Tensor,
    widen: int,
) -> None:
    """Embeddings, norms and the head: all but the norms of q and k live on the residual stream.

    What those scale are a head's rotated dimensions, which lie in the same order in all heads, `inside`.
    """
    ours = {id(p) for view in described.projections() for p in view.module.parameters()}
    head = source.get_output_embeddings().weight
    own = dict(model.named_parameters())
    for name, parameter in source.named_parameters():
        if id(parameter) in ours:
            continue
        place = _LAYER.search(name)
        if place is not None:
            old = layers[int(place[2])]
            if old is None:
                continue  # an inserted layer's norm may be anything
            name = _LAYER.sub(rf"\g<1>{old}.", name)
        values = own[name][..., inside if len(own[name]) == len(inside) else residual]
        parameter.copy_(values / widen if parameter is head else values)
