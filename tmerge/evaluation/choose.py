"""``fusion.alpha: auto``: how strongly each group of projections is fused, or each of several sources.

Chosen by a `Race` on texts that are kept for choosing. Where each fit's ridge was chosen on them before
(`fusion.ridge: auto`), what is chosen may look a little better on them than it is; the verdict is on others.

Of one source, what fine-tuning changed in one projection counts on what it changed in the others, so that all groups
alike are tried at last. Several sources have one strength each, for all projections: a source after the other, those
before it held at what was chosen for them and those after it left out; then those that have gained, alike, or all where
fewer than two have.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from tmerge.evaluation.controls import applied
from tmerge.evaluation.race import Choice, Race
from tmerge.fusion import TransportedNeurons, places_of
from tmerge.models import STREAM, Projection, group_of

__all__ = ["PROJECTION_GROUPS", "choose_alpha", "choose_strengths"]

PROJECTION_GROUPS: tuple[tuple[str, ...], ...] = (("q", "k"), ("v",), ("o",), ("gate", "up"), ("down",), (STREAM,))
"""What is fused with one alpha: q and k make the attention scores together, gate and up the MLP's hidden neurons; and
embeddings and norms, where a task vector has them."""


def choose_alpha(
    race: Race,
    layers: Sequence[dict[str, Projection]],
    transported: Sequence[TransportedNeurons],
    *,
    together: bool = False,
    unfused: Sequence[Mapping[str, Projection]] = (),
) -> Choice:
    """Choose alpha for every group of projections that was transported.

    Args:
        race: On the choosing texts.
        layers: The unfused target's projections, `Architecture.views`; they have their bytes back afterwards.
        transported: What fusing would write.
        together: Whether all groups have one alpha.
        unfused: As for `applied`.
    """
    names = list(dict.fromkeys(group_of(projection) for _, projection in places_of(transported)))
    groups = [tuple(name for name in group if name in names) for group in PROJECTION_GROUPS]
    groups = [tuple(names)] if together else [group for group in groups if group]
    return race.run(groups, lambda alpha: applied(layers, transported, alpha, unfused))


def choose_strengths(
    race: Race,
    layers: Sequence[dict[str, Projection]],
    names: Sequence[str],
    joined: Callable[[Mapping[str, float]], Sequence[TransportedNeurons]],
    *,
    unfused: Sequence[Mapping[str, Projection]] = (),
) -> Choice:
    """Choose a strength for every source of several.

    Args:
        race: On the choosing texts.
        layers: As for `choose_alpha`.
        names: Of the sources, in the order in which they are tried.
        joined: Name -> strength to what fusing would write, at alpha 1.
        unfused: As for `applied`.
    """
    return race.run(
        [(name,) for name in names],
        lambda strengths: applied(layers, joined(strengths), 1.0, unfused),
        gaining_together=True,
    )
