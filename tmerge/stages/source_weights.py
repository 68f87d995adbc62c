"""What is fused from, and matched by: a model's weights, read from files and never from the loaded model.

Most are read from the model's own files (`Model.weights`). Where these hold something else than the model has (GGUF, or
what ``transformers`` puts together while it loads), the weights that the fusion reads are written once to the run's
cache, when the model has been loaded: for its features, or else for this alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from torch import Tensor

from tmerge.models import Architecture, Model, give_back_memory, read_weights_file, write_weights
from tmerge.report import library_versions
from tmerge.run import stage_key
from tmerge.stages.scoring import opened
from tmerge.stages.step import Progress

__all__ = ["SourceWeights", "read_once"]


@dataclass(frozen=True)
class SourceWeights:
    """Of the source, of the source before its fine-tuning, or of the target where it is matched.

    Attributes:
        model: Whose they are.
        projections: That are fused.
        stream: Whether what else a task vector changes is carried too, or compared.
        path: A file for what cannot be read from the model's own.
    """

    model: Model
    projections: list[str]
    stream: bool
    path: Path

    def keep(self, progress: Progress) -> None:
        """Write what cannot be read from the model's own files, unless it is there; the model is loaded for it."""
        names, key = self._names, self._key
        if self._are_plain or read_weights_file(self.path, key) is not None:
            return
        # By the first process alone.
        loaded = opened(self.model, progress.alone)
        progress.step(f"{self.model.reference}: keeping the weights that are fused from", 0, 1, "models")
        write_weights(loaded, names, self.path, key)

    def read(self, progress: Progress) -> Architecture:
        """The model's projections, each weight read from its file when it is asked for."""
        return self.model.layout.reading(self.weights(progress))

    def weights(self, progress: Progress) -> Mapping[str, Tensor]:
        """The weights themselves, by the names of the model's parameters."""
        if self._are_plain:
            return self.model.weights
        was_open = self.model.is_open
        self.keep(progress)
        if not was_open:
            self.model.release()
            give_back_memory()
        weights = read_weights_file(self.path, self._key)
        assert weights is not None  # it has just been seen to
        return weights

    @property
    def _names(self) -> list[str]:
        return self.model.layout.parameters(self.projections, stream=self.stream)

    @property
    def _are_plain(self) -> bool:
        return set(self._names) <= self.model.weights.keys()

    @property
    def _key(self) -> str:
        facts = {"commit": self.model.commit, "dtype": self.model.dtype, "names": sorted(self._names)}
        return stage_key("weights", versions=library_versions(), **facts)


class _Readable(Protocol):
    def read(self, progress: Progress) -> Architecture: ...


def read_once(of: _Readable, progress: Progress) -> Architecture:
    """The weights of a model that several processes read; what has to be written for them the first one writes."""
    processes = progress.processes
    if not processes.is_first:
        processes.wait()
    weights = of.read(progress)
    if processes.is_first:
        processes.wait()
    return weights
