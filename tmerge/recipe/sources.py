"""The list ``sources``: several relatives of one base, whose task vectors are joined."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, model_validator

from tmerge.recipe.section import Section

__all__ = ["JoinedSource", "repo_of", "source_name"]


class JoinedSource(Section):
    """One of several sources: a model or a LoRA that was made from `source_base`."""

    source: str | None = Field(None, description="a model of source_base's shape and vocabulary, fine-tuned from it")
    adapter: str | None = Field(None, description="or a LoRA of source_base, PEFT repo or folder")
    weight: Annotated[float, Field(gt=0)] = Field(
        1.0, description="how much it counts beside the others: a factor, and for ties its part of the mean"
    )

    @model_validator(mode="after")
    def _one_of_two(self) -> JoinedSource:
        if (self.source is None) == (self.adapter is None):
            given = "has neither" if self.source is None else "has both"
            raise ValueError(f"it {given}; name its source (a model) or its adapter (a LoRA), one of the two")
        return self

    @property
    def reference(self) -> str:
        """The model's or the adapter's."""
        return self.source or self.adapter or ""


def source_name(number: int) -> str:
    """What the n-th of several sources, from 1 on, is called wherever it is told of."""
    return f"source {number}"


def repo_of(reference: str) -> str:
    """A reference to a model without its revision, where it has one."""
    return reference.partition("@")[0]
