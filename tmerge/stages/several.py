"""Several sources on the road: what was carried of each, and what they are once they are joined.

Each source's neurons lie in a folder of its own; they are joined an item at a time, whenever they are asked for, at the
strengths that are asked for. Where stages after the fusion speak of alpha, that is 1: the strengths are in the neurons.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from tmerge.errors import FusionError
from tmerge.fusion import Alpha, Join, JoinedNeurons, NeuronSequence, SourcePart
from tmerge.preflight.models import Models
from tmerge.recipe import Recipe, TaskVector, method_of, source_name
from tmerge.report import Report
from tmerge.run import stage_key
from tmerge.stages.neurons import Neurons

__all__ = ["JoinedPart", "JoinedSources", "alone_names", "neurons_of_report"]


@dataclass(frozen=True)
class JoinedPart:
    """What of a source decides how it is joined; as `SourcePart`."""

    name: str
    identity: str
    weight: float


class JoinedSources(Neurons):
    """What fusing writes of several sources, joined.

    Args:
        cache: Of the run.
        sources: In the order of the recipe.
        join: How.
        strengths: Name -> strength.
    """

    def __init__(self, cache: Path, sources: Sequence[JoinedPart], join: Join, strengths: Mapping[str, float]) -> None:
        super().__init__(cache)
        self.sources, self.join, self.strengths = tuple(sources), join, dict(strengths)

    @classmethod
    def of_recipe(cls, recipe: Recipe, models: Models, cache: Path) -> JoinedSources:
        """Of a recipe's sources, each at strength 1."""
        named = zip(models.sources, recipe.sources, strict=True)
        sources = [
            JoinedPart(source_name(number), model.commit, source.weight)
            for number, (model, source) in enumerate(named, start=1)
        ]
        return cls(cache, sources, _join(recipe), {source.name: 1.0 for source in sources})

    @property
    def names(self) -> list[str]:
        """Of the sources."""
        return [source.name for source in self.sources]

    def each(self, name: str) -> Neurons:
        """What is carried of one source, before it is joined."""
        return Neurons(self._cache / "sources" / str(1 + self.names.index(name)))

    def at(self, strengths: Mapping[str, float]) -> JoinedSources:
        """The same at other strengths."""
        return JoinedSources(self._cache, self.sources, self.join, strengths)

    def at_alpha(self, alpha: Alpha) -> JoinedSources:
        """The same at one strength for all, or at those that were chosen."""
        return self.at(alpha if isinstance(alpha, Mapping) else dict.fromkeys(self.names, alpha))

    def key(self, fused: str) -> str:
        """What decides them: `fused`, the key of the stage that carried them, and how they are joined."""
        sources = [asdict(source) for source in self.sources]
        return stage_key("join", fuse=fused, sources=sources, **asdict(self.join), strengths=self.strengths)

    def stored(self, name: str) -> NeuronSequence:
        """As `Neurons.stored`, joined; or, under a source's name, it alone and whole at its weight and strength."""
        if name in self.names:
            plain = Join("sum", 1.0, self.join.seed)
            return JoinedNeurons(self._parts("transported"), plain, {name: self.strengths[name]})
        return JoinedNeurons(self._parts(name), self.join, self.strengths)

    def _parts(self, name: str) -> list[SourcePart]:
        return [
            SourcePart(source.name, source.identity, source.weight, self.each(source.name).stored(name))
            for source in self.sources
        ]


def alone_names(neurons: Neurons) -> list[str]:
    """Of the sources that are each scored alone beside all of them joined; one source alone is scored already."""
    return neurons.names if isinstance(neurons, JoinedSources) and len(neurons.sources) > 1 else []


def neurons_of_report(cache: Path, recipe: Recipe, report: Report, alpha: float | None = None) -> tuple[Neurons, Alpha]:
    """What a finished run transported, and the alpha that it is to be fused with.

    Args:
        cache: Of the run.
        recipe: Of the run.
        report: Of the run.
        alpha: In place of the run's; of several sources the strength of all.

    Raises:
        FusionError: They were carried by an earlier form of the method, whose norms go by other names.
    """
    part = "carrying beside the projections"
    if part in (now := method_of(recipe)) and (report.method or {}).get(part) != now[part]:
        raise FusionError(
            f"this merge was made by an earlier form of the method ({part}), whose neurons are not read any more; run "
            "its recipe again into another folder, and go on from that"
        )
    if not report.sources:
        return Neurons(cache), report.fusion.alpha_used if alpha is None else alpha
    sources = [JoinedPart(source.name, source.model.commit, source.weight) for source in report.sources]
    strengths = {source.name: source.strength if alpha is None else alpha for source in report.sources}
    return JoinedSources(cache, sources, _join(recipe), strengths), 1.0


def _join(recipe: Recipe) -> Join:
    assert isinstance(recipe.fusion, TaskVector)  # the recipe sees to it
    return Join(recipe.fusion.join, recipe.fusion.density, recipe.seed)
