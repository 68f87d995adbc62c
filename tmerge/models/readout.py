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

from tmerge.models.blocks import run_passes
from tmerge.models.discovery import find_block_list, unwrap
from tmerge.models.loading import LoadedModel

__all__ = ["LastNorm", "Readout"]

# Of a norm's output, what may lie beside a gain and a shift.
_CLOSE = 1e-3
# Tokens that are read to see what is the last norm, and what logits are multiplied by.
_READ = 8


@dataclass(frozen=True)
class LastNorm:
    """What lies between the stream and the head.

    Attributes:
        gain: (n,) float32.
        shift: (n,) float32; zero of a norm without a bias.
        centres: Whether it takes the stream's mean off.
    """

    gain: Tensor
    shift: Tensor
    centres: bool

    def centred(self, stream: Tensor) -> Tensor:
        """(r, n) of (r, n): without its mean, where the norm takes it off."""
        return stream - stream.mean(-1, keepdim=True) if self.centres else stream

    def size(self, stream: Tensor) -> Tensor:
        """(r, 1) of (r, n): |h|_rms, by which the norm divides."""
        size = self.centred(stream).square().mean(-1, keepdim=True).sqrt()
        return size.clamp_min(torch.finfo(size.dtype).tiny)


@dataclass(frozen=True)
class Readout:
    """The last norm and the head of a model.

    Attributes:
        head: (V, n) rows of the tokens, as stored.
        head_bias: (V,); None where there is none.
        norm: What its stream goes through before.
        scale: What logits are multiplied by behind the head.
    """

    head: Tensor
    head_bias: Tensor | None
    norm: LastNorm
    scale: float

    @classmethod
    @torch.no_grad()
    def of(cls, loaded: LoadedModel) -> Readout | None:
        """A loaded model's; None where its logits are not made of its stream by one norm and one matrix."""
        head = unwrap(loaded.model).get_output_embeddings()
        if not isinstance(head, nn.Linear):
            return None
        # Some tokens: the row of one alone may be zero, as a pad token's is.
        ids = torch.linspace(0, loaded.embedding_rows - 1, _READ, device=loaded.device).long()[None]
        heard = _hear(loaded, head, ids)
        norm = heard.last_norm()
        measured = None if norm is None else _measured(norm, head.in_features, loaded.device)
        if measured is None:
            return None
        logits, plain = (made.flatten().float().cpu().double() for made in (heard.logits, heard.plain))
        scale = float(logits @ plain / plain.square().sum())
        return cls(heard.weight, heard.bias, measured, scale)


@dataclass
class _Heard:
    """What was heard of one pass.

    Attributes:
        outputs: Of each module outside the blocks that gives what is of its input's shape.
        read: (1, S, n) what the base model gave.
        logits: (1, S, V) what the model made of it.
        plain: (1, S, V) what the head alone makes of it.
        weight: (V, n) the head's.
        bias: (V,) the head's, if it has one.
    """

    outputs: list[tuple[nn.Module, Tensor]]
    read: Tensor
    logits: Tensor
    plain: Tensor
    weight: Tensor
    bias: Tensor | None

    def last_norm(self) -> nn.Module | None:
        """The first that gave what the head reads: what comes after gives on what it was given."""
        for module, output in self.outputs:
            if output.shape == self.read.shape and torch.equal(output, self.read):
                return module
        return None


def _hear(loaded: LoadedModel, head: nn.Linear, ids: Tensor) -> _Heard:
    """Run some tokens through a model, and keep what is said outside its blocks."""
    outputs: list[tuple[nn.Module, Tensor]] = []
    heard: list[_Heard] = []

    def hear(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        if inputs and all(isinstance(each, Tensor) for each in (inputs[0], output)) and inputs[0].shape == output.shape:
            outputs.append((module, output))

    read: list[Tensor] = []

    def through_base() -> None:
        read.append(loaded.base(input_ids=ids, use_cache=False)[0])

    def through_all() -> None:
        logits = loaded.model(ids, use_cache=False).logits
        # The head itself may be in memory for as long as these passes alone.
        plain = head(read[0])
        bias = None if head.bias is None else head.bias.detach()
        heard.append(_Heard(outputs, read[0], logits, plain, head.weight.detach(), bias))

    inside = {id(module) for module in find_block_list(unwrap(loaded.model))[1].modules()}
    outside = [module for module in loaded.base.modules() if id(module) not in inside and module is not loaded.base]
    handles = [module.register_forward_hook(hear) for module in outside]
    try:
        run_passes(loaded, [through_base, through_all], [ids.numel()] * 2)
    finally:
        for handle in handles:
            handle.remove()
    return heard[0]


def _measured(norm: nn.Module, width: int, device: torch.device) -> LastNorm | None:
    """What a norm does; None where it is no norm of that kind."""
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
            return LastNorm(gain, shift, centres)
    return None
