"""What a task vector changes beside the projections: embeddings, head and norms, as views like theirs.

Rows or columns of most are the residual stream's own neurons, or a vocabulary's tokens, so between models that share a
vocabulary they can be carried by the stream's correspondence alone. A norm of q or k has a gain for each output, or for
each dimension of a head, which all heads share.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence

from torch import nn
from transformers import PreTrainedModel

from tmerge.models.layouts import HeadLayout
from tmerge.models.views import PROJECTIONS, Projection, Rows

__all__ = ["EMBEDDING", "HEAD", "HEAD_NORMS", "STREAM", "embedding_scale", "group_of", "stream_views"]

EMBEDDING = "embedding"
"""(V, n): a row for each token. Where the head is tied to it, it is the head too."""
HEAD = "head"
"""(V, n): a row for each token."""
_NORM = "norm:"
HEAD_NORMS = {f"{_NORM}{name}": name for name in ("q", "k")}
"""Names of the norms of q and k, and whose outputs they scale: (n,) or (head_dim,)."""
STREAM = "stream"
"""All of these together, where an alpha is named for each projection."""
_HEAD_NORM_NAMES = {"q": re.compile(r"(q|query)_?(layer)?norm"), "k": re.compile(r"(k|key)_?(layer)?norm")}


def group_of(name: str) -> str:
    """A projection's own name; `STREAM` for whatever else is carried."""
    return name if name in PROJECTIONS else STREAM


def stream_views(
    model: PreTrainedModel,
    blocks: nn.ModuleList,
    width: int,
    layers: Sequence[Mapping[str, Projection]],
    heads: Sequence[HeadLayout | None],
) -> list[dict[str, Projection]]:
    """The views, by layer; what belongs to no block stands behind the last one.

    Args:
        model: The causal LM, or its base model, which has no head.
        blocks: Its blocks.
        width: Of the residual stream.
        layers: Per block, its projections.
        heads: Per block, its heads.

    Returns:
        As many dicts as blocks, and one more: ``norm:NAME`` for a norm of the stream's width (by its name within the
        block), those of `HEAD_NORMS` that are there, `EMBEDDING` and `HEAD`.
    """
    views: list[dict[str, Projection]] = []
    inside = {id(module) for block in blocks for module in block.modules()}
    qualified = {id(module): name for name, module in model.named_modules()}

    def view(name: str, layer: int, module: nn.Module) -> Projection:
        return _view(name, layer, module, qualified[id(module)])

    for layer, block in enumerate(blocks):
        # A norm inside the attention is of q or k, though it may be as wide as the stream (olmo2).
        norms = [*_norms(block.named_children(), width), *_head_norms(model, layers[layer], heads[layer])]
        views.append({name: view(name, layer, module) for name, module in norms})
    last = len(blocks)
    outside = ((name, part) for name, part in model.named_modules() if id(part) not in inside)
    rest = {name: view(name, last, part) for name, part in _norms(outside, width)}
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if _is_matrix(embedding, width):
        rest[EMBEDDING] = view(EMBEDDING, last, embedding)
        if head is not None and _is_matrix(head, width) and head.weight is not embedding.weight:
            rest[HEAD] = view(HEAD, last, head)
    return [*views, rest]


def embedding_scale(model: PreTrainedModel) -> float:
    """What a token's embedding is multiplied by before it enters the residual stream."""
    module, config = model.get_input_embeddings(), model.config
    for value in (
        getattr(module, "scalar_embed_scale", None),  # gemma
        getattr(module, "embed_scale", None),  # xglm, biogpt
        getattr(config, "embedding_multiplier", None),  # granite
    ):
        if isinstance(value, (int, float)):
            return float(value)
    # Before it had a module of its own.
    return float(config.hidden_size) ** 0.5 if config.model_type.startswith("gemma") else 1.0


def _norms(modules: Iterable[tuple[str, nn.Module]], width: int) -> list[tuple[str, nn.Module]]:
    """Modules with one weight for each neuron of the stream, by their names."""
    norms = []
    for name, part in modules:
        weight = getattr(part, "weight", None)
        if isinstance(weight, nn.Parameter) and tuple(weight.shape) == (width,):
            norms.append((_NORM + name.replace(".", "/"), part))
    return norms


def _head_norms(
    model: PreTrainedModel, projections: Mapping[str, Projection], heads: HeadLayout | None
) -> list[tuple[str, nn.Module]]:
    """The norms of q and k that stand beside them, by the names of `HEAD_NORMS`."""
    norms = []
    for norm, name in HEAD_NORMS.items():
        if heads is None or name not in projections:
            continue
        attention = model.get_submodule(projections[name].module_name.rpartition(".")[0])
        for child, part in attention.named_children():
            weight = getattr(part, "weight", None)
            # One for each head, or a matrix of them (stablelm, cohere), is left alone.
            sizes = (heads.head_dim,), (projections[name].out_features,)
            if _HEAD_NORM_NAMES[name].fullmatch(child) and weight is not None and tuple(weight.shape) in sizes:
                norms.append((norm, part))
    return norms


def _is_matrix(module: nn.Module | None, width: int) -> bool:
    weight = getattr(module, "weight", None)
    return isinstance(weight, nn.Parameter) and weight.dim() == 2 and weight.shape[1] == width


def _view(name: str, layer: int, module: nn.Module, qualified: str) -> Projection:
    weight = module.get_parameter("weight")
    rows = weight.shape[0]
    biased = isinstance(getattr(module, "bias", None), nn.Parameter)
    columns = weight.shape[1] if weight.dim() == 2 else 1
    return Projection(name, layer, rows, columns, biased, module, qualified, Rows(1, rows, 0, rows))
