"""The fits of one block of the target, and what is caught of a block on the way; see `tmerge.fusion.reconstruct`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tmerge.errors import UnsupportedModelError
from tmerge.fusion.merge import TransportedNeurons, fuse
from tmerge.fusion.passage import Goals, Passage, Reading, Wanted
from tmerge.fusion.ridge import Fit, Regression
from tmerge.fusion.selection import COLUMN_PROJECTIONS
from tmerge.models import Architecture, LoadedModel, Projection, Tap, feature_key
from tmerge.models.blocks import BlockCall, hidden_of

__all__ = ["BlockFit", "FittedBlock", "caught_in", "refuse_unless_it_adds", "taps_of"]

# In the order of a block's own computation; those of one group read the same input.
GROUPS = (("q", "k", "v"), ("o",), ("gate", "up"), ("down",))
# A block that adds what o and down give, and nothing else, does so to this part of what it gives, beside rounding.
_ADDS = 0.02

Errors = dict[str, tuple[float | None, float | None]]
"""Projection -> |Y - X W^T|^2 / |Y|^2 before and after its fit."""


@dataclass(frozen=True)
class FittedBlock:
    """What a block of the target is changed by.

    Attributes:
        layer: Its number.
        items: The change of each projection that was fitted; none where it has no counterpart.
        errors: Of each.
        norms: Of each the change's norm to the weight's own; None where that is zero.
        rows: R, that were fitted.
    """

    layer: int
    items: list[TransportedNeurons]
    errors: Errors
    norms: dict[str, float | None]
    rows: int

    def note(self) -> dict[str, Any]:
        """All but the changes themselves, as JSON values."""
        errors = {name: list(pair) for name, pair in self.errors.items()}
        return {"errors": errors, "norms": self.norms, "rows": self.rows}


class _Enough(Exception):
    """Ends a block's pass where the last feature that is wanted has been caught."""


