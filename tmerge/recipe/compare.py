"""The sections ``compare`` and ``published``: what merges are held against, and what the paper reports."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator

from tmerge.recipe.section import Section, counted

__all__ = ["CompareSettings", "PublishedScores"]

TrainedRow = Literal["sft", "sft+time", "distill", "sft+transport", "fused+sft", "fused+distill"]


class CompareSettings(Section):
    """What `tmerge compare` holds against each other; `tmerge merge` reads none of it."""

    rows: tuple[TrainedRow, ...] = Field(
        ("sft", "distill", "fused+sft", "fused+distill"),
        description="what is trained, all on the same texts and for the same steps; fused+... keeps the transported "
        "residual frozen; sft+time is SFT alone for as long as the merge and sft take together",
    )
    seeds: tuple[Annotated[int, counted(0, 4294967295)], ...] = Field(
        (0,), min_length=1, description="of the trained rows"
    )
    alphas: tuple[Annotated[float, Field(gt=0)], ...] = Field(
        (0.01, 0.03, 0.1, 0.3, 1.0), description="sweep without training (Figure 5), beside shrink and noise"
    )
    sources: tuple[str, ...] = Field((), description="further sources, each merged with the same recipe (Figure 4)")
    domains: dict[str, str] = Field(
        {}, description="name -> dataset: further texts that every row is scored on (Figures 1 and 6)"
    )
    tasks: tuple[str, ...] = Field((), description="benchmark tasks or groups of lm-evaluation-harness for every row")
    task_data: dict[str, str] = Field({}, description="task -> local file in place of its Hub dataset")
    task_limit: Annotated[int, counted(1)] | None = Field(None, description="questions of each task at most")

    @field_validator("rows")
    @classmethod
    def _timed(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if "sft+time" in value and "sft" not in value[: value.index("sft+time")]:
            raise ValueError("sft+time takes its time from the row sft: name sft before it")
        return value

    @field_validator("rows", "seeds", "alphas", "sources")
    @classmethod
    def _distinct(cls, value: tuple[Any, ...]) -> tuple[Any, ...]:
        if len(set(value)) != len(value):
            raise ValueError("name each once")
        return value


class PublishedScores(Section):
    """What the paper reports for a preset's pair, to be shown beside what is measured here."""

    table: str
    metric: str
    scores: dict[str, tuple[float, float, float]] = Field(
        description="benchmark -> base, fused without adaptation, fused with adaptation"
    )
    by_source: dict[str, dict[str, float]] = Field(
        {}, description="size of the source -> benchmark -> fused with adaptation (Table 7)"
    )
