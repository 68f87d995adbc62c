"""The projections of any causal LM: q k v o of attention and gate up down of the MLP, as views, layer by layer."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from tmerge.errors import UnsupportedModelError
from tmerge.models.discovery import find_block_list, read_block, unwrap
from tmerge.models.head_norms import NormTap, norm_taps
from tmerge.models.layouts import MLP_NAMES, HeadLayout
from tmerge.models.multipliers import Multipliers, multipliers_of
from tmerge.models.stream import NORM, embedding_scale, stream_views
from tmerge.models.views import PROJECTIONS, SIDES, Projection, Rows, Tap, feature_key

__all__ = [
    "PROJECTIONS",
    "SIDES",
    "Architecture",
    "HeadLayout",
    "Projection",
    "Rows",
    "Tap",
    "describe",
    "feature_key",
    "match",
]


@dataclass(frozen=True, eq=False)
class Architecture:
    """What was found in a model.

    Attributes:
        model_type: The config's.
        layers: Per block, the name and the view of each projection it has, in the order of `PROJECTIONS`. A block
            may have fewer than another: a mixture of experts has no dense MLP.
        left_alone: What has weights and is not merged, one sentence each with the layers it concerns.
        attention: Per block, its heads; None for a block without plain attention.
        stream: What else a task vector changes, as `stream_views` gives it.
        embedding_scale: What a token's embedding is multiplied by before it enters the residual stream.
        norm_taps: Per block, where the outputs of those of q, k and v that are normed are caught behind the norm; those
            that are rotated before are not among them.
        multipliers: What it multiplies by around its projections and its head.
    """

    model_type: str
    layers: list[dict[str, Projection]]
    left_alone: list[str] = field(default_factory=list)
    attention: list[HeadLayout | None] = field(default_factory=list)
    stream: list[dict[str, Projection]] = field(default_factory=list)
    embedding_scale: float = 1.0
    norm_taps: list[dict[str, NormTap]] = field(default_factory=list)
    multipliers: Multipliers = field(default_factory=Multipliers)

    @property
    def views(self) -> list[dict[str, Projection]]:
        """Everything that can be fused, by layer: the projections and, in one list more, what else there is."""
        if not self.stream:
            return self.layers
        return [{**layer, **other} for layer, other in zip([*self.layers, {}], self.stream, strict=True)]

    def parameters(self, projections: Iterable[str], *, stream: bool) -> list[str]:
        """Names of the model's parameters that these are read from.

        Args:
            projections: Names of `PROJECTIONS`.
            stream: Whether what else a task vector changes is wanted too.
        """
        wanted = self.projections(projections)
        wanted += [view for layer in self.stream for view in layer.values()] if stream else []
        return list(dict.fromkeys(name for view in wanted for name in view.parameters))

    def reading(self, weights: Mapping[str, Tensor]) -> Architecture:
        """The same views, of weights that are not in the modules.

        Args:
            weights: By name; those that are never asked for may be missing.
        """
        layers, stream = (
            [{name: replace(view, stored=weights) for name, view in layer.items()} for layer in part]
            for part in (self.layers, self.stream)
        )
        return replace(self, layers=layers, stream=stream)

    @property
    def num_layers(self) -> int:
        """Number of blocks."""
        return len(self.layers)

    @property
    def hidden_size(self) -> int:
        """Width of the residual stream: what each o and each down writes to."""
        return next(layer["o"].out_features for layer in self.layers if "o" in layer)

    @property
    def names(self) -> list[str]:
        """The projections that at least one layer has, in the order of `PROJECTIONS`."""
        return [name for name in PROJECTIONS if any(name in layer for layer in self.layers)]

    @property
    def _first_heads(self) -> HeadLayout:
        return next(heads for heads in self.attention if heads is not None)

    @property
    def heads(self) -> int:
        """Query heads of the first attention layer; see `attention` for each layer's own."""
        return self._first_heads.heads

    @property
    def kv_heads(self) -> int:
        """Key and value heads of the first attention layer."""
        return self._first_heads.kv_heads

    @property
    def head_dim(self) -> int:
        """Dimensions of a head of the first attention layer."""
        return self._first_heads.head_dim

    @property
    def normed(self) -> set[str]:
        """Projections whose outputs some layer norms: q, k and v before products are made of them, o and down alone."""
        writing = {name for name in ("o", "down") for layer in self.stream if f"{NORM}{name}" in layer}
        return writing | {name for heads in self.attention if heads is not None for name in heads.normed}

    def projections(self, names: Iterable[str] = PROJECTIONS) -> list[Projection]:
        """All views of these names, layer by layer."""
        wanted = set(names)
        return [view for layer in self.layers for name, view in layer.items() if name in wanted]

    def taps(self, projections: Sequence[str]) -> list[Tap]:
        """Where to catch the pre and post features of these projections.

        Args:
            projections: Names of `PROJECTIONS`; a layer that lacks one has no tap for it.

        Returns:
            One tap per layer and feature key: q, k and v share one pre feature, gate and up another.
        """
        unknown = sorted(set(projections) - set(PROJECTIONS))
        if unknown:
            raise ValueError(f"{', '.join(unknown)}: not among the projections {', '.join(PROJECTIONS)}")
        taps: dict[tuple[int, str], Tap] = {}
        for view in self.projections(projections):
            for side in SIDES:
                key = feature_key(view.name, side)
                features = view.in_features if side == "pre" else view.out_features
                taps.setdefault((view.layer, key), Tap(key, view.layer, view.module, side, features, view.rows))
        return list(taps.values())


