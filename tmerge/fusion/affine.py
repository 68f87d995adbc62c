"""Affine maps: the features' means travel too, and what they shift goes into the bias.

A linear Phi maps zero to zero, but features are not centred, and what correlation matched are deviations from the
means mu (inputs) and nu (outputs). Carrying deviations, a target input x stands for the source input
``mu_B + Phi_in (x - mu_A)``, and a source output y for the target output ``nu_A + Phi_out (y - nu_B)``. Of a weight,
the source's own means cancel, since nu_B = W_B mu_B + b_B, and what is left is a bias that keeps the target's mean
output:

    b~ = nu_A - W~ mu_A                                        with W~ = Phi_out W_B Phi_in, nu_A = W mu_A + b

Of a task vector (D_W, D_b), which is no map between means but a change of outputs:

    b~ = Phi_out (D_b + D_W mu_B) - W~ mu_A                    with W~ = Phi_out D_W Phi_in

so that source inputs without a counterpart count as what they are on average instead of as nothing.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["difference_bias", "mean_keeping_bias"]


def mean_keeping_bias(own: Tensor, own_bias: Tensor, transported: Tensor, mean: Tensor) -> Tensor:
    """b~ of a weight: with it, the transported neurons give the target's mean output for the target's mean input.

    Args:
        own: (out, in) the target's weight, of the selected neurons.
        own_bias: (out,) its bias.
        transported: (out, in) W~.
        mean: (in,) mu_A, of the inputs that the weights have.

    Returns:
        (out,), of which alpha takes its share as of W~ (Eq. 14).
    """
    return own_bias + (own - transported) @ mean


def difference_bias(bias: Tensor | None, weight: Tensor, mean: Tensor) -> Tensor:
    """D_b + D_W mu_B of a task vector, in the source's coordinates, for Phi_out to carry.

    Args:
        bias: (out',) D_b; None for a source without biases.
        weight: (out', in') D_W.
        mean: (in',) mu_B.

    Returns:
        (out',).
    """
    moved = weight @ mean
    return moved if bias is None else torch.add(moved, bias)
