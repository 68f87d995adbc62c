"""The norms that an attention has for what q and k (and in few models v) give, before products are made of it.

Behind one, the size of the projection's own outputs is of no account: a model whose q is ten times as large computes
the same. What scores are made of is what the norm gives.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from tmerge.models.views import Projection, Rows, Tap, feature_key

__all__ = ["HEAD_NORM_NAMES", "NormTap", "norm_taps", "normed_by"]

HEAD_NORM_NAMES = {
    "q": re.compile(r"(q|query)_?(layer)?norm"),
    "k": re.compile(r"(k|key)_?(layer)?norm"),
    "v": re.compile(r"(v|value)_?(layer)?norm"),
}
"""Names of modules, beside the projections, that norm what one of these gives."""
_BOTH = re.compile(r"qk_?(layer)?norm")

# These norm what rotary embeddings have made of q and k; all others norm first.
_ROTATED_FIRST = frozenset({"hunyuan_v1_dense", "hunyuan_v1_moe", "llama4_text", "nanochat"})


@dataclass(frozen=True)
class NormTap(Tap):
    """Where a projection's outputs are caught as a norm leaves them; its key is that of the outputs themselves.

    Attributes:
        heads: That the outputs divide into.
    """

    heads: int

    def read(self, inputs: tuple[Any, ...], output: Tensor, batch: int | None = None) -> Tensor:
        """As `Tap.read`: (batch, seq, features), whichever way round the norm is given positions and heads."""
        given = inputs[0]
        if output.dim() < 4:
            return super().read(inputs, output, batch)
        first, second = given.shape[1:3]
        # As many positions as heads: heads lie closer together.
        if first == self.heads and (second != self.heads or given.stride(1) < given.stride(2)):
            output = output.transpose(1, 2)
        return output.flatten(2)


def normed_by(attention: nn.Module) -> frozenset[str]:
    """Names of those of q, k and v that a norm of the attention's own follows."""
    children = [name for name, _ in attention.named_children()]
    normed = {name for name, pattern in HEAD_NORM_NAMES.items() if any(map(pattern.fullmatch, children))}
    return frozenset(normed | ({"q", "k"} if any(map(_BOTH.fullmatch, children)) else set()))


def norm_taps(
    model: PreTrainedModel, projections: Mapping[str, Projection], heads: Mapping[str, int]
) -> dict[str, NormTap]:
    """Where one block's normed outputs are caught, by the projection's name.

    Args:
        model: The causal LM, or its base model.
        projections: The block's.
        heads: Of q, of k and of v.

    Returns:
        Without those that are not normed, and those that are rotated before.
    """
    taps: dict[str, NormTap] = {}
    if model.config.model_type in _ROTATED_FIRST:
        return taps
    for name in projections.keys() & heads.keys():
        view = projections[name]
        attention = model.get_submodule(view.module_name.rpartition(".")[0])
        for child, part in attention.named_children():
            if HEAD_NORM_NAMES[name].fullmatch(child):
                width = view.out_features
                key, rows = feature_key(name, "post"), Rows(1, width, 0, width)
                taps[name] = NormTap(key, view.layer, part, "post", width, rows, heads[name])
    return taps
