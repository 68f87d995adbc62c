"""What becomes of projections whose outputs the source norms and the target does not: q and k (and v), o and down.

What the source does with them does not depend on how large they are before its norm, so neither its weights nor its
outputs there say how large the target's should be. What the norm gives does: a reconstruction reads that, or the stream
itself where o and down write to it. The norm divides by another number at each token, so no weights give it, and what
carries weights leaves them alone.
"""

from __future__ import annotations

from tmerge.models import Architecture
from tmerge.recipe import Recipe, Reconstruction, Shared, Weights

__all__ = ["without_norms"]


def without_norms(
    recipe: Recipe, target: Architecture, source: Architecture, projections: list[str]
) -> tuple[dict[str, str], list[str]]:
    """What is to be left alone, and what is to be said of the rest.

    Args:
        recipe: Of the run.
        target: The model that is changed.
        source: The model that is read.
        projections: That both have and the recipe wants.

    Returns:
        projection -> why it is skipped; and remarks, one line each.
    """
    fusion = recipe.fusion
    names = [name for name in projections if name in source.normed - target.normed]
    if isinstance(fusion, Reconstruction):
        names = [name for name in names if name not in ("o", "down")]
    # Row by row as large as the target's own, whatever comes.
    if not names or (isinstance(fusion, Weights) and fusion.scale == "row-norm"):
        return {}, []
    said, one = ", ".join(names[:-1]) + (" and " if len(names) > 1 else "") + names[-1], len(names) == 1
    are, them = ("is", "it") if one else ("are", "them")
    if isinstance(fusion, Reconstruction):
        lost = [name for name in names if not _is_caught(source, name)]
        if lost:
            skipped = dict.fromkeys(lost, "the source norms it behind its rotation, and the target does not norm it")
            return skipped, [
                f"{said} {are} not reconstructed: the source norms {them}, rotated, and the target does not"
            ]
        return {}, [
            f"{said} {are} fitted to what the source's norms make of {them}, as the target does not norm {them}"
        ]
    if isinstance(recipe.transport, Shared):
        skipped = dict.fromkeys(names, "the source norms what it gives, and the target does not")
        return skipped, [
            f"{said} {are} left alone: the source norms what {'it gives' if one else 'they give'} and the target does "
            "not, so that no weights of the target's do what the source's do"
        ]
    return {}, [
        f"{said} {are} carried as large as before the source's norm, which makes nothing of that, and the target does "
        f"not norm {them}: set fusion.scale: row-norm, or leave {them} out of fusion.projections"
    ]


def _is_caught(source: Architecture, name: str) -> bool:
    """Whether every layer that norms a projection's outputs has a tap behind the norm."""
    layers = zip(source.layers, source.attention, source.norm_taps, strict=True)
    return all(
        name in taps for views, heads, taps in layers if heads is not None and name in heads.normed and name in views
    )
