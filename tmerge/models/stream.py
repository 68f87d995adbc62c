"""What a task vector changes beside the projections: embeddings, head and norms, as views like theirs.

Rows or columns of most are the residual stream's own neurons, or a vocabulary's tokens, so between models that share a
vocabulary they can be carried by the stream's correspondence alone. A norm of q or k has a gain for each output, or for
each dimension of a head, which all heads share.

A norm goes by what it does, so that two families' norms meet where they do the same: `post_attention_layernorm` is what
a Llama's MLP reads through, and what an OLMo 2's attention writes through.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from torch import nn
from transformers import PreTrainedModel

from tmerge.models.head_norms import HEAD_NORM_NAMES
from tmerge.models.layouts import HeadLayout
from tmerge.models.views import PROJECTIONS, Projection, Rows

__all__ = ["EMBEDDING", "HEAD", "HEAD_NORMS", "NORM", "STREAM", "embedding_scale", "group_of", "stream_views"]

EMBEDDING = "embedding"
"""(V, n): a row for each token. Where the head is tied to it, it is the head too."""
HEAD = "head"
"""(V, n): a row for each token."""
NORM = "norm:"
"""How the names of norms begin."""
HEAD_NORMS = {f"{NORM}{name}": name for name in ("q", "k")}
"""Names of the norms of q and k, and whose outputs they scale: (n,) or (head_dim,)."""
STREAM = "stream"
"""All of these together, where an alpha is named for each projection."""
# Names of a block's norms -> what each does: what reads the stream through it, or what writes to it through it.
_ROLES: tuple[dict[str, str], ...] = (
    {"input_layernorm": "attention", "post_attention_layernorm": "mlp"},
    {"attention_layernorm": "attention", "feedforward_layernorm": "mlp"},
    {"input_layernorm": "attention", "pre_ff_layernorm": "mlp"},
    {"self_attn_layer_norm": "attention", "final_layer_norm": "mlp"},
    {"ln_attn": "attention", "ln_mlp": "mlp"},
    {"attn_norm": "attention", "mlp_norm": "mlp"},
    {"ln_1": "attention", "ln_2": "mlp"},
    {"norm_1": "attention", "norm_2": "mlp"},
    {"mlp_norm": "mlp"},
    # Attention and MLP side by side.
    {"input_layernorm": "block"},
    {"ln_1": "block"},
    {"post_attention_layernorm": "o", "post_feedforward_layernorm": "down"},
    {
        "input_layernorm": "attention",
        "post_attention_layernorm": "o",
        "pre_feedforward_layernorm": "mlp",
        "post_feedforward_layernorm": "down",
    },
    {
        "input_layernorm": "attention",
        "post_attention_layernorm": "o",
        "pre_feedforward_layernorm": "mlp",
        "post_feedforward_layernorm": "down",
        "post_per_layer_input_norm": "per_layer_input",
    },
    {
        "input_layernorm": "attention",
        "post_self_attn_layernorm": "o",
        "post_attention_layernorm": "mlp",
        "post_mlp_layernorm": "down",
    },
)


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
        As many dicts as blocks, and one more: ``norm:attention``, ``norm:mlp`` and ``norm:block`` for a norm of the
        stream's width that these read through, ``norm:o`` and ``norm:down`` for one of what these give, ``norm:last``;
        by the module's own name, and those of the norms beside it, where it is not known what it does; those of
        `HEAD_NORMS` that are there, `EMBEDDING` and `HEAD`.
    """
    views: list[dict[str, Projection]] = []
    inside = {id(module) for block in blocks for module in block.modules()}
    qualified = {id(module): name for name, module in model.named_modules()}

    def view(name: str, layer: int, module: nn.Module) -> Projection:
        return _view(name, layer, module, qualified[id(module)])

    last = len(blocks)
    outside = _norms(((name, part) for name, part in model.named_modules() if id(part) not in inside), width)
    for layer, block in enumerate(blocks):
        # A norm inside the attention is of q or k, though it may be as wide as the stream (olmo2).
        norms = _by_role(_norms(block.named_children(), width), read_through=bool(outside))
        norms += _head_norms(model, layers[layer], heads[layer])
        views.append({name: view(name, layer, module) for name, module in norms})
    if len(outside) == 1:
        outside = [("last", outside[0][1])]
    rest = {f"{NORM}{name}": view(f"{NORM}{name}", last, part) for name, part in outside}
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


def _by_role(norms: Sequence[tuple[str, nn.Module]], *, read_through: bool) -> list[tuple[str, nn.Module]]:
    """A block's norms, named for what they do.

    Args:
        norms: By their names in the block.
        read_through: Whether the stream is read through a norm behind the last block. Where it is not, blocks may norm
            the stream itself, under the same names (the first GPT).
    """
    names = {name for name, _ in norms}
    roles = next((roles for roles in _ROLES if roles.keys() == names), None) if read_through else None
    if roles is None:
        beside = "+".join(sorted(names))
        roles = {name: name if len(names) == 1 else f"{beside}/{name}" for name in names}
    return [(f"{NORM}{roles[name]}", module) for name, module in norms]


def _norms(modules: Iterable[tuple[str, nn.Module]], width: int) -> list[tuple[str, nn.Module]]:
    """Modules with one weight for each neuron of the stream, by their names."""
    norms = []
    for name, part in modules:
        weight = getattr(part, "weight", None)
        if isinstance(weight, nn.Parameter) and tuple(weight.shape) == (width,):
            norms.append((name.replace(".", "/"), part))
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
            if HEAD_NORM_NAMES[name].fullmatch(child) and weight is not None and tuple(weight.shape) in sizes:
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
