"""The fits of one block of the target, and what is caught of a block on the way; see `tmerge.fusion.reconstruct`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor

from tmerge.fusion.addition import ADDING, Addition
from tmerge.fusion.logit_goal import FinalGoal
from tmerge.fusion.merge import TransportedNeurons, fuse
from tmerge.fusion.passage import Goals, Passage, Reading, Rows, Wanted
from tmerge.fusion.ridge import Fit, Linear, Regression
from tmerge.fusion.selection import COLUMN_PROJECTIONS
from tmerge.models import Architecture, Tap, feature_key
from tmerge.models.blocks import BlockCall

__all__ = ["GROUPS", "BlockFit", "BlockNote", "FittedBlock", "caught_in", "taps_of"]

# In the order of a block's own computation; those of one group read the same input.
GROUPS = (("q", "k", "v"), ("o",), ("gate", "up"), ("down",))

Errors = dict[str, tuple[float | None, float | None]]
"""Projection -> |Y - X W^T|^2 / |Y|^2 before and after its fit."""


class BlockNote(BaseModel):
    """What is kept of a fitted block beside its changes.

    Attributes:
        errors: Of each projection.
        ridges: Of each the lambda that was taken.
        norms: Of each the change's norm to the weight's own; None where that is zero.
        rows: R, that were fitted.
        goal: Of what down was fitted to.
        seconds: That all of the block took; 0 until whoever advances both models has timed it.
    """

    model_config = ConfigDict(frozen=True)

    errors: Errors
    ridges: dict[str, float]
    norms: dict[str, float | None]
    rows: int
    goal: FinalGoal
    seconds: float = 0.0


@dataclass(frozen=True)
class FittedBlock:
    """What a block of the target is changed by.

    Attributes:
        items: The change of each projection that was fitted; none where it has no counterpart.
        note: Of the fits.
    """

    items: list[TransportedNeurons]
    note: BlockNote


class _Enough(Exception):
    """Ends a block's pass where the last feature that is wanted has been caught."""


