"""Reconstructing the target block by block: what its projections are changed by, and the record of the transport."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tmerge.calibration import TextSet
from tmerge.fusion import (
    COLUMN_PROJECTIONS,
    BlockNote,
    FittedBlock,
    NeuronWriter,
    Passage,
    generator_for,
    goal_factor,
    reconstruct,
)
from tmerge.models import Model, Projection, give_back_memory, shared_vocabulary
from tmerge.models.device import is_out_of_memory, memory_errors
from tmerge.recipe import FITTED_CONTROLS, RECONSTRUCTING, Recipe, Reconstruction
from tmerge.recorded import RecordedRun
from tmerge.run import Run
from tmerge.stages.neurons import Neurons
from tmerge.stages.notes import ReconstructNote
from tmerge.stages.scoring import opened
from tmerge.stages.step import Progress
from tmerge.stages.transport import Features, matched_on, record_of, transport_of
from tmerge.store import scratch
from tmerge.transport import PlanRecorder, Transport

__all__ = ["Reconstruct"]

# Padded tokens of a batch that are halved no more.
_FEWEST_TOKENS = 64


@dataclass(frozen=True)
class Reconstruct:
    """The stage ``reconstruct``. Alpha enters only when the changes are written, as for `Fuse`.

    Attributes:
        recipe: Of the run; its fusion is a `Reconstruction`.
        target: Is changed block by block, and let go.
        source: Read beside it, and let go.
        source_base: Likewise, for the control ``source_base``.
        matched: That the neurons were matched with: the source, or of one with an adapter its base.
        texts: Whose calibration texts are fitted on.
        kept: Whose calibration texts the target goes on doing on what it does; None without any.
        features: What the transport was solved from.
        solved: The key of the stage that solved it.
        recorded: A recorded transport, which is used instead.
        run: Where the run's own record of its transport goes.
        neurons: Where the changes go, and those of the controls.
    """

    recipe: Recipe
    target: Model
    source: Model
    source_base: Model | None
    matched: Model
    texts: TextSet
    kept: TextSet | None
    features: Features
    solved: str
    recorded: RecordedRun | None
    run: Run
    neurons: Neurons

    name = "reconstruct"
    note = ReconstructNote
    together = True

    @property
    def _settings(self) -> Reconstruction:
        settings = self.recipe.fusion
        assert isinstance(settings, Reconstruction)  # the road sees to it
        return settings

    def inputs(self) -> dict[str, Any]:
        """What decides the changes."""
        return {
            # What it is fitted to is not of the recipe: what was fitted before that changed is fitted anew.
            "method": RECONSTRUCTING,
            "transport": self.solved,
            "source": self.source.commit,
            "fusion": self._settings.model_dump(mode="json", exclude={"alpha", "alphas"}),
            "texts": self.texts.sha256,
            "keep": None if self.kept is None else self.kept.sha256,
            "calibration": self.recipe.digest("calibration"),
            "dtype": self.recipe.dtype,
            "device": self.recipe.device,
            "seed": self.recipe.seed,
            "controls": self._controls,
            "base": None if self.source_base is None else self.source_base.commit,
        }

    def do(self, key: str, progress: Progress) -> ReconstructNote:
        """Fit, block by block; then the same for each control that is fitted too."""
        transport = transport_of(self.recipe, self.features, self.recorded)
        blocks = self._pass("fused", key, transport, progress)
        for name in self._controls:
            self._pass(name, key, transport, progress)
        progress.processes.from_first(lambda: self._record(transport))
        if self._settings.final_goal == "logits" and blocks[-1].goal == "stream":
            progress.note(
                "the last block is fitted to the source's residual stream: its logits can be a goal only where both "
                "have one vocabulary and the whole of the last block's stream has a counterpart"
            )
        return self._noted(blocks)

    def _vocabulary(self, drawn_to: Model) -> Tensor | None:
        """The tokens whose logits are the last block's goal; None where that is the stream."""
        if self._settings.final_goal == "stream":
            return None
        return shared_vocabulary(self.target, drawn_to)

    @property
    def _controls(self) -> list[str]:
        return [name for name in self.recipe.evaluation.controls if name in FITTED_CONTROLS]

    @property
    def _choosing(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Texts that ridges are chosen on: of those to be drawn on, and of those to be kept."""
        if self._settings.ridge != "auto":
            return (), ()
        return self.texts.choosing, () if self.kept is None else self.kept.choosing

    @property
    def _keep(self) -> tuple[str, ...]:
        return () if self.kept is None else self.kept.texts

    def _pass(self, name: str, key: str, transport: Transport, progress: Progress) -> list[BlockNote]:
        """One reconstruction of the target as it is stored; what was finished of it before is not fitted again."""
        processes = progress.processes
        batch_tokens = self.recipe.calibration.batch_tokens
        while True:
            # All go on from what there is; all have the same fits then, and the first writes them.
            writer = processes.after_first(lambda: self.neurons.go_on(name, key))
            processes.wait()
            if writer.is_finished or self._fit(name, transport, writer, batch_tokens, progress):
                break
            # Blocks that are fitted stay so.
            batch_tokens //= 2
            progress.note("no room for so many texts at once: what is reconstructed on is read by halves")
        if processes.is_first and not writer.is_finished:
            writer.finish()
        return processes.from_first(lambda: writer.notes)

    def _fit(
        self,
        name: str,
        transport: Transport,
        writer: NeuronWriter[BlockNote],
        batch_tokens: int,
        progress: Progress,
    ) -> bool:
        """Fit all blocks that are not yet, and say whether memory sufficed, in all processes."""
        drawn_to = self.source
        if name == "source_base":
            assert self.source_base is not None  # the recipe sees to it
            drawn_to = self.source_base
        self.target.release()  # an earlier pass has changed it
        give_back_memory()
        target, source = opened(self.target, progress), opened(drawn_to, progress)
        calibration, settings = self.recipe.calibration, self._settings
        views, source_views = self.target.views, drawn_to.views
        passage = Passage(
            target,
            views,
            source,
            source_views,
            transport,
            self.features.projections,
            settings.tried_ridges,
            settings.rank,
            settings.keep_share,
            calibration.max_tokens,
            batch_tokens,
            self._vocabulary(drawn_to),
            lambda name, layer, other: goal_factor(name, (layer, other), views, source_views),
            self._shuffle if name == "permuted" else None,
            self.recipe.seed if name == "texts" else None,
            progress.processes,
        )
        folder = self.run.cache / f"goals-{progress.processes.rank}"

        def take(block: FittedBlock) -> None:
            if progress.processes.is_first:
                writer.add(block.items, block.note)

        is_done = False
        with memory_errors("the reconstruction", target.device):
            try:
                reconstruct(
                    passage,
                    self.texts.texts,
                    self._keep,
                    folder,
                    choosing=self._choosing,
                    finished=writer.parts(),
                    take=take,
                    progress=progress.counting(
                        "reconstructing" if name == "fused" else f"{name}: reconstructing", "layers"
                    ),
                )
                # Of another that lacks it: heard here at the latest.
                progress.processes.wait()
                is_done = True
            except (MemoryError, RuntimeError) as error:
                if not is_out_of_memory(error) or batch_tokens <= _FEWEST_TOKENS:
                    raise
                progress.processes.lack_together(error)
        del passage, target, source
        shutil.rmtree(folder, ignore_errors=True)
        self.target.release()
        drawn_to.release()
        give_back_memory()
        return is_done

    def _noted(self, blocks: Sequence[BlockNote]) -> ReconstructNote:
        """What was changed, and by how much."""
        layers = self.target.layout.layers
        ratios: dict[str, list[float | None]] = {name: [] for name in self.features.projections}
        errors: dict[str, list[Any]] = {name: [] for name in ratios}
        ridges: dict[str, list[float]] = {name: [] for name in ratios}
        numbers: dict[str, list[int]] = {name: [] for name in ratios}
        for neurons in self.neurons.transported:
            name = neurons.projection
            numbers[name].append(neurons.layer)
            errors[name].append(blocks[neurons.layer].errors[name])
            ridges[name].append(blocks[neurons.layer].ridges[name])
            ratios[name].append(blocks[neurons.layer].norms[name])
        return ReconstructNote(
            norm_ratios=ratios,
            layers=numbers,
            biases={name: _bias_words(layers, name) for name in ratios},
            stream=[],
            eta={},
            layer_plans_converged=True,
            errors=errors,
            ridges=ridges,
            rows=blocks[0].rows,
            fit_seconds=sum(block.seconds for block in blocks),
            final_goal=blocks[-1].goal,
            keep=None if self.kept is None else self.kept.dataset,
            keep_texts=len(self._keep),
        )

    def _shuffle(self, layer: int, feature: str, neurons: int) -> Tensor:
        return torch.randperm(neurons, generator=generator_for(self.recipe.seed, "permuted", layer, feature))

    def _record(self, transport: Transport) -> None:
        """The transport that was used, for pictures and later runs."""
        with scratch(self.run.cache / "record") as folder:
            recorder = PlanRecorder(transport, folder)
            for layer in transport.target_layers:
                recorder.add(recorder.part(transport.feature_maps(layer).values()))
            tensors = recorder.tensors()
            for name, layer_map in transport.layer_maps.items():
                views = [self.target.layout.layers[layer][name] for layer in layer_map.target_layers]
                width = views[0].in_features if name in COLUMN_PROJECTIONS else views[0].out_features
                tensors[f"neurons.{name}"] = torch.arange(width, dtype=torch.int32).expand(len(views), width)
            commits = self.target.commit, self.matched.commit
            known = matched_on(self.run, self.recorded)
            record_of(self.recipe, transport, self.features, commits, tensors, known).save(self.run.transport_path)


def _bias_words(layers: Sequence[Mapping[str, Projection]], name: str) -> str:
    return "fitted" if next(layer[name] for layer in layers if name in layer).has_bias else "none"
