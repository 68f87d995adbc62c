"""Transport as an objective: the target's features are drawn to the source's, carried through the plan.

For each fused projection's output and each target layer l, over the calibration texts,

    goal[l] = mean_A + sd_A * z( sum_m w[l, m] * Phi_out[l, m] z(Y_m) )          (T, n)

with z standardising each feature over the texts, Phi_out the row-normalised sparse plan of the run's record, w the kept
layer weights, and Y_m the source's stored features. Standardising the carried features again undoes what averaging
took of their size. The objective is the mean over texts, layers and neurons of ((h - goal) / sd_A)^2, h being the mean
over a text's tokens of the target's feature as it trains.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from tmerge.calibration import FeatureStore
from tmerge.errors import AdaptationError
from tmerge.models import Architecture, feature_key
from tmerge.models.projections import Tap
from tmerge.recipe import Recipe
from tmerge.transport import TransportRecord

__all__ = ["FeatureGoals", "FeatureWatch", "feature_goals", "refuse_token_rows"]

# A feature that hardly varies over texts says nothing, and would weigh most.
_LEAST_DEVIATION = 1e-6


@dataclass(frozen=True)
class FeatureGoals:
    """Where the target's features are drawn to.

    Attributes:
        goals: (target layer, feature key) -> (T, n), in the target's own units.
        deviations: Likewise -> (n,), the target's deviations over the texts; infinite where a feature is constant,
            so that it does not count.
        projections: Those whose outputs are drawn.
    """

    goals: dict[tuple[int, str], Tensor]
    deviations: dict[tuple[int, str], Tensor]
    projections: tuple[str, ...]


def refuse_token_rows(recipe: Recipe) -> None:
    """The goals are of means over texts, as the training's features are.

    Raises:
        AdaptationError: The run's features are of single tokens.
    """
    if recipe.calibration.rows != "texts" or recipe.calibration.match_on is not None:
        raise AdaptationError(
            "adaptation.transport_weight draws means over the calibration texts, and this run read single tokens or "
            "other texts; merge with calibration.rows: texts and no match_on, or set transport_weight to 0"
        )


def feature_goals(record: TransportRecord, target: FeatureStore, source: FeatureStore) -> FeatureGoals:
    """The goals of a run, from its record and both models' stored features.

    Args:
        record: transport.safetensors.
        target: The target's features over the calibration texts.
        source: The source's, over the same texts in the same order.
    """
    goals, deviations = {}, {}
    for projection in record.projections:
        key = feature_key(projection, "post")
        plans, pairs = record.plans(key), record.pairs(key)
        target_layers = record.tensors[f"layers.target.{key}"].tolist()
        source_layers = record.tensors[f"layers.source.{key}"].tolist()
        kept = record.tensors[f"kept.{projection}.layers"].tolist()
        weights = record.tensors[f"kept.{projection}.weights"]
        for row, layer in enumerate(target_layers):
            own = target.get(layer, key)
            carried = torch.zeros_like(own)
            for column, weight in zip(kept[row], (weights[row] / weights[row].sum()).tolist(), strict=True):
                plan = plans.dense(pairs.index((row, column)))
                out_map = plan / plan.abs().sum(1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
                carried += weight * _standard(source.get(source_layers[column], key))[0] @ out_map.T
            deviation = _standard(own)[1]
            goals[layer, key] = own.mean(0) + deviation * _standard(carried)[0]
            deviations[layer, key] = deviation.masked_fill(deviation < _LEAST_DEVIATION, torch.inf)
    return FeatureGoals(goals, deviations, tuple(record.projections))


class FeatureWatch:
    """Catches the features of a model in training, and measures how far they are from their goals.

    Args:
        architecture: Of the model, described before its weights were dressed in residuals.
        goals: From `feature_goals`.
    """

    def __init__(self, architecture: Architecture, goals: FeatureGoals) -> None:
        self.goals = goals
        self._taps = [tap for tap in architecture.taps(goals.projections) if (tap.layer, tap.key) in goals.goals]
        self._caught: dict[tuple[int, str], Tensor] = {}
        self._deviations: dict[tuple[int, str], Tensor] = {}  # where the model is

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Hooks on, for the length of the training."""
        handles = [tap.module.register_forward_hook(partial(self._catch, tap)) for tap in self._taps]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def distance(self, texts: Sequence[int], mask: Tensor) -> Tensor:
        """The objective for the batch that went through last.

        Args:
            texts: Which text each row is.
            mask: (B, S), 1 at the tokens that calibration read.
        """
        share = (mask / mask.sum(1, keepdim=True).clamp_min(1)).unsqueeze(2)
        total, caught = torch.zeros((), device=mask.device), self._caught
        for at, feature in caught.items():
            mean = (feature.float() * share).sum(1)
            goal = self.goals.goals[at][list(texts)].to(mean.device)
            if at not in self._deviations:
                self._deviations[at] = self.goals.deviations[at].to(mean.device)
            total = total + ((mean - goal) / self._deviations[at]).square().mean()
        self._caught = {}
        return total / max(len(caught), 1)

    def _catch(self, tap: Tap, module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
        self._caught[tap.layer, tap.key] = tap.read(inputs, output)


def _standard(features: Tensor) -> tuple[Tensor, Tensor]:
    """Features (T, n) of mean 0 and deviation 1, and their deviations (n,); constant ones are 0."""
    deviation = features.std(0, unbiased=False)
    centred = features - features.mean(0)
    return torch.where(deviation > _LEAST_DEVIATION, centred / deviation.clamp_min(_LEAST_DEVIATION), 0.0), deviation
