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

import torch
from torch import Tensor

from tmerge.models import SIDES, feature_key
from tmerge.transport.matching import Correspondence

__all__ = ["ReadWeight", "weight_rows"]

ReadWeight = Callable[[int, str], Tensor]
"""(layer, projection) -> (out, in) weight of one model."""


def weight_rows(
    key: str,
    projections: Collection[str],
    target: Callable[[str], Tensor],
    source: Callable[[str], Tensor],
    matched: Mapping[str, Correspondence],
) -> tuple[Tensor, Tensor] | None:
    """Every neuron's weights, over all projections that it is part of, as a row of length one.

    The products of the two are cosines, and are left to the caller, who has somewhere to add them.

    Args:
        key: Which neurons: a feature key.
        projections: That both layers have.
        target: Projection -> (out, in) weight of the target's layer, read when it is asked for.
        source: Likewise of its pair.
        matched: Feature key -> the correspondence of the neurons on the other side.

    Returns:
        (n, d) float32 of the target's neurons, and (n', d) of the source's with their neighbours in the target's
        order; None where no projection has these neurons on one side and matched ones on the other.
    """
    own, theirs = [], []
    for projection in projections:
        for side, other_side in (SIDES, SIDES[::-1]):
            other = matched.get(feature_key(projection, other_side))
            if feature_key(projection, side) != key or other is None:
                continue
            weights = [read(projection).float() for read in (target, source)]
            if side == "pre":
                weights = [weight.T for weight in weights]
            own.append(weights[0])
            theirs.append(_in_order_of(weights[1], other))
    if not own:
        return None
    return _unit(torch.cat(own, 1)), _unit(torch.cat(theirs, 1))


def _in_order_of(weight: Tensor, matched: Correspondence) -> Tensor:
    """(m, n') of the source's neurons as (m, n) of the target's, through their correspondence."""
    n, _ = matched.shape
    carried = torch.zeros(len(weight), n)
    return carried.index_add_(1, matched.rows, weight[:, matched.columns] * matched.values)


def _unit(rows: Tensor) -> Tensor:
    """Of length one each; rows of zeros as they are."""
    return torch.nn.functional.normalize(rows, dim=1)
