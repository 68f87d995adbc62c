"""The section ``evaluation``: what is scored, and against which controls."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from tmerge.recipe.section import Section, counted

__all__ = ["FITTED_CONTROLS", "EvaluationSettings"]

FITTED_CONTROLS = ("permuted", "source_base", "texts")
"""Those that a reconstruction fits anew, each at the cost of the fit itself."""


class EvaluationSettings(Section):
    """The held-out check that every merge ends with."""

    texts: Annotated[int, counted(8)] = Field(200, description="most held-out texts to score")
    controls: tuple[Literal["shrink", "noise", "permuted", "source_base", "texts"], ...] = Field(
        ("shrink", "noise", "permuted"),
        description="what the merge has to beat, at the same strength and place; of a reconstruction also "
        "source_base (toward that model) and texts (toward what the source does on other tokens)",
    )
    bootstrap: Annotated[int, counted(100, 1_000_000)] = Field(2000, description="resamples of the paired bootstrap")
    descent: Annotated[int, counted(0)] = Field(
        0, description="calibration texts for the descent control, which needs a backward pass; 0 leaves it out"
    )
