"""The section ``save``: how the checkpoint is written. It changes no weight."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import Field, field_validator

from tmerge.recipe.section import Section

__all__ = ["SaveSettings"]

_SIZE = re.compile(r"(\d{1,15}(?:\.\d{1,15})?)\s*([KMGT]B)", re.IGNORECASE)
_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}


class SaveSettings(Section):
    """How the checkpoint is written."""

    form: Literal["merged", "adapter"] = Field(
        "merged",
        description="merged: a whole checkpoint; adapter: a LoRA of the target (PEFT), of what is changed alone",
    )
    max_shard_size: Annotated[int, Field(ge=1, le=10**15)] | str = Field(
        "5GB", description="largest weights file of the checkpoint: 5GB, 500MB, or a number of bytes"
    )
    language: tuple[Annotated[str, Field(pattern=r"^([a-z]{2,3}|multilingual|code)$")], ...] = Field(
        (), description="for the model card, as ISO 639 codes (id, ms, yue); the built-in samples know their own"
    )

    @field_validator("max_shard_size", mode="after")
    @classmethod
    def _is_a_size(cls, value: int | str) -> int | str:
        # As huggingface_hub reads it when the checkpoint is written, after all other stages.
        size = _SIZE.fullmatch(value.strip()) if isinstance(value, str) else None
        if isinstance(value, str) and (size is None or float(size[1]) * _UNITS[size[2].upper()] < 1):
            raise ValueError("write it as 5GB or 500MB (TB, GB, MB or KB), or as a number of bytes")
        return value

    @property
    def shard_bytes(self) -> float:
        """The size in bytes, however it is written."""
        if isinstance(self.max_shard_size, int):
            return self.max_shard_size
        size = _SIZE.fullmatch(self.max_shard_size.strip())
        assert size is not None  # or it would have been refused
        return float(size[1]) * _UNITS[size[2].upper()]
