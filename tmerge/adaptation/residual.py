"""Residual-frozen adaptation: what was transported stays, the base weights train (Eq. 15-18).

    W_fused = W + R,   R = alpha * mask * (transported - W)      R frozen, W trains (Eq. 15-17)
    W <- W + R                                                   folded back after training (Eq. 18)

R is a buffer of a parametrization on the module that stores W, in that module's own layout, so the forward pass reads
W + R, gradients reach W alone, and folding leaves a plain model whose forward pass is the same one.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from tmerge.fusion import Alpha, TransportedNeurons, fuse
from tmerge.models import Projection

__all__ = ["attach_residual", "fold_residual"]


class _FrozenResidual(nn.Module):
    """Adds a constant to a parameter."""

    residual: Tensor

    def __init__(self, residual: Tensor) -> None:
        super().__init__()
        # Not persistent: a training checkpoint need not hold what the run's folder has.
        self.register_buffer("residual", residual, persistent=False)

    def forward(self, weight: Tensor) -> Tensor:
        return weight + self.residual


@torch.no_grad()
def attach_residual(
    layers: Sequence[dict[str, Projection]], transported: Sequence[TransportedNeurons], alpha: Alpha
) -> int:
    """Put the transported residual beside the weights that it was made for.

    Args:
        layers: The *unfused* model's projections, `Architecture.layers`. Do not read them again until the residual is
            folded: their modules hold no plain weight.
        transported: What the merge fuses.
        alpha: Fusion strength.

    Returns:
        Parameters that got a residual.
    """
    modules = {id(view.module): view.module for item in transported for view in (layers[item.layer][item.projection],)}
    before = {
        (path, name): parameter.detach().clone()
        for path, module in modules.items()
        for name, parameter in module.named_parameters(recurse=False)
    }
    fuse(layers, transported, alpha)
    attached = 0
    for (path, name), own in before.items():
        parameter = modules[path].get_parameter(name)
        residual = parameter.detach() - own
        parameter.copy_(own)
        if residual.any():
            # unsafe: the check that it asks for runs the parametrization, which changes neither shape nor dtype.
            parametrize.register_parametrization(modules[path], name, _FrozenResidual(residual), unsafe=True)
            attached += 1
    return attached


def fold_residual(model: nn.Module) -> None:
    """Add every residual to its weight, and leave a plain model (Eq. 18)."""
    for module in list(model.modules()):
        if not parametrize.is_parametrized(module):
            continue
        for name in list(module.parametrizations):  # type: ignore[arg-type]
            parametrize.remove_parametrizations(module, name, leave_parametrized=True)
