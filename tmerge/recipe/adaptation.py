"""The section ``adaptation``: training on top of a merge."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from tmerge.recipe.section import Section, counted

__all__ = ["AdaptationSettings"]


class AdaptationSettings(Section):
    """Training after the merge, and of the baselines (Eq. 15-18)."""

    objective: Literal["sft", "distill"] = Field(
        "distill", description="sft: next tokens; distill: also the source's next-token distribution"
    )
    residual: Literal["frozen", "none"] = Field(
        "frozen", description="frozen: the transported residual stays fixed while the base weights train (Eq. 15-17)"
    )
    alpha: Annotated[float, Field(ge=0)] | None = Field(
        None, description="strength of the trained residual; None takes the fusion's own"
    )
    steps: Annotated[int, counted(1)] = Field(100, description="optimiser steps")
    batch_size: Annotated[int, counted(1, 4096)] = Field(8, description="texts of one forward and backward pass")
    accumulation: Annotated[int, counted(1, 4096)] = Field(1, description="such passes in one optimiser step")
    learning_rate: Annotated[float, Field(gt=0)] = Field(2e-4, description="peak; falls linearly to zero")
    warmup: Annotated[float, Field(ge=0, lt=1)] = Field(0.0, description="share of the steps in which it rises")
    max_tokens: Annotated[int, counted(8, 1_000_000)] = Field(256, description="longer texts are cut here")
    lora_rank: Annotated[int, counted(0, 4096)] = Field(0, description="0 trains the weights, else LoRA on q k v o")
    distill_weight: Annotated[float, Field(ge=0)] = Field(1.0, description="of the distillation term")
    distill_loss: Literal["pieces", "first-piece", "uld"] = Field(
        "pieces", description="how the source's distribution meets the target's vocabulary"
    )
    transport_weight: Annotated[float, Field(ge=0)] = Field(
        0.0, description="of the features' distance to the source's, carried through the plan"
    )
    completions_only: bool = Field(False, description="prompt-completion and chat data: no loss on the prompts")
    gradient_checkpointing: bool = Field(False, description="less memory, a third more time")
