"""Carrying the source's weights through the plans: the selected neurons, and the run's record of its transport."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tmerge.fusion import Carried, TransportedNeurons, carry, generator_for, norm_ratio
from tmerge.models import PROJECTIONS, Model, shared_vocabulary
from tmerge.models.device import memory_errors
from tmerge.processes import Processes
from tmerge.recipe import CARRYING, CARRYING_BESIDE, CarriedSettings, Recipe, Reconstruction, scales_carried
from tmerge.recorded import RecordedRun
from tmerge.run import Run
from tmerge.stages.carried import CarriedSource
from tmerge.stages.learned_weights import LearnedWeights
from tmerge.stages.neurons import Neurons
from tmerge.stages.notes import CarriedNote, FuseNote
from tmerge.stages.scoring import load
from tmerge.stages.source_weights import read_once
from tmerge.stages.step import Progress
from tmerge.stages.transport import Features, matched_on, record_of, transport_of
from tmerge.store import scratch
from tmerge.transport import Transport, TransportRecord

__all__ = ["Fuse"]


@dataclass(frozen=True)
class Fuse:
    """The stage ``fuse``. Alpha enters only when the neurons are written, so that another alpha can start from here.

    Several sources go through the one transport of their base, a source after the other. How they are joined enters
    later, as alpha does.

    Attributes:
        recipe: Of the run.
        target: Whose neurons are selected.
        sources: That are carried: one, or several.
        matched: The source as it was read for the transport: without its adapter; of several their base.
        features: What the transport was solved from.
        solved: The key of the stage that solved it.
        recorded: A recorded transport, which is used instead.
        run: Where the run's own record of its transport goes.
        neurons: Where the selected neurons are, those of several sources joined.
        device: Where weights meet dense plans.
    """

    recipe: Recipe
    target: Model
    sources: tuple[CarriedSource, ...]
    matched: Model
    features: Features
    solved: str
    recorded: RecordedRun | None
    run: Run
    neurons: Neurons
    device: torch.device

    name = "fuse"
    note = FuseNote
    together = True

    def inputs(self) -> dict[str, Any]:
        """What decides the neurons."""
        first = self.sources[0]
        beside = {"beside": CARRYING_BESIDE} if self.recipe.fusion.carries_stream else {}
        carrying = {"carrying": CARRYING} if scales_carried(self.recipe) else {}
        several = {"sources": {source.name: source.model.commit for source in self.sources}}
        return {
            "transport": self.solved,
            **carrying,
            "fusion": self.recipe.fusion.model_dump(mode="json", exclude={"alpha", "alphas", "join", "density"}),
            "base": None if first.base is None else first.base.model.commit,
            **({"adapter": first.model.commit} if isinstance(first.weights, LearnedWeights) else {}),
            **(several if self.recipe.sources else {}),
            **beside,
            "seed": self.recipe.seed,
            "permuted": "permuted" in self.recipe.evaluation.controls,
        }

    def do(self, key: str, progress: Progress) -> FuseNote:
        """Carry the weights, and keep what was carried."""
        fusion, processes = self.recipe.fusion, progress.processes
        assert not isinstance(fusion, Reconstruction)  # it has a stage of its own
        vocabulary = None
        if fusion.carries_stream:
            vocabulary = shared_vocabulary(self.target, self.matched)
            if vocabulary is None:
                progress.note("the two vocabularies differ: embeddings and head stay the target's, norms are carried")
        transport = transport_of(self.recipe, self.features, self.recorded)
        load(self.target, progress)
        carried = {
            source.name: self._carried(source, key, transport, fusion, vocabulary, progress) for source in self.sources
        }
        first, ratios, by_source = carried[self.sources[0].name], carried[self.sources[0].name].norm_ratios, {}
        if self.recipe.sources:
            ratios = processes.from_first(lambda: self._joined_ratios(progress))
            by_source = {name: note.norm_ratios for name, note in carried.items()}
        return FuseNote.model_validate(
            {
                "norm_ratios": ratios,
                "by_source": by_source,
                "layers": {name: list(layer_map.target_layers) for name, layer_map in transport.layer_maps.items()},
                "biases": first.biases,
                "stream": sorted({name for note in carried.values() for name in note.stream}),
                "eta": dict(transport.eta),
                "layer_plans_converged": transport.layer_plans_converged,
            }
        )

    def _carried(
        self,
        source: CarriedSource,
        key: str,
        transport: Transport,
        fusion: CarriedSettings,
        vocabulary: Tensor | None,
        progress: Progress,
    ) -> CarriedNote:
        """What is noted of one source, which is carried unless an earlier call had finished with it."""
        processes = progress.processes
        # What the first of them records of the transport is written before it is noted.
        kept = processes.from_first(lambda: source.neurons.kept(key) if self.run.transport_path.is_file() else None)
        if kept is not None:
            return kept
        with _gathering(self.run.cache / "record", processes) as folder:
            carried = self._carry(source, key, transport, fusion, vocabulary, folder, progress)
            # The same for each.
            if source is self.sources[0]:
                processes.from_first(lambda: self._record(transport, carried).save(self.run.transport_path))
        note = CarriedNote(norm_ratios=carried.norm_ratios, biases=carried.biases, stream=sorted(carried.stream))
        return processes.from_first(lambda: source.neurons.keep(key, note))

    def _record(self, transport: Transport, carried: Carried) -> TransportRecord:
        commits, known = (self.target.commit, self.matched.commit), matched_on(self.run, self.recorded)
        return record_of(self.recipe, transport, self.features, commits, carried.tensors, known)

    def _carry(
        self,
        source: CarriedSource,
        key: str,
        transport: Transport,
        fusion: CarriedSettings,
        vocabulary: Tensor | None,
        folder: Path,
        progress: Progress,
    ) -> Carried:
        """One source through the transport, into its own neurons."""
        seed, processes = self.recipe.seed, progress.processes

        def shuffle(layer: int, feature: str, neurons: int) -> Tensor:
            return torch.randperm(neurons, generator=generator_for(seed, "permuted", layer, feature))

        transported, permuted = source.neurons.write(key, processes)
        weights, base = read_once(source.weights, progress), None
        if isinstance(source.weights, LearnedWeights):
            base = source.weights.nothing()
        elif source.base is not None:
            base = read_once(source.base, progress)

        def keep(matched: Sequence[TransportedNeurons], shuffled: Sequence[TransportedNeurons]) -> None:
            transported.add(matched)
            permuted.add(shuffled)

        said = f"transporting weights of {source.name}" if source.name else "transporting weights"
        # A correspondence moves neurons, which is done where these are.
        device = torch.device("cpu") if transport.matched else self.device
        with memory_errors("fuse", device):
            carried = carry(
                self.target.views,
                weights,
                transport,
                fusion,
                source_base=base,
                shuffle=shuffle if "permuted" in self.recipe.evaluation.controls else None,
                vocabulary=vocabulary,
                changed=self._changed,
                device=device,
                keep=keep,
                scratch=folder,
                processes=processes,
                progress=progress.counting(said, "layers"),
                note=progress.note,
            )
        transported.finish()
        permuted.finish()
        return carried

    @property
    def _changed(self) -> frozenset[str] | None:
        """Parameters that one of the sources changes, as all are carried to the same places; None where unknown."""
        changed = frozenset[str]()
        for source in self.sources:
            if not isinstance(source.weights, LearnedWeights):
                return None
            changed |= source.weights.changed
        return changed

    def _joined_ratios(self, progress: Progress) -> dict[str, list[float | None]]:
        """As `Carried.norm_ratios`, of the sources joined, each at strength 1."""
        ratios: dict[str, list[float | None]] = {}
        transported = self.neurons.transported
        for done, (layer, projection) in enumerate(transported.places()):
            if projection in PROJECTIONS:
                own = self.target.views.layers[layer][projection]
                ratios.setdefault(projection, []).append(norm_ratio(own, transported[done]))
            progress.step("joining what the sources learned", done + 1, len(transported), "weights")
        return ratios


@contextmanager
def _gathering(folder: Path, processes: Processes) -> Iterator[Path]:
    """A folder for all processes, as `scratch` of the first."""
    with scratch(folder) if processes.is_first else nullcontext(folder):
        processes.wait()
        yield folder
