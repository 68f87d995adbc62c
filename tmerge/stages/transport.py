"""Solving the transport between the two models' features, and asking whether they correspond at all.

No model is loaded for it: how the heads divide was noted when the models were read.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tmerge.calibration import FeatureStore, TextSet, text_digest
from tmerge.errors import NoSharedStructureError
from tmerge.models import EMBEDDING, Architecture, Model, Projection, shared_vocabulary
from tmerge.models.device import memory_errors
from tmerge.recipe import MATCHING_BY_WEIGHTS, Recipe, Shared
from tmerge.recorded import RecordedRun
from tmerge.report import Relatedness, relatedness_words
from tmerge.run import Run
from tmerge.stages.notes import TransportNote
from tmerge.stages.source_weights import SourceWeights, read_once
from tmerge.stages.step import Progress
from tmerge.transport import (
    ReadWeight,
    Side,
    Transport,
    TransportRecord,
    compare_layers,
    feature_keys,
    read_apart,
    read_shared,
    relatedness,
    solve_apart,
    solve_shared,
)

__all__ = ["Features", "SolveTransport", "matched_on", "record_of", "transport_of"]

# Tokens whose embeddings are compared, at most: chance correlates two neurons by 1/64 over so many.
_COMPARED_TOKENS = 4096
# What a run keeps in its cache between being solved and being fused.
_APART, _SHARED = "plans.safetensors", "structure.safetensors"


@dataclass(frozen=True)
class Features:
    """What both models were read for.

    Attributes:
        projections: Whose pre and post features there are.
        folders: ``target`` and ``source`` -> their features.
        heads: ``target`` and ``source`` -> layer -> how its heads divide.
        cache: The run's.
    """

    projections: list[str]
    folders: Mapping[str, Path]
    heads: Mapping[str, Mapping[str, Any] | None]
    cache: Path

    def sides(self) -> tuple[Side, Side]:
        """The target and the source, as solvers read them, by their features alone."""
        return self._side("target"), self._side("source")

    @property
    def rows(self) -> int:
        """T: texts or token positions."""
        return FeatureStore(self.folders["target"]).texts

    def _side(self, role: str) -> Side:
        return Side.of(FeatureStore(self.folders[role]), self.heads[role] or {})


@dataclass(frozen=True)
class SolveTransport:
    """The stage ``transport``.

    Attributes:
        recipe: Of the run.
        features: Of both models.
        target: Whose neurons are matched.
        weights: Of the target and of the source, by which neurons are matched beside their features.
        read: ``target`` and ``source`` -> the key of the stage that read it.
        device: Where plans are solved.
        recorded: A recorded transport, with which nothing is solved.
    """

    recipe: Recipe
    features: Features
    target: Model
    weights: tuple[SourceWeights, SourceWeights]
    read: Mapping[str, str]
    device: torch.device
    recorded: RecordedRun | None

    name = "transport"
    note = TransportNote
    together = True

    def inputs(self) -> dict[str, Any]:
        """What decides the transport."""
        plan = None if self.recorded is None else self.recorded.key
        # How weights have a say is not of the recipe: what was solved before it changed is solved anew.
        by_weights = {"by_weights": MATCHING_BY_WEIGHTS} if self.recipe.matches_by_weights else {}
        return {"recipe": self.recipe.digest("transport"), **self.read, "plan": plan, **by_weights}

    def do(self, key: str, progress: Progress) -> TransportNote:
        """Solve, and tell the relatedness before anything is fused."""
        if self.recorded is not None:
            solved = self.recorded.report.transport.to_dict()
            return TransportNote.model_validate(
                {name: solved[name] for name in TransportNote.model_fields & solved.keys()}
            )
        with memory_errors("transport", self.device):
            transport = self._solve(progress)
        assert transport.problems is not None  # it was solved here
        noted_relatedness = self._relatedness(transport, progress)
        if noted_relatedness is not None:
            progress.note(relatedness_words(noted_relatedness))
        by_weights = self.recipe.matches_by_weights
        noted = {**transport.problems.to_dict(), "weights": by_weights, "relatedness": noted_relatedness}
        return TransportNote.model_validate(noted)

    def _solve(self, progress: Progress) -> Transport:
        """Solve, and keep in the run's cache what `transport_of` makes the transport from."""
        settings, features = self.recipe.transport, self.features
        target, source = features.sides()
        if isinstance(settings, Shared):
            path = features.cache / _SHARED
            if self.recipe.matches_by_weights:
                target, source = self._with_weights(target, source, progress)
            return solve_shared(
                target, source, features.projections, settings, path, heard=progress.step, processes=progress.processes
            )
        path = features.cache / _APART
        return solve_apart(
            target,
            source,
            features.projections,
            settings,
            path,
            device=self.device,
            heard=progress.step,
            note=progress.note,
            processes=progress.processes,
        )

    def _with_weights(self, target: Side, source: Side, progress: Progress) -> tuple[Side, Side]:
        own, theirs = self.weights
        of_target = self.target.views if self.target.is_loaded else read_once(own, progress)
        of_source = read_once(theirs, progress)
        target, source = replace(target, weights=_reading(of_target)), replace(source, weights=_reading(of_source))
        view, other = (of.stream[-1].get(EMBEDDING) for of in (of_target, of_source))
        vocabulary = shared_vocabulary(self.target, theirs.model)
        if vocabulary is None or view is None or other is None:
            return target, source
        tokens, others = vocabulary[:, :: -(-vocabulary.shape[1] // _COMPARED_TOKENS)]
        target = replace(target, embedding=partial(_embeddings, view, tokens))
        return target, replace(source, embedding=partial(_embeddings, other, others))

    def _relatedness(self, transport: Transport, progress: Progress) -> Relatedness | None:
        """Whether the two models' neurons correspond at all.

        None where it cannot be asked: what a model reads from its residual stream and what it writes are not of one
        width, which plans solved apart can do with.
        """
        target, source = self.features.sides()
        pairs = transport.pairs
        if pairs is None:
            keys = feature_keys(self.features.projections)
            pairs = compare_layers(target, source, keys, processes=progress.processes).pairs
        heard, seed = progress.counting("relatedness", "problems"), self.recipe.seed
        try:
            measured = relatedness(
                target, source, pairs, self.features.rows, seed=seed, processes=progress.processes, progress=heard
            )
        except NoSharedStructureError:
            return None
        agreement = None if transport.agreement is None else transport.agreement.to_dict()
        return Relatedness.model_validate({**measured.to_dict(), "weights": agreement})


def _embeddings(view: Projection, tokens: Tensor) -> Tensor:
    """(v, n) of some tokens, on the CPU, where features are."""
    return view.weight_rows(tokens).float().cpu()


def _reading(weights: Architecture) -> ReadWeight:
    """(layer, projection) -> its weight, on the CPU, where features are."""
    return lambda layer, projection: weights.layers[layer][projection].weight().cpu()


def record_of(
    recipe: Recipe,
    transport: Transport,
    features: Features,
    commits: tuple[str, str],
    tensors: dict[str, Tensor],
    matched_on: Sequence[str] | None,
) -> TransportRecord:
    """A run's record of the transport that it used, for pictures and later runs.

    Args:
        recipe: Of the run.
        transport: That was used.
        features: Names the projections.
        commits: The target's and the source's.
        tensors: Of the layers, the plans and the selected neurons.
        matched_on: From `matched_on`.
    """
    facts = {
        "schema": 1,
        "projections": features.projections,
        "keys": list(transport.layers),
        "epsilon": recipe.transport.epsilon,
        "structure": transport.structure,
        "target": {"ref": recipe.target, "commit": commits[0]},
        "source": {"ref": recipe.source, "commit": commits[1]},
        **({} if matched_on is None else {"matched_on": list(matched_on)}),
    }
    return TransportRecord(facts, tensors)


def matched_on(run: Run, recorded: RecordedRun | None) -> list[str] | None:
    """Digests of the texts that the neurons were matched on, by which later runs keep theirs apart from them.

    None of a recorded transport whose record does not have them.
    """
    if recorded is not None:
        known = recorded.record.facts.get("matched_on")
        return known if isinstance(known, list) else None
    return sorted(map(text_digest, TextSet.load(run.texts_path).matched_on))


def transport_of(recipe: Recipe, features: Features, recorded: RecordedRun | None) -> Transport:
    """What a run fuses from: what `SolveTransport` solved, in this process or an earlier one, or a recorded one."""
    if recorded is not None:
        return recorded.transport(features.projections)
    settings, (target, source) = recipe.transport, features.sides()
    if isinstance(settings, Shared):
        return read_shared(features.cache / _SHARED, target, source, features.projections, settings)
    return read_apart(features.cache / _APART, target, source, features.projections, settings)
