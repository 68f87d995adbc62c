"""Cutting a model out of another, what is left in another order, so that it is known which neuron is which.

For a projection W of a target layer and its ``rows, columns`` of the base's (see `slices`), before any training

    W_target = W_base[rows][:, columns]
"""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tmerge.models import LoadedModel

Truth = dict[str, Any]


def plan(
    model: nn.Module,
    seed: int,
    *,
    layers: int = 0,
    groups: int = 0,
    neurons: int | None = None,
    width: int | None = None,
    texts: Any = None,
    in_order: bool = False,
    head_dim: int | None = None,
) -> Truth:
    """Draw what is left of the base, and in which order.

    Args:
        model: The base.
        seed: Of every choice.
        layers: How many layers go, never the first two or the last.
        groups: How many key-value heads of each layer go, with their query heads; of a model that has one, half of
            its query heads.
        neurons: How many MLP neurons of each layer stay; None for all.
        width: How many neurons of the residual stream stay; None for all.
        texts: Token ids of texts, on which the most active neurons are found; needed with `neurons` and `width`.
        in_order: Keep the base's order of what stays.
        head_dim: How many dimensions of each head stay, a divisor of the base's; None for all.

    Returns:
        ``layers``: target layer -> base layer; ``residual``: target neuron -> base neuron of the residual stream;
        ``indices``: per target layer ``q``, ``k``, ``v`` (outputs), ``o`` (inputs) and ``mlp``, target -> base.
    """
    draw, config = random.Random(f"relatives {seed}"), model.config
    gone = set(draw.sample(range(2, config.num_hidden_layers - 1), layers))
    kept = [layer for layer in range(config.num_hidden_layers) if layer not in gone]
    residual = draw.sample(range(config.hidden_size), config.hidden_size)
    if width is not None:
        residual = random.Random(f"width {seed}").sample(
            stream_activity(model, texts).topk(width).indices.tolist(), width
        )
    activity = None if neurons is None else mlp_activity(model, texts)
    dim, heads = config.head_dim, config.num_attention_heads // config.num_key_value_heads
    key_heads, query_heads = config.num_key_value_heads - groups, heads
    if config.num_key_value_heads == 1:
        key_heads, query_heads = 1, heads // 2 if groups else heads
    left_of_head = head_dim or dim
    # Every so many pairs of q and k: theirs are the rotary frequencies of a model with such heads.
    turned = [place + half for half in (0, dim // 2) for place in range(0, dim // 2, dim // left_of_head)]
    indices = []
    for layer in kept:
        found: dict[str, list[int]] = {name: [] for name in ("q", "k", "v", "o")}
        for group in draw.sample(range(config.num_key_value_heads), key_heads):
            # Dimensions of q and k are tied to their rotary frequencies, those of v and o are free.
            within = draw.sample(range(dim), left_of_head)
            found["k"] += [group * dim + place for place in turned]
            found["v"] += [group * dim + place for place in within]
            for head in draw.sample(range(group * heads, (group + 1) * heads), query_heads):
                found["q"] += [head * dim + place for place in turned]
                found["o"] += [head * dim + place for place in within]
        left = list(range(config.intermediate_size))
        if activity is not None:
            left = activity[layer].topk(neurons).indices.sort().values.tolist()
        indices.append(found | {"mlp": draw.sample(left, len(left))})
    if in_order:
        residual = sorted(residual)
        indices = [{name: sorted(places) for name, places in of_layer.items()} for of_layer in indices]
    return {"layers": kept, "residual": residual, "indices": indices, "head_dim": left_of_head}


def slices(truth: Truth, layer: int) -> dict[str, tuple[list[int], list[int]]]:
    """Of a target layer: projection -> (rows, columns) of the base's weight that it was cut out of."""
    at, residual = truth["indices"][layer], truth["residual"]
    reading = {"q": at["q"], "k": at["k"], "v": at["v"], "gate": at["mlp"], "up": at["mlp"]}
    writing = {"o": at["o"], "down": at["mlp"]}
    return {name: (rows, residual) for name, rows in reading.items()} | {
        name: (residual, columns) for name, columns in writing.items()
    }


def projections(layer: nn.Module) -> dict[str, nn.Linear]:
    """The linear maps of a llama layer, by their short names."""
    names = {"q": "self_attn", "k": "self_attn", "v": "self_attn", "o": "self_attn"}
    names |= {"gate": "mlp", "up": "mlp", "down": "mlp"}
    return {name: getattr(getattr(layer, part), f"{name}_proj") for name, part in names.items()}


@torch.no_grad()
def cut(model: nn.Module, truth: Truth) -> nn.Module:
    """The model that `plan` describes, with the base's weights."""
    config, first = copy.deepcopy(model.config), truth["indices"][0]
    config.num_hidden_layers = len(truth["layers"])
    dim, config.hidden_size = model.config.head_dim, len(truth["residual"])
    config.head_dim = truth["head_dim"]
    config.num_attention_heads = len(first["q"]) // config.head_dim
    config.num_key_value_heads = len(first["k"]) // config.head_dim
    config.intermediate_size = len(first["mlp"])
    if getattr(config, "layer_types", None):
        config.layer_types = [config.layer_types[layer] for layer in truth["layers"]]
    small, residual = type(model)(config).to(model.dtype), torch.tensor(truth["residual"])
    of_head = torch.tensor(first["q"][: config.head_dim]) % dim
    small.model.embed_tokens.weight.copy_(model.model.embed_tokens.weight[:, residual])
    small.model.norm.weight.copy_(model.model.norm.weight[residual])
    if not config.tie_word_embeddings:
        small.lm_head.weight.copy_(model.lm_head.weight[:, residual])
    for place, base_layer in enumerate(truth["layers"]):
        layer, base = small.model.layers[place], model.model.layers[base_layer]
        for name, norm in base.named_modules():
            if name.endswith("norm"):
                # Norms of q and k are of a head.
                kept = of_head if name.startswith("self_attn") else residual
                layer.get_submodule(name).weight.copy_(norm.weight[kept])
        for name, (rows, columns) in slices(truth, place).items():
            assert projections(base)[name].bias is None
            projections(layer)[name].weight.copy_(projections(base)[name].weight[rows][:, columns])
    small.generation_config = copy.deepcopy(model.generation_config)
    return small.eval().requires_grad_(False)


@torch.no_grad()
def stream_activity(model: nn.Module, texts: Sequence[Tensor]) -> Tensor:
    """(n,) the sum over tokens and blocks of each stream neuron's |activation| over the token's root mean square.

    As published width pruning chooses them; without the first token of a text, which drowns all others.
    """
    sums = torch.zeros(model.config.hidden_size)
    for ids in texts:
        for hidden in model.model(input_ids=ids, output_hidden_states=True, use_cache=False).hidden_states[2:-1]:
            stream = hidden[0, 1:]
            sums += (stream / stream.pow(2).mean(-1, keepdim=True).sqrt()).abs().mean(0)
    return sums


@torch.no_grad()
def mlp_activity(model: nn.Module, texts: Sequence[Tensor]) -> list[Tensor]:
    """Per layer, the sum of |activation| of every MLP neuron over the texts' tokens."""
    sums = [torch.zeros(model.config.intermediate_size) for _ in model.model.layers]

    def adding(place: int) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        return lambda module, inputs: sums[place].add_(inputs[0].abs().sum((0, 1)))

    hooks = [
        layer.mlp.down_proj.register_forward_pre_hook(adding(place)) for place, layer in enumerate(model.model.layers)
    ]
    for ids in texts:
        model.model(input_ids=ids, use_cache=False)
    for hook in hooks:
        hook.remove()
    return sums


@torch.no_grad()
def check_surgery(base: LoadedModel, target: nn.Module, truth: Truth, seed: int) -> float:
    """Assert that `truth` holds, and that order alone changes no logit; gives the largest change of one."""
    for place, base_layer in enumerate(truth["layers"]):
        theirs = projections(base.model.model.layers[base_layer])
        for name, module in projections(target.model.layers[place]).items():
            rows, columns = (torch.tensor(index) for index in slices(truth, place)[name])
            found, expected = module.weight, theirs[name].weight.index_select(0, rows).index_select(1, columns)
            assert torch.equal(found, expected), f"layer {place}, {name}"
    ids = base.tokenizer("The kettle had been whistling for a minute.", return_tensors="pt")["input_ids"]
    shuffled = cut(base.model, plan(base.model, seed))
    difference = (shuffled(input_ids=ids).logits - base.model(input_ids=ids).logits).abs().max().item()
    assert difference < 1e-3, f"the base in another order gives logits that differ by {difference:.3g}"
    return difference
