"""Several sources held against the base that they were made from, before any weight is read."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from tmerge.errors import UnsupportedModelError
from tmerge.models import Architecture, Model, ModelFacts
from tmerge.preflight.learned import Learned, changed_of
from tmerge.preflight.models import Models
from tmerge.recipe import Recipe, source_name

__all__ = ["Relative", "Relatives", "refuse_other_vocabularies"]


@dataclass(frozen=True)
class Relative:
    """One of several sources.

    Attributes:
        name: What it is called.
        facts: Of it; of an adapter, its base's with the adapter.
        left_out: What an adapter changes, and a merge leaves behind.
    """

    name: str
    facts: ModelFacts
    left_out: tuple[str, ...] = ()

    @property
    def label(self) -> str:
        """Its name and reference, for a line."""
        adapter = self.facts.adapter
        return f"{self.name} {(self.facts if adapter is None else adapter).reference.text}"


@dataclass(frozen=True)
class Relatives:
    """All of a recipe's.

    Attributes:
        sources: In the recipe's order.
        projections: That one of them changes at least, as far as is known: a model may change all.
        untouched: That none of them changes.
        notes: What a user should know before starting.
    """

    sources: tuple[Relative, ...]
    projections: list[str]
    untouched: list[str]
    notes: list[str]

    @classmethod
    def of(cls, recipe: Recipe, models: Models, projections: Sequence[str]) -> Relatives:
        """Hold them.

        Args:
            recipe: Names them.
            models: Its.
            projections: Asked for, and in both the target and the base.

        Raises:
            UnsupportedModelError: One is of another shape than the base, or changes nothing that is carried.
        """
        base, layout = models.matched.facts, models.matched.layout
        # Known of all before one is judged: a norm of q that one has learned goes with the q of another.
        changed = {name for model in models.sources for name in _changed_of(model, layout, projections)}
        sources, notes = list[Relative](), list[str]()
        for number, (named, model) in enumerate(zip(recipe.sources, models.sources, strict=True), start=1):
            relative = Relative(source_name(number), model.facts)
            if named.adapter is None:
                _refuse_another_shape(relative, model, base, layout, projections)
                if relative.facts.commit == base.commit:
                    notes.append(f"{relative.label} is source_base itself: it has learned nothing")
            else:
                layouts, stream = (models.target.layout, layout), recipe.fusion.carries_stream
                relative = _of_adapter(relative, layouts, projections, changed, stream)
                if relative.left_out:
                    left = ", ".join(relative.left_out)
                    notes.append(f"what {relative.label} changes and the merge leaves behind: {left}")
            for other in sources:
                if other.facts.commit == relative.facts.commit:
                    notes.append(f"{relative.label} and {other.label} are the same: it counts twice")
            sources.append(relative)
        touched = [name for name in projections if name in changed]
        return cls(tuple(sources), touched, [name for name in projections if name not in changed], notes)


def refuse_other_vocabularies(recipe: Recipe, models: Models) -> None:
    """Refuse a source whose tokens have other ids than the base's, which tells a model that was not made from it.

    Tokens that it has beside them are passed over, with the rows of its embedding.

    Raises:
        UnsupportedModelError: One has; it is named.
    """
    for number, model in enumerate(models.sources, start=1):
        if model.adapter is not None:
            continue
        own, ids = model.tokenizer.get_vocab(), models.matched.tokenizer.get_vocab()
        if other := next((token for token, index in ids.items() if own.get(token) != index), None):
            raise UnsupportedModelError(
                f"{source_name(number)} {model.reference} has another vocabulary than source_base "
                f"{models.matched.reference} (the token {other!r} is {own.get(other, 'not in it')} and not "
                f"{ids[other]}); name a model that was fine-tuned from it, or leave this one out"
            )


def _refuse_another_shape(
    relative: Relative, model: Model, base: ModelFacts, layout: Architecture, projections: Sequence[str]
) -> None:
    """Refuse a source that is no model of the base's shape, layer by layer, or of its number of tokens."""
    own, counts = model.layout, [int(facts.config.get_text_config().vocab_size) for facts in (relative.facts, base)]
    if own.num_layers != layout.num_layers:
        found = f"{own.num_layers} layers and not {layout.num_layers}"
    elif own.hidden_size != layout.hidden_size:
        found = f"a width of {own.hidden_size} and not {layout.hidden_size}"
    elif different := [name for name in projections if _shapes(own, name) != _shapes(layout, name)]:
        found = f"{different[0]} of another size"
    elif counts[0] != counts[1]:
        found = f"a vocabulary of {counts[0]} and not {counts[1]}"
    else:
        return
    raise UnsupportedModelError(
        f"{relative.label} is not of source_base {base.reference.text}'s shape: it has {found}; name a model that was "
        "fine-tuned from it, or leave this one out"
    )


def _shapes(layout: Architecture, name: str) -> list[tuple[int, int, int]]:
    return [(view.layer, view.out_features, view.in_features) for view in layout.projections([name])]


def _changed_of(model: Model, layout: Architecture, projections: Sequence[str]) -> list[str]:
    """The projections that a source changes; all, of a model of its own, which nothing tells of before it is read."""
    if model.adapter is None:
        return list(projections)
    adapter = model.facts.adapter
    assert adapter is not None  # it is held against its base
    return changed_of(adapter.parameters, layout, projections)


def _of_adapter(
    relative: Relative,
    layouts: tuple[Architecture, Architecture],
    projections: Sequence[str],
    carried: Collection[str],
    stream: bool,
) -> Relative:
    """With what of it is left behind, of the target's and the base's layouts and what of all sources is carried.

    Raises:
        UnsupportedModelError: That is all of it.
    """
    adapter = relative.facts.adapter
    assert adapter is not None  # it is one
    learned = Learned.of(adapter.parameters, layouts, projections, stream=stream, carried=carried)
    if not learned.projections:
        raise UnsupportedModelError(
            f"{relative.label} changes none of the projections {', '.join(projections)} that are fused; it changes "
            f"{learned.left_out[0]}: leave it out, or choose others in fusion.projections"
        )
    return Relative(relative.name, relative.facts, learned.left_out)
