"""Carrying the source's weights through the plans: the selected neurons, and the run's record of its transport."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tmerge.fusion import TransportedNeurons, carry, generator_for
from tmerge.models import Architecture, Model, shared_vocabulary
from tmerge.processes import Processes
from tmerge.recipe import Recipe, Reconstruction
from tmerge.recorded import RecordedRun
from tmerge.run import Run
from tmerge.stages.learned_weights import LearnedWeights
from tmerge.stages.neurons import Neurons
from tmerge.stages.notes import FuseNote
from tmerge.stages.scoring import load
from tmerge.stages.source_weights import SourceWeights
from tmerge.stages.step import Progress
from tmerge.stages.transport import Features, record_of, transport_of
from tmerge.store import scratch

__all__ = ["Fuse"]


@dataclass(frozen=True)
class Fuse:
    """The stage ``fuse``. Alpha enters only when the neurons are written, so that another alpha can start from here.

    Attributes:
        recipe: Of the run.
        target: Whose neurons are selected.
        source: The weights that are carried; or the task vector of an adapter.
        source_base: Those of the source before its fine-tuning, where what it learned since is carried.
        features: What the transport was solved from.
        solved: The key of the stage that solved it.
        recorded: A recorded transport, which is used instead.
        run: Where the run's own record of its transport goes.
        neurons: Where the selected neurons go, and those of the permuted control.
    """

    recipe: Recipe
    target: Model
    source: SourceWeights | LearnedWeights
    source_base: SourceWeights | None
    features: Features
    solved: str
    recorded: RecordedRun | None
    run: Run
    neurons: Neurons

    name = "fuse"
    note = FuseNote
    together = True

    def inputs(self) -> dict[str, Any]:
        """What decides the neurons."""
        return {
            "transport": self.solved,
            "fusion": self.recipe.fusion.model_dump(mode="json", exclude={"alpha", "alphas"}),
            "base": None if self.source_base is None else self.source_base.model.commit,
            **({"adapter": self.source.joined.commit} if isinstance(self.source, LearnedWeights) else {}),
            "seed": self.recipe.seed,
            "permuted": "permuted" in self.recipe.evaluation.controls,
        }

    def do(self, key: str, progress: Progress) -> FuseNote:
        """Carry the weights, and keep what was carried."""
        fusion, seed, processes = self.recipe.fusion, self.recipe.seed, progress.processes
        assert not isinstance(fusion, Reconstruction)  # it has a stage of its own
        vocabulary = None
        if fusion.carries_stream:
            vocabulary = shared_vocabulary(self.target, self.source.model)
            if vocabulary is None:
                progress.note("the two vocabularies differ: embeddings stay the target's, norms are carried")
        transport = transport_of(self.recipe, self.features, self.recorded)

        def shuffle(layer: int, feature: str, neurons: int) -> Tensor:
            return torch.randperm(neurons, generator=generator_for(seed, "permuted", layer, feature))

        load(self.target, progress)
        transported, permuted = self.neurons.write(key, processes)
        source, base = self._weights(self.source, progress), None
        if isinstance(self.source, LearnedWeights):
            base = self.source.nothing()
        elif self.source_base is not None:
            base = self._weights(self.source_base, progress)

        def keep(matched: Sequence[TransportedNeurons], shuffled: Sequence[TransportedNeurons]) -> None:
            transported.add(matched)
            permuted.add(shuffled)

        with _gathering(self.run.cache / "record", processes) as folder:
            carried = carry(
                self.target.views,
                source,
                transport,
                fusion,
                source_base=base,
                shuffle=shuffle if "permuted" in self.recipe.evaluation.controls else None,
                vocabulary=vocabulary,
                keep=keep,
                scratch=folder,
                processes=processes,
                progress=progress.counting("transporting weights", "layers"),
            )
            transported.finish()
            permuted.finish()
            commits = self.target.commit, self.source.model.commit
            record = record_of(self.recipe, transport, self.features, commits, carried.tensors)
            processes.from_first(lambda: record.save(self.run.transport_path))
        return FuseNote.model_validate(
            {
                "norm_ratios": carried.norm_ratios,
                "layers": {name: list(layer_map.target_layers) for name, layer_map in transport.layer_maps.items()},
                "biases": carried.biases,
                "stream": sorted(carried.stream),
                "eta": dict(transport.eta),
                "layer_plans_converged": transport.layer_plans_converged,
            }
        )

    def _weights(self, of: SourceWeights | LearnedWeights, progress: Progress) -> Architecture:
        """The weights that are fused from; what has to be written for them the first process writes."""
        processes = progress.processes
        if not processes.is_first:
            processes.wait()
        weights = of.read(progress)
        if processes.is_first:
            processes.wait()
        return weights


@contextmanager
def _gathering(folder: Path, processes: Processes) -> Iterator[Path]:
    """A folder for all processes, as `scratch` of the first."""
    with scratch(folder) if processes.is_first else nullcontext(folder):
        processes.wait()
        yield folder
