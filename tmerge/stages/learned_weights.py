"""What an adapter's task vector is fused from: the change itself, parameter by parameter, and never a second model.

Nothing is subtracted where nothing was added: a LoRA's change is s B A as it is stored. Of the base only those weights
are read that a change is told by (DoRA, modules that were trained whole).
"""

from __future__ import annotations

from dataclasses import dataclass

from tmerge.models import AdapterChanges, AdapterWeights, Architecture, Model, NoWeights
from tmerge.stages.source_weights import SourceWeights
from tmerge.stages.step import Progress

__all__ = ["LearnedWeights"]


@dataclass(frozen=True)
class LearnedWeights:
    """Of a source that is a base with an adapter.

    Attributes:
        base: The base's weights.
        joined: Base and adapter together, which are never loaded for this.
    """

    base: SourceWeights
    joined: Model

    @property
    def model(self) -> Model:
        """That the maps are of: the base."""
        return self.base.model

    @property
    def changed(self) -> frozenset[str]:
        """Names of the base's parameters that the adapter changes."""
        return frozenset(self._changes.parameters)

    @property
    def reads_base(self) -> bool:
        """Whether the base's own weights are needed to tell the change."""
        return bool(self._changes.reads_base)

    def keep(self, progress: Progress) -> None:
        """As `SourceWeights.keep`, where the base's weights are needed."""
        if self.reads_base:
            self.base.keep(progress)

    def read(self, progress: Progress) -> Architecture:
        """What was learned of each of the source's projections, made when it is asked for."""
        own = self.base.weights(progress) if self.reads_base else {}
        return self.model.layout.reading(AdapterWeights(self.model.place.empty, own, self._changes))

    def nothing(self) -> Architecture:
        """What it is a difference to: zeros in the same shapes."""
        return self.model.layout.reading(NoWeights(self.model.place.empty))

    @property
    def _changes(self) -> AdapterChanges:
        changes = self.joined.place.changes
        assert changes is not None  # of such a source
        return changes