def _layer_ranges(layers: Sequence[int]) -> str:
    """``[0, 1, 2, 5]`` -> ``"layers 0-2, 5"``."""
    runs: list[list[int]] = []
    for layer in layers:
        if runs and layer == runs[-1][1] + 1:
            runs[-1][1] = layer
        else:
            runs.append([layer, layer])
    text = ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)
    return f"layer{'s' if len(layers) > 1 else ''} {text}"


def describe(model: nn.Module, *, rounded_to: torch.dtype | None = None) -> Architecture:
    """Find every projection of a causal LM.

    Blocks, attention and MLP are found by the names and classes of their modules, fused modules by what is known
    of the ``config.model_type``, and all of it is held against the sizes that the config gives.

    Args:
        model: A ``transformers`` causal LM or its base model, on any device: on ``meta`` the views have shapes
            and no values. ``torch.compile`` and data-parallel wrappers are looked through.
        rounded_to: Dtype that values are rounded to before they are written, where the model is held in another.

    Returns:
        The architecture; its views share memory with the model.

    Raises:
        UnsupportedModelError: An encoder-decoder, a multimodal model, quantised weights, or blocks that tmerge
            has no description of; the message lists what was looked for and what was found.
    """
    inner = unwrap(model)
    config = inner.config
    list_name, blocks = find_block_list(inner)
    descriptions = [read_block(inner, list_name, layer, block) for layer, block in enumerate(blocks)]
    clauses: dict[str, list[int]] = {}
    for layer, block in enumerate(descriptions):
        for clause in block.left_alone:
            clauses.setdefault(clause, []).append(layer)
    owners: dict[tuple[int, Rows], Projection] = {}
    for view in (view for block in descriptions for view in block.projections.values()):
        owner = owners.setdefault((id(view.module.get_parameter("weight")), view.rows), view)
        if owner is not view:
            # Fusing one would change the other, which has features and a plan of its own.
            raise UnsupportedModelError(
                f"{config.model_type}: {owner} and {view} share one weight; untie the layers, or choose a model "
                "whose layers have their own"
            )
    sentences = [f"{_layer_ranges(layers)}: {clause}" for clause, layers in clauses.items()]
    has_mlp = any("down" in block.projections for block in descriptions)
    if not has_mlp and not any("experts" in clause for clause in clauses):
        raise UnsupportedModelError(
            f"{config.model_type} ({type(inner).__name__}) has no MLP that tmerge knows: looked for "
            f"{' and '.join('/'.join(MLP_NAMES[name]) for name in ('up', 'down'))}, found "
            f"{'; '.join(sentences) or 'none'}; choose a model of another architecture"
        )
    layers = [block.projections for block in descriptions]
    width = next((layer["o"].out_features for layer in layers if "o" in layer), 0)
    heads = [block.heads for block in descriptions]
    stream = stream_views(inner, blocks, width, layers, heads) if width else []
    if rounded_to is not None:
        layers, stream = (
            [{name: replace(view, rounded_to=rounded_to) for name, view in layer.items()} for layer in part]
            for part in (layers, stream)
        )
    taps = [
        {} if of is None else norm_taps(inner, layer, {"q": of.heads, "k": of.kv_heads, "v": of.kv_heads})
        for layer, of in zip(layers, heads, strict=True)
    ]
    around = embedding_scale(inner), taps, multipliers_of(config)
    return Architecture(config.model_type, layers, sentences, heads, stream, *around)


def match(target: Architecture, source: Architecture, wanted: Iterable[str]) -> tuple[list[str], dict[str, str]]:
    """The projections that both models have.

    Args:
        target: The model that is changed.
        source: The model that is read.
        wanted: Names of `PROJECTIONS`.

    Returns:
        The names that at least one layer of each side has, in the order asked; and for every other name one
        sentence that says which side lacks it.

    Raises:
        ValueError: A name is none of `PROJECTIONS`.
    """
    matched: list[str] = []
    skipped: dict[str, str] = {}
    for name in dict.fromkeys(wanted):
        if name not in PROJECTIONS:
            raise ValueError(f"{name!r} is not a projection; choose from {', '.join(PROJECTIONS)}")
        lacking = [
            f"the {side} ({architecture.model_type}) has no {name}: {_why_lacking(architecture, name)}"
            for side, architecture in (("target", target), ("source", source))
            if name not in architecture.names
        ]
        if lacking:
            skipped[name] = "; ".join(lacking)
        else:
            matched.append(name)
    return matched, skipped


def _why_lacking(architecture: Architecture, name: str) -> str:
    if name == "gate" and "up" in architecture.names:
        return "its MLP is not gated"
    if name in ("gate", "up", "down"):
        return "its MLPs are experts, which are left alone"
    return "no layer stores one"
