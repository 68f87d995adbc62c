"""What a check found, as it is printed, shown and handed from one process to another: typed, and JSON when written."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict

from tmerge.models import OutputLicence

__all__ = ["CheckDocument", "CheckedModel", "Expected", "ForEach", "Matched", "Sizes"]


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True)


class CheckedAdapter(_Frozen):
    """A LoRA.

    Attributes:
        ref: As it was asked for.
        commit: Of its repo; of a folder ``sha256:`` and the digest of its files.
        licence: As it states it; None where it states none.
        rank: The highest of its changes.
        parameters: How many of its base's it changes.
        base_commit: What identifies its base.
        left_out: What it changes, and a merge leaves behind, where its changes alone are carried.
    """

    ref: str
    commit: str
    licence: str | None
    rank: int
    parameters: int
    base_commit: str
    left_out: list[str] = []


class CheckedModel(_Frozen):
    """One of the models.

    Attributes:
        ref: As it was asked for.
        commit: Of its repo; of local files ``sha256:`` and their digest; None where it has none.
        licence: As it states it; None where it states none.
        stored, download_bytes: As in `tmerge.models.ModelFacts`.
        adapter: What is joined to it when it is read; all else but the commit is its base's.
    """

    ref: str
    commit: str | None
    architecture: str
    parameters: int
    layers: int
    hidden_size: int
    licence: str | None
    weight_bytes: int
    heads: int
    kv_heads: int
    gated: bool
    private: bool
    stored: dict[str, int] | None
    download_bytes: int | None
    tied_embeddings: bool
    adapter: CheckedAdapter | None = None

    @property
    def name(self) -> str:
        """The reference, with that of its adapter."""
        return self.ref if self.adapter is None else f"{self.ref} + {self.adapter.ref}"


class Sizes(_Frozen):
    """(out, in) of a projection in each model's first layer that has it."""

    target: tuple[int, int]
    source: tuple[int, int]


class Matched(_Frozen):
    """Projections that both have and the recipe wants, and why others are left out."""

    matched: dict[str, Sizes]
    skipped: dict[str, str]


class ForEach(_Frozen):
    """What is left alone in each model, a line each."""

    target: list[str]
    source: list[str]


class Expected(_Frozen):
    """What the merge will take here; as in `Estimate`."""

    seconds: float
    range_seconds: tuple[float, float]
    stages: dict[str, float]
    time: str
    operations: float
    memory_bytes: int
    disk_bytes: int
    download_bytes: int
    assumes: str
    measured: list[str]


class CheckDocument(_Frozen):
    """All of it, in the order in which it is written; `source` is the base of `sources`, where there are several."""

    target: CheckedModel
    source: CheckedModel
    source_base: CheckedModel | None
    sources: list[CheckedModel] = []
    projections: Matched
    left_alone: ForEach
    licence: OutputLicence
    notes: list[str]
    estimate: Expected

    def to_dict(self) -> dict[str, Any]:
        """As ``tmerge check --json`` prints it."""
        return self.model_dump(mode="json")
