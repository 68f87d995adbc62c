r"""How a block adds what its attention and its MLP give to the residual stream, as one batch shows it.

    h' = h + A(y),     y = x W^T the output of o, and of down

In most families A(y) = y; some scale it, A(y) = c y (Granite); some norm it once more, A(y) = g * y / rms(y) with a
gain g (Gemma 2 and 3, Olmo 2 and 3). Which it is, is measured, so there is no list of families. Where y is normed its
size is of no account, and of a wanted addition D only the direction can be had: y should be D / g, of the size that it
has now.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tmerge.errors import UnsupportedModelError
from tmerge.models import PROJECTIONS, LoadedModel, Projection, Tap, feature_key
from tmerge.models.blocks import BlockCall, hidden_of

__all__ = ["ADDING", "Addition", "additions_of"]

ADDING = ("o", "down")
"""The projections whose outputs a block adds to its stream."""

# A block that adds what o and down give, and nothing else, does so to this part of what it gives, beside rounding.
_ADDS = 0.02
_TINY = 1e-30


@dataclass(frozen=True)
class Addition:
    """What becomes of a projection's output before it is on the stream.

    Attributes:
        tap: Where it is caught, all but the scale.
        scale: c.
        gain: (n,) g; None where it is not normed.
    """

    tap: Tap
    scale: float = 1.0
    gain: Tensor | None = None

    def added(self, caught: Mapping[str, Tensor]) -> Tensor:
        """A(y), from what `tap` caught."""
        values = caught[self.tap.key]
        return values if self.scale == 1 else values * self.scale

    def output_for(self, wanted: Tensor, outputs: Tensor, now: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """What the projection should give for something to be added.

        Args:
            wanted: (r, m) D.
            outputs: (m,) which of the n outputs those are.
            now: (r, n) y as it is; needed where it is normed.

        Returns:
            (r, m), and by what an error of each row (r,) is multiplied on its way to the stream, 1 if None.
        """
        if self.gain is None:
            return wanted if self.scale == 1 else wanted / self.scale, None
        assert now is not None
        gain = self.gain.to(wanted.device)[outputs] * self.scale
        # A neuron of next to no gain adds next to nothing, whatever it is given.
        floor = _ADDS * gain.abs().mean()
        direction = torch.where(gain.abs() < floor, 0.0, wanted / torch.where(gain.abs() < floor, 1.0, gain))
        size = _rms(now.to(wanted.device))
        return direction * (size / _rms(direction)).unsqueeze(1), size.reciprocal()


def _rms(values: Tensor) -> Tensor:
    return values.float().square().mean(-1).clamp_min(_TINY).sqrt()


def additions_of(
    loaded: LoadedModel, layer: int, call: BlockCall, views: Mapping[str, Projection], fits: Sequence[str]
) -> dict[str, Addition]:
    """How one block adds; from one batch, which is passed through it.

    Args:
        loaded: The model.
        layer: The block's number.
        call: The batch.
        views: The block's projections.
        fits: The projections whose fits rest on it.

    Returns:
        Of o and down, those that the block has.

    Raises:
        UnsupportedModelError: What the block gives is not what came in and what o and down add.
    """
    names = [name for name in ADDING if name in views]
    outputs, readers, result = _seen(call, views, names)
    units = {name: _unit(outputs[name], reader) for name, (reader, _) in readers.items()}
    gains = {name: _gain(units[name], readers[name][1]) for name in readers}
    taps = {name: _tap(layer, name, views[name], readers.get(name)) for name in names}
    parts = {name: gains[name] * units[name] if name in gains else outputs[name].float() for name in names}
    is_norm = all(_is_near(parts[name], readers[name][1], call.hidden.dtype) for name in gains)
    scale = _scale(loaded, call, hidden_of(result), list(parts.values())) if is_norm else None
    if scale is not None:
        return {name: Addition(taps[name], scale, gains.get(name)) for name in names}
    other_projections = [name for name in PROJECTIONS if name not in fits]
    raise UnsupportedModelError(
        f"{loaded.reference}: block {layer} of {loaded.model.config.model_type} does more to the residual stream "
        f"than adding what its attention and its MLP give, so {' and '.join(fits)} cannot be reconstructed; set "
        f"fusion.projections: [{', '.join(other_projections)}], or fusion.what: task-vector"
    )


def _scale(loaded: LoadedModel, call: BlockCall, leaving: Tensor, parts: Sequence[Tensor]) -> float | None:
    """c, by which all parts are multiplied where they are added; None where the block does something else."""
    if len(parts) < len(ADDING):
        # What else the block adds, of experts say, is not known, so that the scale is not to be seen.
        return float(getattr(loaded.model.config, "residual_multiplier", None) or 1)
    added = leaving.float() - call.hidden.float()
    whole = torch.stack([part.reshape(added.shape) for part in parts]).sum(0)
    shares = (added * whole).sum(-1) / whole.square().sum(-1).clamp_min(_TINY)
    for scale in (1.0, float(shares.cpu().double().median())):
        if _is_near(scale * whole, added, call.hidden.dtype, leaving):
            return scale
    return None


def _seen(
    call: BlockCall, views: Mapping[str, Projection], names: Sequence[str]
) -> tuple[dict[str, Tensor], dict[str, tuple[nn.Module, Tensor]], Any]:
    """What o and down give, the module that reads just that and what it makes of it, and what the block gives."""
    outputs: dict[str, Tensor] = {}
    readers: dict[str, tuple[nn.Module, Tensor]] = {}
    adding = {views[name].module: name for name in names}

    def hear(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        if not isinstance(output, Tensor):
            return
        if module in adding:
            outputs[adding[module]] = output
        for name, given in outputs.items():
            # The same memory: all that was given is held, so nothing else can lie there. Dropout hands it on.
            read = bool(inputs) and isinstance(inputs[0], Tensor) and inputs[0].data_ptr() == given.data_ptr()
            if read and output.data_ptr() != given.data_ptr() and output.shape == given.shape:
                readers.setdefault(name, (module, output))

    handles = [module.register_forward_hook(hear) for module in call.block.modules()]
    try:
        with torch.no_grad():
            result = call.run()
    finally:
        for handle in handles:
            handle.remove()
    return outputs, readers, result


def _tap(layer: int, name: str, view: Projection, reader: tuple[nn.Module, Tensor] | None) -> Tap:
    if reader is None:
        return Tap(feature_key(name, "post"), layer, view.module, "post", view.out_features, view.rows)
    return Tap(f"{name}.added", layer, reader[0], "post", view.out_features, view.rows)


def _unit(output: Tensor, norm: nn.Module) -> Tensor:
    """The output y over rms(y), with what this kind of norm adds to the mean square."""
    epsilon = getattr(norm, "variance_epsilon", getattr(norm, "eps", None)) or 0.0
    values = output.float()
    return values / (values.square().mean(-1, keepdim=True) + epsilon).clamp_min(_TINY).sqrt()


def _gain(unit: Tensor, made: Tensor) -> Tensor:
    """(n,) g of g * y / rms(y), by least squares over the tokens, from y / rms(y) and what a norm made of y."""
    unit = unit.flatten(0, -2)
    return (made.float().flatten(0, -2) * unit).sum(0) / unit.square().sum(0).clamp_min(_TINY)


def _is_near(found: Tensor, given: Tensor, dtype: torch.dtype, rounded: Tensor | None = None) -> bool:
    """Whether most tokens' values are those given, beside rounding (of the sum that they were read from)."""
    given = given.float().reshape(found.shape)
    # Token by token, as the first has activations that drown all others; a stream is rounded at each addition.
    rounding = torch.finfo(dtype).eps * (given if rounded is None else rounded.float()).norm(dim=-1)
    off = (given - found).norm(dim=-1) / (_ADDS * given.norm(dim=-1) + 2 * rounding).clamp_min(_TINY)
    return float(off.median()) <= 1
