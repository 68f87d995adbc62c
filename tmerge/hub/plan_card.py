"""The card of a repo that holds a run's transport alone: what it is between, and how to fuse from it."""

from __future__ import annotations

from importlib import resources

from huggingface_hub import ModelCardData
from jinja2 import Environment, StrictUndefined

from tmerge.hub.card import code_text, inline_text, model_name, public_name, shown_model
from tmerge.recipe import Recipe
from tmerge.report import Report, relatedness_words, solved_words

__all__ = ["plan_card_text"]

_TAGS = ["tmerge", "transport-and-merge", "transport-plan"]


def plan_card_text(report: Report, recipe: Recipe, repo: str) -> str:
    """The card: YAML front matter and Markdown.

    Args:
        report: Of the run whose transport it is.
        recipe: Its resolved recipe.
        repo: The Hub id that it is pushed to.
    """
    environment = Environment(undefined=StrictUndefined, keep_trailing_newline=True)
    environment.filters["md"] = inline_text
    template = environment.from_string((resources.files("tmerge.hub") / "plan_card.md").read_text(encoding="utf-8"))
    # Of an adapter's merge, the base alone was matched.
    source = report.source if report.adapter is None else report.source_base_model or report.source
    calibration, related = report.calibration, report.transport.relatedness
    matched_on = calibration.other_dataset if calibration.other else calibration.dataset
    count = calibration.other or calibration.texts
    return template.render(
        card_data=ModelCardData(library_name="tmerge", tags=_TAGS, model_name=repo.rpartition("/")[2]).to_yaml(
            line_break="\n"
        ),
        title=f"{model_name(report.target.ref)} and {model_name(source.ref)}: a transport plan",
        target=shown_model(report.target),
        source=shown_model(source),
        tmerge=report.tmerge,
        relatedness="" if related is None else relatedness_words(related) + ".",
        solved=solved_words(report.transport),
        texts=f"{count} texts of `{code_text(public_name(str(matched_on)))}`",
        projections=list(report.fusion.projections),
        reference=public_name(source.ref),
        repo=repo,
        seed=report.seed,
        versions=", ".join(f"{name} {version}" for name, version in report.versions.items()),
    )
