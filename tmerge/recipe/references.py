"""What a recipe names: models, adapters, runs and texts, wherever they are."""

from __future__ import annotations

from tmerge.recipe.recipe import Recipe
from tmerge.recipe.sources import source_name

__all__ = ["compared_references", "model_references", "text_references"]


def model_references(recipe: Recipe) -> dict[str, str]:
    """Key -> the model, adapter or run that a merge reads."""
    named = {
        "target": recipe.target,
        "source": recipe.source,
        "source_base": recipe.source_base,
        "adapter": recipe.adapter,
        "plan": recipe.plan,
        **{source_name(number): source.reference for number, source in enumerate(recipe.sources, start=1)},
        **{f"bases.{adapter}": base for adapter, base in recipe.bases.items()},
    }
    return {key: reference for key, reference in named.items() if reference}


def text_references(recipe: Recipe) -> dict[str, str]:
    """Key -> the dataset that a merge reads: a Hub dataset, built-in samples or a file."""
    calibration = recipe.calibration
    named = {
        "calibration.dataset": calibration.dataset,
        "calibration.match_on": calibration.match_on,
        "fusion.keep": recipe.fusion.kept_on,
    }
    return {key: reference.strip() for key, reference in named.items() if reference and reference.strip()}


def compared_references(recipe: Recipe) -> dict[str, str]:
    """Key -> what `tmerge compare` reads beside: models, datasets and files."""
    compare = recipe.compare
    return {
        **{f"compare.sources.{place}": source for place, source in enumerate(compare.sources, start=1)},
        **{f"compare.domains.{name}": dataset for name, dataset in compare.domains.items()},
        **{f"compare.task_data.{task}": path for task, path in compare.task_data.items()},
    }
