"""Finding the blocks of a causal LM and, in each, its projections, by module names and classes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from tmerge.errors import UnsupportedModelError
from tmerge.models.layouts import (
    ATTENTION_NAMES,
    ATTENTION_PATHS,
    CROSS_ATTENTION_NAMES,
    FUSED_ATTENTION,
    FUSED_MLP,
    MAY_LACK,
    MLP_NAMES,
    MLP_PATHS,
    OWN_NAMES,
    HeadLayout,
    head_layout,
)
from tmerge.models.linears import check_linear, features_of
from tmerge.models.views import PROJECTIONS, Projection, Rows

__all__ = ["Block", "find_block_list", "read_block", "unwrap"]

_NAMES = ", ".join(PROJECTIONS)
_SUB_MODELS = ("vision", "audio", "image", "video", "speech", "text", "talker", "thinker")


@dataclass
class Block:
    """What was found in one block.

    Attributes:
        projections: Name to view.
        heads: The attention's heads, None where the block has no plain attention.
        left_alone: What the block holds besides, one clause each, the same for blocks that are alike.
    """

    projections: dict[str, Projection] = field(default_factory=dict)
    heads: HeadLayout | None = None
    left_alone: list[str] = field(default_factory=list)


@dataclass
class _Sites:
    """Modules of an attention or an MLP: projection -> (its child's name, the rows or None for all of them)."""

    path: str
    container: nn.Module
    found: dict[str, tuple[str, Rows | None]]


def unwrap(model: nn.Module) -> PreTrainedModel:
    """The model inside ``torch.compile`` and data-parallel wrappers.

    Raises:
        UnsupportedModelError: There is no ``transformers`` model inside.
    """
    while not isinstance(model, PreTrainedModel):
        inner = getattr(model, "_orig_mod", None)
        if inner is None and isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            inner = model.module
        if not isinstance(inner, nn.Module):
            raise UnsupportedModelError(
                f"{type(model).__name__} is not a transformers model: load one with AutoModelForCausalLM, or take it "
                "out of its wrapper (merge_and_unload, for an adapter)"
            )
        model = inner
    return model


def _child(module: nn.Module, path: str) -> nn.Module | None:
    """The descendant at a dotted path, or None: some models register None for a module they go without."""
    current: Any = module
    for part in path.split(".") if path else ():
        current = current._modules.get(part)
        if current is None:
            return None
    return current


def _names(module: nn.Module, depth: int = 2) -> list[str]:
    """Names of what holds matrices inside a module, for messages: at most `depth` levels and 16 names."""
    holders = [
        name
        for name, part in module.named_modules()
        if name and any(parameter.dim() >= 2 for parameter in part.parameters(recurse=False))
    ]
    names = list(dict.fromkeys(".".join(name.split(".")[:depth]) for name in holders))
    return names if len(names) <= 16 else [*names[:16], f"{len(names) - 16} more"]


def _title(model: PreTrainedModel) -> str:
    return f"{model.config.model_type} ({type(model).__name__})"


def _module_lists(model: nn.Module) -> dict[str, nn.ModuleList]:
    """The outermost lists of modules that are not empty."""
    lists: dict[str, nn.ModuleList] = {}
    for name, part in model.named_modules():
        if isinstance(part, nn.ModuleList) and len(part) and not any(name.startswith(f"{outer}.") for outer in lists):
            lists[name] = part
    return lists


def _refuse_other_kinds(model: PreTrainedModel) -> None:
    config: PreTrainedConfig = model.config
    if getattr(config, "is_encoder_decoder", False):
        stacks = list(_module_lists(model))
        raise UnsupportedModelError(
            f"{_title(model)} is an encoder-decoder: looked for one stack of decoder blocks, found "
            f"{', '.join(stacks[:4]) or 'an encoder and a decoder'}; choose a decoder-only causal language model"
        )
    sub_models = [
        key
        for key in getattr(config, "sub_configs", None) or {}
        if key.startswith(_SUB_MODELS) and getattr(config, key, None) is not None
    ]
    sub_models += [
        key for key in ("vision_config", "audio_config") if getattr(config, key, None) and key not in sub_models
    ]
    if sub_models:
        parts = [f"{name} ({type(part).__name__})" for name, part in model.base_model.named_children()]
        raise UnsupportedModelError(
            f"{_title(model)} is a multimodal model: looked for a language model alone, found {', '.join(sub_models)} "
            f"in its config and {', '.join(parts[:6])} in the model; choose a text-only checkpoint of it"
        )
    if getattr(config, "slow_but_exact", False) and getattr(config, "pretraining_tp", 1) > 1:
        raise UnsupportedModelError(
            f"{_title(model)} has slow_but_exact with pretraining_tp {config.pretraining_tp} in its config, which goes "
            "past its own projections; set slow_but_exact to false there"
        )


def _pick(container: nn.Module, names: Iterable[str], projection: str, where: str) -> str | None:
    matches = [name for name in names if container._modules.get(name) is not None]
    if len(matches) > 1:
        raise UnsupportedModelError(
            f"{where} has {' and '.join(matches)}, each a name for {projection}: tmerge has no description of this "
            "block and does not guess which is meant; choose a model of another architecture"
        )
    return matches[0] if matches else None


def _fused_rows(
    config: PreTrainedConfig, container: nn.Module, heads: HeadLayout | None, where: str
) -> dict[str, tuple[str, Rows | None]]:
    """What the fused module known for this model type stores, or nothing where there is no such module here."""
    if heads is None:
        fused = FUSED_MLP.get(config.model_type, "")
    else:
        fused, layout = FUSED_ATTENTION.get(config.model_type, ("", None))
    module = container._modules.get(fused)
    if module is None:
        return {}
    check_linear(module, f"{where}.{fused}")
    outputs, _ = features_of(module)
    if heads is None or layout is None:
        half = outputs // 2
        return {"gate": (fused, Rows(1, outputs, 0, half)), "up": (fused, Rows(1, outputs, half, outputs))}
    rows = layout(heads)
    stored = next(iter(rows.values())).stored
    if stored != outputs:
        raise UnsupportedModelError(
            f"{where}.{fused} has {outputs} outputs, expected {stored} from {heads}: it is not laid out as "
            f"{config.model_type} is known to be; choose a model of another architecture"
        )
    return {name: (fused, part) for name, part in rows.items()}


def _sites(config: PreTrainedConfig, path: str, container: nn.Module, heads: HeadLayout | None, where: str) -> _Sites:
    """The projections of an attention (`heads` given) or of an MLP (None)."""
    projections = _fused_rows(config, container, heads, where)
    own = OWN_NAMES.get(config.model_type, {})
    for name, names in (MLP_NAMES if heads is None else ATTENTION_NAMES).items():
        if name not in projections and (picked := _pick(container, own.get(name, names), name, where)):
            projections[name] = (picked, None)
    return _Sites(path, container, projections)


def _has_convolution(module: nn.Module) -> bool:
    # transformers' Conv1D is a linear layer; what else is called a convolution is one.
    return any("conv" in type(part).__name__.lower() and not isinstance(part, Conv1D) for part in module.modules())


def _layer_is_attention(config: PreTrainedConfig, layer: int) -> bool:
    """False where the config says that the layer's attention is linear: its q, k and v mean something else."""
    kinds = getattr(config, "layer_types", None)
    return not kinds or layer >= len(kinds) or "linear" not in str(kinds[layer])


def _attention(config: PreTrainedConfig, layer: int, block: nn.Module, where: str) -> tuple[_Sites, HeadLayout] | None:
    """The block's plain attention: softmax attention with its own q, k, v and o."""
    for path in ATTENTION_PATHS if _layer_is_attention(config, layer) else ():
        container = _child(block, path)
        # A convolution before the heads makes linear attention (or a compressed one) of the same four names.
        if container is None or _has_convolution(container):
            continue
        heads = head_layout(config, layer, container)
        if heads is None:
            continue
        sites = _sites(config, path, container, heads, f"{where}.{path}")
        missing = set(ATTENTION_NAMES) - set(sites.found)
        if missing <= MAY_LACK.get(config.model_type, frozenset()):
            return sites, heads
    return None


def _mlp(config: PreTrainedConfig, block: nn.Module, taken: str | None, where: str) -> _Sites | None:
    """The block's dense MLP, which experts are not."""
    for path in MLP_PATHS:
        container = _child(block, path)
        if container is None or path == taken or (path and next(_experts(container), None) is not None):
            continue
        sites = _sites(config, path, container, None, f"{where}.{path}".rstrip("."))
        if {"up", "down"} <= set(sites.found):
            return sites
    return None


def _experts(module: nn.Module) -> Iterator[tuple[str, int]]:
    """Name and number of each set of experts: a list of them, or one module of three-dimensional weights."""
    for name, part in module.named_modules():
        if isinstance(part, nn.ModuleList) and name.rpartition(".")[2] == "experts" and len(part):
            yield name, len(part)
        elif "expert" in (name.rpartition(".")[2] + type(part).__name__).lower():
            sizes = [parameter.shape[0] for parameter in part.parameters(recurse=False) if parameter.dim() >= 3]
            if sizes:
                yield name, sizes[0]


def _check_sizes(projections: dict[str, Projection], heads: HeadLayout | None, hidden: int, title: str) -> None:
    """Hold what was found against the config: a mismatch means that a name was misread."""
    expected: dict[str, tuple[int | None, int | None]] = {"o": (hidden, None), "down": (hidden, None)}
    if heads is not None:
        query, key = heads.heads * heads.head_dim, heads.kv_heads * heads.head_dim
        expected |= {"q": (query, hidden), "k": (key, hidden), "v": (key, hidden), "o": (hidden, query)}
    if "up" in projections:
        middle = projections["up"].out_features
        expected |= {"gate": (middle, hidden), "up": (middle, hidden), "down": (hidden, middle)}
    for name, projection in projections.items():
        wanted = expected[name]
        sizes = (projection.out_features, projection.in_features)
        if wanted != sizes:
            raise UnsupportedModelError(
                f"{title}: {projection} is {sizes}, expected {wanted} (out, in) from hidden size {hidden} and {heads}: "
                "tmerge has no description of this block; choose a model of another architecture"
            )


def read_block(model: PreTrainedModel, list_name: str, layer: int, block: nn.Module) -> Block:
    """Find the projections of one block.

    Args:
        model: The whole model.
        list_name: Qualified name of the list of blocks.
        layer: Index of the block in it.
        block: The block.

    Returns:
        Its projections and what is left alone.

    Raises:
        UnsupportedModelError: A module is quantised, wrapped or of a size that contradicts the config, or a name
            is ambiguous.
    """
    config = model.config
    where = f"{list_name}.{layer}"
    attention = _attention(config, layer, block, where)
    mlp = _mlp(config, block, attention[0].path if attention else None, where)
    result = Block(heads=attention[1] if attention else None)
    matched: set[int] = set()
    for sites in ([attention[0]] if attention else []) + ([mlp] if mlp else []):
        for name, (child, rows) in sites.found.items():
            module_name = ".".join(part for part in (where, sites.path, child) if part)
            module = sites.container.get_submodule(child)
            check_linear(module, module_name)
            outputs, inputs = features_of(module)
            rows = rows or Rows(1, outputs, 0, outputs)
            result.projections[name] = Projection(
                name, layer, rows.count, inputs, getattr(module, "bias", None) is not None, module, module_name, rows
            )
            matched.add(id(module))
    _check_sizes(result.projections, result.heads, config.hidden_size, _title(model))
    result.projections = {name: result.projections[name] for name in PROJECTIONS if name in result.projections}
    result.left_alone = list(_left_alone(block, attention[0].path if attention else None, result, matched))
    return result


def _left_alone(block: nn.Module, attention_path: str | None, description: Block, matched: set[int]) -> Iterator[str]:
    """One clause for each kind of thing in the block that has matrices and is no projection."""
    with_experts: list[str] = []
    for name, count in _experts(block):
        top = name.split(".")[0]
        # Experts inside attention (a gate on its output, say) do not make the MLP one of experts.
        if top in with_experts or (attention_path is not None and top == attention_path.split(".")[0]):
            continue
        with_experts.append(top)
        merged = ["attention"] if description.heads else []
        merged += ["the dense MLP beside them"] if "up" in description.projections else []
        rest = f"{' and '.join(merged)} {'are' if len(merged) > 1 else 'is'} merged, " if merged else ""
        yield f"{count} experts per layer (mixture of experts): {rest}the experts are left alone"

    others: dict[str, list[str]] = {}
    for name, part in block.named_modules():
        is_norm = "norm" in type(part).__name__.lower()
        has_matrix = any(parameter.dim() >= 2 for parameter in part.parameters(recurse=False))
        top = name.split(".")[0]
        if has_matrix and not is_norm and id(part) not in matched and top not in with_experts:
            others.setdefault(top, []).append(name or type(part).__name__)
    unnamed: list[str] = []
    for top, names in others.items():
        child = block.get_submodule(top)
        if not top or any(id(part) in matched for part in child.modules()):
            unnamed += names
        elif description.heads is None:
            yield f"{top} ({type(child).__name__}) is not plain attention with q, k, v and o: left alone"
        else:
            unnamed.append(f"{top} ({type(child).__name__})")
    if unnamed:
        yield f"{', '.join(unnamed)} {'is' if len(unnamed) == 1 else 'are'} none of {_NAMES}: left alone"

    # A module that holds several projections is told of once.
    for projection in {id(view.module): view for view in description.projections.values()}.values():
        stored = {view.rows for view in description.projections.values() if view.module is projection.module}
        spare = projection.rows.stored - sum(rows.count for rows in stored)
        if spare:
            child_name = projection.module_name.rpartition(".")[2]
            yield f"{spare} of the {projection.rows.stored} rows of {child_name} are none of {_NAMES}: left alone"


def find_block_list(model: PreTrainedModel) -> tuple[str, nn.ModuleList]:
    """The list of decoder blocks: the one list whose elements have plain attention.

    Args:
        model: A causal LM, or its base model.

    Returns:
        Its qualified name and the list.

    Raises:
        UnsupportedModelError: An encoder-decoder or multimodal model, none or several such lists, or a list
            that is not as long as the config says.
    """
    _refuse_other_kinds(model)
    config = model.config
    lists = _module_lists(model)
    with_attention = {
        name: blocks
        for name, blocks in lists.items()
        if any(_attention(config, layer, block, f"{name}.{layer}") for layer, block in enumerate(blocks))
    }
    fused = FUSED_ATTENTION.get(config.model_type)
    looked_for = (
        f"looked for one list of blocks whose {'/'.join(ATTENTION_PATHS)} holds "
        + (f"{fused[0]} (fused)" if fused else "q_proj, k_proj, v_proj")
        + f" and {'/'.join(ATTENTION_NAMES['o'])}"
    )
    if not with_attention:
        stacks = [
            f"{name}: {len(blocks)} of {type(blocks[0]).__name__} with {', '.join(_names(blocks[0]))}"
            for name, blocks in list(lists.items())[:3]
        ]
        raise UnsupportedModelError(
            f"{_title(model)} has no block layout that tmerge knows: {looked_for}; found "
            f"{'; '.join(stacks) or 'no list of blocks'}; choose a model of another architecture"
        )
    if len(with_attention) > 1:
        raise UnsupportedModelError(
            f"{_title(model)} has several stacks of blocks: {looked_for}; found {', '.join(with_attention)}; "
            "choose a model with a single stack"
        )
    name, blocks = next(iter(with_attention.items()))
    for layer, block in enumerate(blocks):
        crossed = [child for child in CROSS_ATTENTION_NAMES if block._modules.get(child) is not None]
        if crossed:
            raise UnsupportedModelError(
                f"{_title(model)} is the decoder of an encoder-decoder: looked for self-attention alone, found "
                f"{name}.{layer}.{crossed[0]}; choose a decoder-only causal language model"
            )
    if len(blocks) != config.num_hidden_layers:
        raise UnsupportedModelError(
            f"{_title(model)} has {len(blocks)} blocks in {name}, but its config says {config.num_hidden_layers}: "
            "correct num_hidden_layers in its config.json"
        )
    return name, blocks
