"""Of a merge that is written as an adapter: whether it can be one, and what finding its factors takes."""

from __future__ import annotations

import torch

from tmerge.errors import UnsupportedModelError
from tmerge.models import Architecture, ModelFacts
from tmerge.preflight.models import Models
from tmerge.preflight.pieces import Pieces
from tmerge.recipe import Recipe, Shared, TaskVector

__all__ = ["adapter_bytes", "factoring_bytes", "factoring_seconds", "refuse_no_adapter"]

# Products with a matrix that find its leading directions: of one of low rank, twice over, and of any other.
_OF_LOW_RANK, _OF_ANY_RANK = 8, 20
# Directions that are looked for beside those that are wanted.
_BESIDE = 8


def refuse_no_adapter(recipe: Recipe, models: Models, projections: list[str]) -> None:
    """Refuse what cannot be written as an adapter, as far as the models decide it.

    Raises:
        UnsupportedModelError: The target is joined of two already, or the adapter that is carried changes a weight by
            more than its rank, and no rank is said.
    """
    if recipe.save.form != "adapter":
        return
    if models.target.facts.adapter is not None:
        raise UnsupportedModelError(
            f"save.form is adapter, and the target {recipe.target} is an adapter with its base already: an adapter is "
            "of one model; set save.form: merged, or name the base as the target"
        )
    experts = sorted(name for name, _ in models.target.place.empty.named_modules() if name.endswith(".experts"))
    if experts and {"gate", "up", "down"} & set(projections):
        raise UnsupportedModelError(
            f"save.form is adapter, and the target has experts ({experts[0]}), to which PEFT would give what is "
            "changed of other layers' gate, up and down; set fusion.projections to some of q, k, v and o, or "
            "save.form: merged"
        )
    changes = models.source.place.changes
    if recipe.adapter is None or changes is None or not isinstance(recipe.fusion, TaskVector):
        return
    carried = {f"{view.module_name}.weight" for view in models.source.layout.projections(projections)}.intersection(
        changes.reads_base
    )
    if carried and recipe.fusion.rank is None:
        raise UnsupportedModelError(
            f"save.form is adapter, and the adapter {recipe.adapter} changes {min(carried)} by more than its rank (a "
            "DoRA, or trained whole); set fusion.rank, such as 16, or save.form: merged"
        )


def adapter_bytes(
    recipe: Recipe, models: tuple[ModelFacts, ModelFacts], layout: Architecture, projections: list[str]
) -> int:
    """Of its two factors for each projection, float32.

    Args:
        recipe: Of the run.
        models: Target and source.
        layout: The target's.
        projections: That are changed.
    """
    return (
        4
        * _rank(recipe, models[1])
        * sum(view.in_features + view.out_features for view in layout.projections(projections))
    )


def factoring_bytes(layout: Architecture, projections: list[str]) -> int:
    """Of the largest module's change while its factors are found: twice in float32, three times in float64."""
    views = layout.projections(projections)
    return 32 * max(view.rows.stored * view.in_features for view in views)


def factoring_seconds(
    pieces: Pieces, recipe: Recipe, source: ModelFacts, layout: Architecture, projections: list[str], threads: int
) -> tuple[float, float]:
    """Of bringing what is carried to its rank, and of finding the factors of what an adapter holds.

    Args:
        pieces: Of the machine.
        recipe: Of the run.
        source: Says an adapter's rank.
        layout: The target's.
        projections: That are changed.
        threads: That share the work.
    """
    cpu, views = torch.device("cpu"), layout.projections(projections)
    rank = _rank(recipe, source) + _BESIDE
    once = sum(rank * pieces.product(view.in_features, view.out_features, torch.float64, cpu) for view in views)
    brought = isinstance(recipe.fusion, TaskVector) and recipe.fusion.rank is not None
    kinds = 1 + ("permuted" in recipe.evaluation.controls)
    return (
        kinds * _OF_ANY_RANK * once / threads if brought else 0.0,
        _OF_LOW_RANK * once / threads if recipe.save.form == "adapter" else 0.0,
    )


def _rank(recipe: Recipe, source: ModelFacts) -> int:
    """Of what is changed; as many source layers as feed a target layer, and several sources, add theirs."""
    said = getattr(recipe.fusion, "rank", None)
    if said is not None:
        return int(said) * max(1, len(recipe.sources))
    feeding = 1 if isinstance(recipe.transport, Shared) else recipe.transport.layers_kept
    return feeding * (source.adapter.rank if source.adapter is not None else 0)
