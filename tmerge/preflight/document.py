"""What a check found, as it is printed, shown and handed from one process to another: typed, and JSON when written."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict

from tmerge.models import OutputLicence

__all__ = [
    "CheckDocument",
    "CheckedModel",
    "Expected",
    "FittingFlavor",
    "ForEach",
    "Matched",
    "RemoteFlavors",
    "Sizes",
]


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


class FittingFlavor(_Frozen):
    """A machine of Hugging Face Jobs; as in `tmerge.preflight.hardware.Flavor`.

    Attributes:
        price_class: Its kind in words: ``CPU``, ``small card``.
        dollars_an_hour: As they were read; None where they were not.
    """

    name: str
    price_class: str
    dollars_an_hour: float | None
    memory_bytes: int
    cards: int
    card_bytes: int

    @property
    def words(self) -> str:
        """``l4x1 (small card, $0.80 an hour)``."""
        price = "" if self.dollars_an_hour is None else f", ${self.dollars_an_hour:.2f} an hour"
        return f"{self.name} ({self.price_class}{price})"


class RemoteFlavors(_Frozen):
    """Where a run fits on the Hub's hardware.

    Attributes:
        smallest: The cheapest that has the memory and the disk, or the smallest where a price is missing; None if none
            has.
        with_card: The same of those with an accelerator.
        cards_asked: Whether the recipe's device leaves it to run on one.
        source, read_on, is_live: As in `tmerge.preflight.hardware.Offer`.
    """

    smallest: FittingFlavor | None
    with_card: FittingFlavor | None
    cards_asked: bool
    source: str
    read_on: str
    is_live: bool

    @property
    def words(self) -> str:
        """In one line."""
        asked = "now" if self.is_live else f"on {self.read_on}"
        listed = f"as {self.source} listed them {asked}"
        if self.smallest is None:
            return f"none of Hugging Face Jobs' flavors has the memory and the disk for it, {listed}"
        also = ""
        if not self.smallest.cards and self.cards_asked:
            also = f"; with a card {'none' if self.with_card is None else self.with_card.words}"
        return f"the smallest flavor of Hugging Face Jobs that it fits: {self.smallest.words}{also}; {listed}"


class CheckDocument(_Frozen):
    """All of it, in the order in which it is written.

    `source` is the base of `sources`, where there are several; of what is not asked for, `flavors` is None.
    """

    target: CheckedModel
    source: CheckedModel
    source_base: CheckedModel | None
    sources: list[CheckedModel] = []
    projections: Matched
    left_alone: ForEach
    licence: OutputLicence
    notes: list[str]
    estimate: Expected
    flavors: RemoteFlavors | None = None

    def to_dict(self) -> dict[str, Any]:
        """As ``tmerge check --json`` prints it."""
        return self.model_dump(mode="json")