@dataclass(frozen=True)
class BlockFit:
    """The fits of one target block.

    Attributes:
        passage: The models, and how.
        layer: The block's number.
        wanted: What is fitted.
        additions: How the block adds what o and down give; needed where either is fitted.
        calls: The batches at its door.
        reading: Of which they are.
        goals: What each feature should be.
        rows: The tokens that are fitted on.
        goal: Of what down is fitted to.
    """

    passage: Passage
    layer: int
    wanted: Mapping[str, Wanted]
    additions: Mapping[str, Addition]
    calls: Sequence[BlockCall]
    reading: Reading
    goals: Goals
    rows: Rows
    goal: FinalGoal

    def fitted(self) -> FittedBlock:
        """Fit group after group, each written into the target before the next is read."""
        changes: list[TransportedNeurons] = []
        errors: Errors = {}
        norms: dict[str, float | None] = {}
        ridges: dict[str, float] = {}
        for group in GROUPS:
            names = [name for name in group if name in self.wanted]
            if not names:
                continue
            for name, fit in self._fits(names).items():
                changes.append(self._item(name, fit))
                errors[name], ridges[name] = (fit.before, fit.after), fit.ridge
                own_norm = float(torch.linalg.vector_norm(self.wanted[name].view.weight().cpu().double()))
                norms[name] = (
                    float(torch.linalg.vector_norm(fit.weight.cpu().double())) / own_norm if own_norm else None
                )
            fuse(self.passage.views.layers, changes[-len(names) :], 1.0)
        note = BlockNote(errors=errors, ridges=ridges, norms=norms, rows=self.rows.fitted, goal=self.goal)
        return FittedBlock(changes, note)

    def _fits(self, names: Sequence[str]) -> dict[str, Fit]:
        layers = [self._now(name) for name in names]
        sums, chooses = self._sums(names, layers), self.rows.count > self.rows.fitted
        choosing_sums = self._sums(names, layers) if chooses else None
        taps = taps_of(self.passage.views, self.layer, names, "pre")
        if names == ["down"] and "o" in self.additions:
            taps.append(self.additions["o"].tap)
        if names[0] in ADDING and self.additions[names[0]].gain is not None:
            taps += taps_of(self.passage.views, self.layer, names, "post")
        for batch, call in enumerate(self.calls):
            caught = caught_in(call, taps, whole=False)[1]
            rows = self.reading.places[batch][1]
            inputs = self.reading.rows_of(batch, caught[feature_key(names[0], "pre")])
            goals = [self._goal(name, batch, call, caught, rows) for name in names]
            # Only o and down have one of their own, and those are alone.
            weights = [by for by in (goals[0][1], self.rows.weights(rows)) if by is not None]
            weighting = torch.stack(weights).prod(0) if weights else None
            is_choosing = rows >= self.rows.fitted
            for regression, chosen in ((sums, ~is_choosing), (choosing_sums, is_choosing)):
                if regression is None or not bool(chosen.any()):
                    continue
                regression.add(
                    inputs[chosen.to(inputs.device)],
                    [goal[chosen].to(inputs.device) for goal, _ in goals],
                    None if weighting is None else weighting[chosen].to(inputs.device),
                )
        processes = self.passage.processes
        for regression in (sums, choosing_sums):
            if regression is not None:
                regression.add_others(processes)
        fits = sums.solve(layers, self.passage.ridges, self.passage.rank, kept_away=choosing_sums, processes=processes)
        return dict(zip(names, fits, strict=True))

    def _sums(self, names: Sequence[str], layers: Sequence[Linear]) -> Regression:
        views = [self.wanted[name].view for name in names]
        outputs = [len(self.wanted[name].matched) for name in names]
        has_bias, device = any(view.has_bias for view in views), layers[0].weight.device
        return Regression(views[0].in_features, outputs, has_bias=has_bias, device=device)

    def _now(self, name: str) -> Linear:
        """The outputs with a counterpart, as they are."""
        of = self.wanted[name]
        bias = of.view.bias()
        return Linear(of.view.weight()[of.matched], None if bias is None else bias[of.matched])

    def _goal(
        self, name: str, batch: int, call: BlockCall, caught: Mapping[str, Tensor], rows: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """(r, m) that the projection should give, and (r,) the rows' weights."""
        if name not in COLUMN_PROJECTIONS:
            return self.goals.read(name, rows), None
        stream = self.reading.rows_of(batch, call.hidden)
        if name == "down" and "o" in self.additions:
            stream = stream + self.reading.rows_of(batch, self.additions["o"].added(caught))
        goal = self.goals.read("middle" if name == "o" else "out", rows)
        weighting = goal.square().mean(1).clamp_min(torch.finfo(torch.float32).tiny).rsqrt()
        outputs, addition = self.wanted[name].matched, self.additions[name]
        now = None if addition.gain is None else self.reading.rows_of(batch, caught[feature_key(name, "post")])
        output, factor = addition.output_for(goal - stream[:, outputs].cpu(), outputs, now)
        return output, weighting if factor is None else weighting * factor

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


def taps_of(views: Architecture, layer: int, projections: Sequence[str], side: str) -> list[Tap]:
    """Where a block's features are caught: those before (``pre``) or after (``post``) some of its projections."""
    keys = {feature_key(name, side) for name in projections}
    return [tap for tap in views.taps(list(dict.fromkeys(projections))) if tap.layer == layer and tap.key in keys]


def caught_in(call: BlockCall, taps: Sequence[Tap], *, whole: bool = True) -> tuple[Any, dict[str, Tensor]]:
    """What a block makes of a batch, and the features caught on the way.

    Args:
        call: The batch.
        taps: What to catch.
        whole: Whether the block is run to its end; else it ends where the last tap has been read, and nothing is
            returned of it.
    """
    caught: dict[str, Tensor] = {}
    batch = len(call.hidden)

    def hear(tap: Tap, inputs: tuple[Any, ...], output: Any) -> None:
        caught[tap.key] = tap.read(inputs, output, batch)
        if not whole and len(caught) == len(taps):
            raise _Enough

    def hooked(tap: Tap) -> Any:
        if tap.side == "pre":
            # Before the module runs, so that a block that ends there is spared it.
            return tap.module.register_forward_pre_hook(lambda module, inputs: hear(tap, inputs, None))
        return tap.module.register_forward_hook(lambda module, inputs, output: hear(tap, inputs, output))

    handles = [hooked(tap) for tap in taps]
    try:
        with torch.no_grad():
            return call.run(), caught
    except _Enough:
        return None, caught
    finally:
        for handle in handles:
            handle.remove()
