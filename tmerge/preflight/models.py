"""The models of a recipe: one handle each, which everything of a run shares."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from tmerge.models import Model, pick_device, pinned, source_licence_files, trusts
from tmerge.models.agreed import least_share
from tmerge.preflight.holding import Place, fit_together
from tmerge.processes import Processes
from tmerge.recipe import Recipe, source_name

__all__ = ["Models"]


@dataclass(frozen=True)
class Models:
    """By their roles.

    Attributes:
        target: Is changed.
        source: Is read; of several sources, their base.
        source_base: The source before its fine-tuning, where what it learned since is carried.
        sources: Several that were made from it, in the recipe's order; each adapter's joined to it.
    """

    target: Model
    source: Model
    source_base: Model | None
    sources: tuple[Model, ...] = ()

    @classmethod
    def of(
        cls, recipe: Recipe, commits: Mapping[str, str] | None = None, revisions: Mapping[str, str] | None = None
    ) -> Models:
        """Handles of a recipe's models.

        Args:
            recipe: Names them, and says how they are loaded.
            commits: Role -> what identifies its model, where that is known; the others are asked when it is needed.
            revisions: As `Model` takes them.
        """
        known = dict(revisions or {})

        def handle(role: str, reference: str, adapter: str | None = None) -> Model:
            return Model(
                reference,
                dtype=recipe.dtype,
                device=recipe.device,
                memory=recipe.memory,
                trust_remote_code=trusts(recipe.trust_remote_code, reference),
                commit=(commits or {}).get(role),
                adapter=adapter,
                base=recipe.base_of(reference),
                revisions=known,
            )

        base = None if recipe.source_base is None else handle("source_base", recipe.source_base)
        target = handle("target", recipe.target)
        if not recipe.sources:
            return cls(target, handle("source", recipe.source, recipe.adapter), base)
        assert base is not None  # the recipe sees to it
        sources = [
            handle(source_name(number), source.source or base.reference, source.adapter)
            for number, source in enumerate(recipe.sources, start=1)
        ]
        return cls(target, base, base, tuple(sources))

    @classmethod
    def agreed(cls, recipe: Recipe, processes: Processes) -> Models:
        """As `of`, at the commits that the first of several processes finds, so that no push comes between them."""
        models = cls.of(recipe)
        if processes.count == 1:
            return models
        revisions = processes.from_first(lambda: models.revisions)
        return models if processes.is_first else cls.of(recipe, revisions=revisions)

    @property
    def revisions(self) -> dict[str, str]:
        """Hub repo, as it is named -> the commit that is read of it, of all of them and of what is joined to them."""
        models = [*(model for _, model in self._roles()), *self.sources]
        return {repo: commit for model in models for repo, commit in model.place.revisions.items()}

    @property
    def licence_files(self) -> dict[str, Path]:
        """Path in the merge's folder -> licence file of what goes into the target; see `source_licence_files`."""
        models = [*(model for role, model in self._roles() if role != "target"), *self.sources]
        return source_licence_files(self.target.place, [model.place for model in models])

    @property
    def matched(self) -> Model:
        """That is read for the matching: the source, without the adapter that is carried; of several their base."""
        if self.source.adapter is None:
            return self.source
        assert self.source_base is not None  # the recipe sees to it
        return self.source_base

    def fit_together(self, processes: Processes) -> bool:
        """Whether target and source are to be in memory beside each other; asked by all processes of the run."""
        both, device = self.target.held_bytes + self.source.held_bytes, pick_device(self.target.device)
        return fit_together(self.target.memory, both, Place(device, least_share(device, processes)))

    def pinned(self) -> dict[str, str]:
        """Role -> the reference, a Hub repo's at its commit; what is local stays as it was written."""
        pins = {role: model.pinned for role, model in self._roles()}
        joined = self.source.facts.adapter
        if self.source.adapter is not None and joined is not None:
            pins["adapter"] = pinned(self.source.adapter, joined.commit)
        return pins

    def pinned_sources(self) -> list[dict[str, str]]:
        """Of several sources, each one's key and reference, as `pinned`."""
        pins = []
        for model in self.sources:
            if model.adapter is None:
                pins.append({"source": model.pinned})
            else:
                joined = model.facts.adapter
                assert joined is not None  # its facts are read with it
                pins.append({"adapter": pinned(model.adapter, joined.commit)})
        return pins

    def pinned_bases(self) -> dict[str, str]:
        """Adapter that stands for a model, as `pinned` -> the Hub repo that it is joined to, at its commit."""
        models = [*(model for _, model in self._roles()), *self.sources]
        return {model.pinned: base for model in models if (base := model.pinned_base) is not None}

    def _roles(self) -> Iterator[tuple[str, Model]]:
        yield "target", self.target
        yield "source", self.source
        if self.source_base is not None:
            yield "source_base", self.source_base
