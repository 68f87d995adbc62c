"""The section ``calibration``: the texts, and how they are read."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from tmerge.recipe.section import Section, counted

__all__ = ["CalibrationSettings"]


class CalibrationSettings(Section):
    """The texts that both models read, and how they are read."""

    dataset: str = Field(
        "samples:english",
        description="`samples:LANGUAGE` (built in), a Hub dataset id (@revision), or a .txt/.jsonl/.csv/.parquet file",
    )
    config: str | None = Field(None, description="configuration of a Hub dataset")
    split: str = Field("train", description="split of a Hub dataset")
    column: str | None = Field(None, description="column that holds the text; found by itself when there is only one")
    texts: Annotated[int, counted(16)] = Field(2000, description="most texts to read, held-out ones included")
    max_tokens: Annotated[int, counted(8, 1_000_000)] = Field(256, description="longer texts are cut here, per model")
    batch_tokens: Annotated[int, counted(64)] = Field(
        2048, description="padded tokens of one forward batch (on a processor 512 at most)"
    )
    held_out: Annotated[float, Field(gt=0, lt=0.9)] = Field(
        0.2, description="share of the texts kept away from calibration, chosen by hash, for the verdict"
    )
    match_on: str | None = Field(
        None,
        description="another dataset, whose texts the neurons are matched on: in a language that both models read, "
        "where the target hardly reads the dataset's own",
    )
    rows: Literal["texts", "tokens", "last"] = Field(
        "texts",
        description="features are means over whole texts (the paper's), single tokens where both tokenizers agree, or "
        "the last of these in each text",
    )
    token_rows: Annotated[int, counted(64)] = Field(
        2000, description="with rows: tokens, how many in all, spread evenly over the texts"
    )
    choosing: Annotated[float, Field(gt=0, lt=0.9)] = Field(
        0.2, description="with fusion.alpha or fusion.ridge auto: share of the other texts that serve to choose these"
    )