@dataclass(frozen=True)
class BlockFit:
    """The fits of one target block."""

    passage: Passage
    layer: int
    wanted: Mapping[str, Wanted]
    calls: Sequence[BlockCall]
    reading: Reading
    goals: Goals

    def fitted(self, rows: int) -> FittedBlock:
        """Fit group after group, each written into the target before the next is read."""
        items: list[TransportedNeurons] = []
        errors: Errors = {}
        norms: dict[str, float | None] = {}
        if {"o", "down"} & self.wanted.keys():
            refuse_unless_it_adds(self.passage.target, self.layer, self.calls[0], self.passage.views.layers[self.layer])
        for group in GROUPS:
            names = [name for name in group if name in self.wanted]
            if not names:
                continue
            for name, fit in self._fits(names).items():
                items.append(self._item(name, fit))
                errors[name] = fit.before, fit.after
                own = float(torch.linalg.vector_norm(self.wanted[name].view.weight().cpu().double()))
                norms[name] = float(torch.linalg.vector_norm(fit.weight.cpu().double())) / own if own else None
            fuse(self.passage.views.layers, items[-len(names) :], 1.0)
        return FittedBlock(self.layer, items, errors, norms, rows)

    def _fits(self, names: Sequence[str]) -> dict[str, Fit]:
        device = self.wanted[names[0]].view.weight().device
        sums = {
            name: Regression(of.view.in_features, len(of.matched), has_bias=of.view.has_bias, device=device)
            for name, of in ((name, self.wanted[name]) for name in names)
        }
        taps = taps_of(self.passage.views, self.layer, [*names, "o"] if names == ["down"] else names, outputs=True)
        weights = {name: self.wanted[name].view.weight().float() for name in names}
        biases = {name: self.wanted[name].view.bias() for name in names}
        for batch, call in enumerate(self.calls):
            caught = caught_in(call, taps, whole=False)[1]
            rows = self.reading.places[batch][1]
            for name in names:
                of = self.wanted[name]
                inputs = self.reading.rows_of(batch, caught[feature_key(name, "pre")])
                wanted, weighting = self._goal(name, batch, call, caught, rows)
                wanted = wanted.to(device)
                given = inputs @ weights[name][of.matched].T
                bias = biases[name]
                if bias is not None:
                    given = given + bias[of.matched].float()
                sums[name].add(inputs, wanted - given, wanted, None if weighting is None else weighting.to(device))
        return {name: of.solve(self.passage.ridge, self.passage.rank) for name, of in sums.items()}

    def _goal(
        self, name: str, batch: int, call: BlockCall, caught: Mapping[str, Tensor], rows: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """(r, m) that the projection should give, and (r,) the rows' weights."""
        if name not in COLUMN_PROJECTIONS:
            return self.goals.read(name, rows), None
        stream = self.reading.rows_of(batch, call.hidden)
        if name == "down" and "o.post" in caught:
            stream = stream + self.reading.rows_of(batch, caught["o.post"])
        goal = self.goals.read("middle" if name == "o" else "out", rows)
        weighting = goal.square().mean(1).clamp_min(torch.finfo(torch.float32).tiny).rsqrt()
        return goal - stream[:, self.wanted[name].matched].cpu(), weighting

    def _item(self, name: str, fit: Fit) -> TransportedNeurons:
        """A fit as what fusing adds: rows of the outputs with a counterpart, or all columns."""
        of = self.wanted[name]
        if name not in COLUMN_PROJECTIONS:
            bias = None if fit.bias is None else fit.bias.cpu()
            return TransportedNeurons(self.layer, name, of.matched, fit.weight.cpu(), bias, is_difference=True)
        weight = torch.zeros(of.view.out_features, of.view.in_features)
        weight[of.matched] = fit.weight.cpu()
        bias = None
        if fit.bias is not None:
            bias = torch.zeros(of.view.out_features)
            bias[of.matched] = fit.bias.cpu()
        neurons = torch.arange(of.view.in_features)
        return TransportedNeurons(self.layer, name, neurons, weight, bias, is_difference=True)


def taps_of(views: Architecture, layer: int, projections: Sequence[str], *, outputs: bool = False) -> list[Tap]:
    """Where a block's features are caught: those after its projections, and with `outputs` false none before."""
    wanted = {feature_key(name, side) for name in projections for side in (("pre", "post") if outputs else ("post",))}
    return [tap for tap in views.taps(list(dict.fromkeys(projections))) if tap.layer == layer and tap.key in wanted]


def caught_in(call: BlockCall, taps: Sequence[Tap], *, whole: bool = True) -> tuple[Any, dict[str, Tensor]]:
    """What a block makes of a batch, and the features caught on the way.

    Args:
        call: The batch.
        taps: What to catch.
        whole: Whether the block is run to its end; else up to the last tap, and nothing is returned of it.
    """
    caught: dict[str, Tensor] = {}
    batch = len(call.hidden)

    def hook(tap: Tap) -> Callable[..., None]:
        def hear(module: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
            caught[tap.key] = tap.read(inputs, output, batch)
            if not whole and len(caught) == len(taps):
                raise _Enough

        return hear

    handles = [tap.module.register_forward_hook(hook(tap)) for tap in taps]
    try:
        with torch.no_grad():
            return call.run(), caught
    except _Enough:
        return None, caught
    finally:
        for handle in handles:
            handle.remove()


def refuse_unless_it_adds(loaded: LoadedModel, layer: int, call: BlockCall, views: Mapping[str, Projection]) -> None:
    """Check on one batch that the block's stream is what came in and what o and down give, unscaled and un-normed."""
    names = [name for name in ("o", "down") if name in views]
    if len(names) < 2:
        return  # what else the block adds, of experts say, is not known
    taps = [
        Tap(feature_key(name, "post"), layer, views[name].module, "post", views[name].out_features, views[name].rows)
        for name in names
    ]
    result, caught = caught_in(call, taps)
    made = hidden_of(result).float() - call.hidden.float()
    given = sum((caught[tap.key].float() for tap in taps), torch.zeros_like(made))
    # Token by token, as the first has activations that drown all others; the stream is rounded at each addition.
    rounding = torch.finfo(call.hidden.dtype).eps * hidden_of(result).float().norm(dim=-1)
    off = (made - given).norm(dim=-1) / (_ADDS * made.norm(dim=-1) + 2 * rounding).clamp_min(1e-30)
    if not float(off.median()) <= 1:
        raise UnsupportedModelError(
            f"{loaded.reference}: block {layer} of {loaded.model.config.model_type} does more to the residual stream "
            "than adding what its attention and its MLP give, so o and down cannot be reconstructed; set "
            "fusion.projections: [q, k, v, gate, up], or fusion.what: task-vector"
        )
