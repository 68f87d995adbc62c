"""How alike two neurons' weights are, once it is known who their neighbours are.

A neuron of a model that was cut out of another, or trained on from it, keeps weights much like its counterpart's: its
row of a projection (what it reads), or its column (what it writes), with the neurons on the other side put in the
order of their own counterparts. That needs no text, and says nothing between strangers: the cosine of two unrelated
rows of d weights is 1 / sqrt(d) in size, far below any correlation of activations that a matching rests on. The
assignment over such products is Git Re-Basin's (arXiv 2209.04836, section 3.2), here of models of two shapes, and
beside the activations.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from tmerge.models import SIDES, feature_key
from tmerge.transport.matching import Correspondence

__all__ = ["COMPARED_WEIGHTS", "ReadWeight", "WeightAgreement", "add_cosines", "neuron_weights"]

COMPARED_WEIGHTS = 1024
"""Of a neuron, evenly spaced, at most: of so many a cosine of c is known to (1 - c^2) / 32. To compare all of a wide
model's would take longer than to compare its activations."""

# By so much are the weights of paired layers more alike than by chance, before they have a say.
_CLEARLY = 0.05

ReadWeight = Callable[[int, str], Tensor]
"""(layer, projection) -> (out, in) weight of one model."""


@dataclass(frozen=True)
class WeightAgreement:
    """How alike the weights of two models are, as `tmerge.transport.layers.nearest_cosines` has it.

    Attributes:
        paired: Mean cosine over the layers that stand for each other.
        chance: The same through a shuffled stream.
        moved_layers: How many layers are paired otherwise than by activations alone.
    """

    paired: float
    chance: float
    moved_layers: int

    @property
    def clear(self) -> bool:
        """Whether weights have a say: theirs are as alike as only those of models with a common ancestor are."""
        return self.paired - self.chance >= _CLEARLY

    def to_dict(self) -> dict[str, Any]:
        """As the report holds it."""
        return {**asdict(self), "clear": self.clear}


def add_cosines(
    similarity: Tensor,
    key: str,
    projections: Collection[str],
    target: Callable[[str], Tensor],
    source: Callable[[str], Tensor],
    matched: Mapping[str, Correspondence],
) -> bool:
    """Add the cosines of every target neuron's weights with every source neuron's, over all that it is part of.

        cos(i, j) = sum_p <a_pi, b_pj> / (|a_i| |b_j|),   |a_i|^2 = sum_p |a_pi|^2

    over projections p, a_pi the target neuron's row or column and b_pj the source neuron's, its entries in the order of
    the target's neurons on the other side, `COMPARED_WEIGHTS` of them at most. One projection of each model is in
    memory at a time.

    Args:
        similarity: (n, n') float32, changed in place.
        key: Which neurons: a feature key.
        projections: That both layers have.
        target: Projection -> (out, in) weight of the target's layer, read when it is asked for.
        source: Likewise of its pair.
        matched: Feature key -> the correspondence of the neurons on the other side.

    Returns:
        Whether there was anything to add: a projection with these neurons on one side and matched ones on the other.
    """
    parts = [
        (projection, side == "pre", matched[feature_key(projection, other_side)])
        for projection in projections
        for side, other_side in (SIDES, SIDES[::-1])
        if feature_key(projection, side) == key and feature_key(projection, other_side) in matched
    ]

    def rows(projection: str, by_columns: bool, others: Correspondence) -> tuple[Tensor, Tensor]:
        own = neuron_weights(target(projection), by_columns)
        if (width := own.shape[1]) > COMPARED_WEIGHTS:
            compared = torch.arange(COMPARED_WEIGHTS) * width // COMPARED_WEIGHTS
            own, others = own[:, compared], others.among(compared)
        return own, neuron_weights(source(projection), by_columns, others)

    if len(parts) == 1:
        own, theirs = rows(*parts[0])
        theirs /= _at_least(torch.linalg.vector_norm(theirs, dim=1))[:, None]
        # What was read may be the model's own.
        similarity.addmm_(own / _at_least(torch.linalg.vector_norm(own, dim=1))[:, None], theirs.T)
    elif parts:
        total = torch.zeros_like(similarity)
        squares, source_squares = torch.zeros(len(total)), torch.zeros(total.shape[1])
        for part in parts:
            own, theirs = rows(*part)
            squares += torch.linalg.vector_norm(own, dim=1).square_()
            source_squares += torch.linalg.vector_norm(theirs, dim=1).square_()
            total.addmm_(own, theirs.T)
            del own, theirs
        similarity.add_(total.div_(_at_least(squares.sqrt_())[:, None]).div_(_at_least(source_squares.sqrt_())))
    return bool(parts)


def neuron_weights(weight: Tensor, by_columns: bool, others: Correspondence | None = None) -> Tensor:
    """The weights of each neuron on one side of a projection, in float32; not to be changed, they may be the model's.

    Args:
        weight: (out, in).
        by_columns: Whether the neurons are those that the projection reads.
        others: Of a source: the (n, n') correspondence of the neurons on the other side.

    Returns:
        A row for every neuron: of its own model's neurons on the other side, or of the target's n in their order.
    """
    weight = weight.float().T if by_columns else weight.float()
    if others is None:
        return weight
    n, m = others.shape
    if len(others.rows) > n + m:
        # A plan with many entries a row: by its entries it would take as many columns.
        return weight @ others.dense().T
    carried = torch.zeros(len(weight), n)
    return carried.index_add_(1, others.rows, weight[:, others.columns].mul_(others.values))


def _at_least(norms: Tensor) -> Tensor:
    """That can be divided by: of rows of zeros, nothing is alike."""
    return norms.clamp_min(torch.finfo(norms.dtype).tiny)
