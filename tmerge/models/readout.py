r"""How a model reads its residual stream out: through its last norm and its head to logits.

For a stream h (n,) behind the last block, of root mean square |h|_rms (its deviation, where the norm takes the mean
off),

    logits = scale * (head (gain * h / |h|_rms + shift) + head_bias)

about so where a model caps its logits: the scale is then that of least squares over some. Gain and shift are measured
on the norm itself, whatever it is.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tmerge.models.discovery import find_block_list, unwrap
from tmerge.models.loading import LoadedModel

__all__ = ["Readout"]

# Of a norm's output, what may lie beside a gain and a shift.
_CLOSE = 1e-3
# Tokens that are read to see what is the last norm, and what logits are multiplied by.
_READ = 8


@dataclass(frozen=True)
class Readout:
    """The last norm and the head of a model.

    Attributes:
        head: (V, n) rows of the tokens, as stored.
        head_bias: (V,); None where there is none.
        gain: (n,) float32.
        shift: (n,) float32; zero of a norm without a bias.
        centres: Whether the norm takes the stream's mean off.
        scale: What logits are multiplied by behind the head.
    """

    head: Tensor
    head_bias: Tensor | None
    gain: Tensor
    shift: Tensor
    centres: bool
    scale: float

    @classmethod
    @torch.no_grad()
    def of(cls, loaded: LoadedModel) -> Readout | None:
        """A loaded model's; None where its logits are not made of its stream by one norm and one matrix."""
        model = unwrap(loaded.model)
        head = model.get_output_embeddings()
        if not isinstance(head, nn.Linear):
            return None
        # Some tokens: the row of one alone may be zero, as a pad token's is.
        ids = torch.linspace(0, loaded.embedding_rows - 1, _READ, device=loaded.device).long()[None]
        found = _last_norm(loaded, ids)
        if found is None:
            return None
        norm, read = found
        measured = _measured(norm, head.in_features, loaded.device)
        if measured is None:
            return None
        gain, shift, centres = measured
        logits, plain = (made.flatten().float().cpu().double() for made in (model(ids).logits, head(read)))
        scale = float(logits @ plain / plain.square().sum())
        bias = None if head.bias is None else head.bias.detach()
        return cls(head.weight.detach(), bias, gain, shift, centres, scale)

    def centred(self, stream: Tensor) -> Tensor:
        """(r, n) of (r, n): without its mean, where the norm takes it off."""
        return stream - stream.mean(-1, keepdim=True) if self.centres else stream

    def size(self, stream: Tensor) -> Tensor:
        """(r, 1) of (r, n): |h|_rms, by which the norm divides."""
        size = self.centred(stream).square().mean(-1, keepdim=True).sqrt()
        return size.clamp_min(torch.finfo(size.dtype).tiny)


def _last_norm(loaded: LoadedModel, ids: Tensor) -> tuple[nn.Module, Tensor] | None:
    """The module outside the blocks whose output is what the head reads, and that output."""
    outputs: list[tuple[nn.Module, Tensor]] = []

    def hear(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        if inputs and all(isinstance(each, Tensor) for each in (inputs[0], output)) and inputs[0].shape == output.shape:
            outputs.append((module, output))

    inside = {id(module) for module in find_block_list(unwrap(loaded.model))[1].modules()}
    outside = [module for module in loaded.base.modules() if id(module) not in inside and module is not loaded.base]
    handles = [module.register_forward_hook(hear) for module in outside]
    try:
        result = loaded.base(input_ids=ids, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    read = result[0]
    # The first that gives it: what comes after gives on what it was given.
    for module, output in outputs:
        if output.shape == read.shape and torch.equal(output, read):
            return module, read
    return None


def _measured(norm: nn.Module, width: int, device: torch.device) -> tuple[Tensor, Tensor, bool] | None:
    """A norm's gain, its shift, and whether it takes the mean off; None where it is no norm of that kind."""
    plain = copy.deepcopy(norm).float()
    probe = torch.ones(width, device=device)
    probe[1::2] = -1
    probe -= probe.mean()
    probe /= probe.square().mean().sqrt()
    up, down = plain(probe[None])[0], plain(-probe[None])[0]
    gain, shift = (up - down) / (2 * probe), (up + down) / 2
    turned = probe.roll(1) * torch.linspace(0.5, 1.5, width, device=device) + 0.25
    made = plain(turned[None])[0]
    for centres in (False, True):
        held = turned - turned.mean() if centres else turned
        wanted = gain * held / held.square().mean().sqrt() + shift
        if float((made - wanted).norm()) <= _CLOSE * float(made.norm()):
            return gain, shift, centres
    return None
