"""The parts of a report that say what went into a merge: models, texts, fusion; `tmerge.report.transport` has the rest.

The fields stand in the order in which they are written. What a part has besides them, as a later tmerge may write, is
kept as it is; what it lacks or has of another kind is said by `tmerge.report.read_report`, in one line.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, Strict, model_validator

if TYPE_CHECKING:
    from typing import Self  # of Python 3.11; 3.10 does not ask for it

__all__ = [
    "Calibration",
    "Choice",
    "FusedProjection",
    "Fusion",
    "Items",
    "JoinedAdapter",
    "Measured",
    "MergedModel",
    "OfBoth",
    "Part",
    "Projections",
    "SavedAdapter",
    "SeveralSource",
    "TrainingTexts",
    "Trial",
]

_Item = TypeVar("_Item")
# JSON knows lists only.
Items = Annotated[tuple[_Item, ...], Strict(False)]


class Part(BaseModel):
    """A part of a report; it is not changed once it is made."""

    model_config = ConfigDict(frozen=True, extra="allow", strict=True, ser_json_inf_nan="constants")

    def to_dict(self) -> dict[str, Any]:
        """As the document holds it: its keys and no others, in the order in which they are written.

        Numbers that are undefined are NaN or infinite here; `tmerge.documents.json_text` writes them as null.
        """
        return self.model_dump(mode="json", by_alias=True, exclude_unset=True)


class Measured(Part):
    """A value with its 95 % interval over texts, in bits per byte.

    Attributes:
        value: NaN where it is undefined.
        ci95: Lower and upper end.
    """

    value: float
    ci95: Annotated[tuple[float, float], Strict(False)]

    @property
    def low(self) -> float:
        """Lower end of the interval."""
        return self.ci95[0]

    @property
    def high(self) -> float:
        """Upper end of the interval."""
        return self.ci95[1]


class OfBoth(Part):
    """A count of the target's and one of the source's."""

    target: int
    source: int


class JoinedAdapter(Part):
    """A LoRA that was joined to a model, or whose changes alone were carried; as `CheckedAdapter`."""

    ref: str
    commit: str
    licence: str | None
    rank: int
    parameters: int
    base_commit: str
    left_out: Items[str] = ()


class MergedModel(Part):
    """One of the models that went into a merge.

    Attributes:
        ref: As it was asked for; of a model that an adapter is joined to, that of its base.
        commit: Of its repo; of local files ``sha256:`` and their digest, and so of a base and its adapter together.
        licence: As it states it; None where it states none.
        adapter: That is joined to it; None without one.
    """

    ref: str
    commit: str
    architecture: str
    parameters: int
    layers: int
    hidden_size: int
    licence: str | None
    adapter: JoinedAdapter | None = None

    @property
    def base_commit(self) -> str:
        """What identifies the model that it is named by, without an adapter."""
        return self.commit if self.adapter is None else self.adapter.base_commit

    @property
    def name(self) -> str:
        """The reference, with that of its adapter."""
        return self.ref if self.adapter is None else f"{self.ref} + {self.adapter.ref}"


class SavedAdapter(Part):
    """Of a merge that was written as a LoRA of its target.

    Attributes:
        rank: The highest of its modules'.
        modules: How many it changes.
        parameters: Numbers in its file.
    """

    rank: int
    modules: int
    parameters: int


class SeveralSource(Part):
    """One of several sources, as it went into a merge.

    Attributes:
        name: ``source 1``, as scores, strengths and notes name it.
        model: It; of an adapter, the base with that joined to it.
        weight: As the recipe has it.
        strength: That it was fused with: as chosen, or as the recipe has alpha.
        norm_ratio: Projection -> of each fused layer, norm of what was transported of it, at strength 1 and before it
            was joined, over the norm of the target's own; None where that is zero.
    """

    name: str
    model: MergedModel
    weight: float
    strength: float
    norm_ratio: Mapping[str, Items[float | None]]

    @property
    def reference(self) -> str:
        """The model's, or the adapter's."""
        return self.model.ref if self.model.adapter is None else self.model.adapter.ref


class Calibration(Part):
    """The texts that the merge read.

    Attributes:
        texts: How many were read for features.
        revision: Commit of a dataset on the Hub.
        sha256: Of the texts.
        choosing: Texts kept apart to choose on: alpha, and a reconstruction's ridges.
        other: Texts of `other_dataset` that the neurons were matched on in their place; 0 for none.
        file_sha256, other_sha256: Of local files.
        held_out_texts: Those that nothing but the scores has seen.
        tokens: That each model read.
        truncated: Texts that were cut.
    """

    texts: int
    dataset: str
    revision: str | None
    config: str | None
    split: str | None
    column: str | None
    read: int
    empty: int
    duplicates: int
    sha256: str
    choosing: int = 0
    prompts: int = 0
    other: int = 0
    other_dataset: str | None = None
    file_sha256: str | None = None
    other_sha256: str | None = None
    held_out_texts: int
    tokens: OfBoth
    truncated: OfBoth


class TrainingTexts(Part):
    """The texts of a training after the merge; as in `Calibration`.

    Attributes:
        kept: Texts of `kept_dataset` that were trained on too, so that the model stays as it is on them.
    """

    texts: int
    kept: int = 0
    kept_dataset: str | None = None
    held_out: int
    dataset: str
    revision: str | None
    config: str | None
    split: str | None
    column: str | None
    read: int
    empty: int
    duplicates: int
    sha256: str
    notes: Items[str]
    choosing: int = 0
    prompts: int = 0
    other: int = 0
    other_dataset: str | None = None
    file_sha256: str | None = None
    other_sha256: str | None = None


class Projections(Part):
    """Which projections were fused, which were asked for and skipped (with the reason), what was left alone."""

    fused: Items[str]
    skipped: Mapping[str, str]
    left_alone: Items[str]


class FusedProjection(Part):
    """What one projection's fusion came to.

    Attributes:
        layers: The target's.
        norm_ratio: Of each of them: norm of what was transported over the norm of its own, None where that is zero.
        neurons: Selected in each layer.
        of: So many.
        bias: What became of it.
    """

    layers: Annotated[Items[int], Field(min_length=1)]
    norm_ratio: Items[float | None]
    neurons: int
    of: int
    bias: str

    @model_validator(mode="after")
    def _one_a_layer(self) -> Self:
        if len(self.norm_ratio) != len(self.layers):
            raise ValueError("norm_ratio has to have one number for each of layers")
        return self


class Trial(Part):
    """An alpha that was tried for a group of projections, or for sources, on so many of the choosing texts."""

    group: Items[str]
    alpha: float
    gain: Measured
    texts: int


class Choice(Part):
    """What ``alpha: auto`` chose: projection, or source of several -> alpha; how it compares on the choosing texts."""

    alpha: Mapping[str, float]
    difference: Measured
    trials: Items[Trial]
    texts: int


class ReconstructionFit(Part):
    """How the target's blocks were fitted.

    Attributes:
        ridge: How much a fit was held back; ``auto`` where each fit's was chosen.
        ridges: Projection -> per fitted layer, how much its fit was held back.
        rank: Most of each change; None for full.
        rows: Tokens that were fitted on.
        final_goal: What the last block was fitted to: the source's logits through the target's own head, or its stream.
        keep: The dataset on which the target goes on doing what it does; None without one.
        keep_texts: Of it.
        errors: Projection -> per fitted layer, ``|Y - X W^T|^2 / |Y|^2`` before and after; None where Y is zero.
    """

    ridge: float | Literal["auto"]
    ridges: Mapping[str, Items[float]] = Field(default_factory=dict)
    rank: int | None
    rows: int
    final_goal: Literal["logits", "stream"] = "stream"  # what it was before it was written down
    keep: str | None
    keep_texts: int
    errors: Mapping[str, Items[Items[float | None]]]


class Fusion(Part):
    """What was fused, and how strongly.

    Attributes:
        alpha: As the recipe asks for it.
        scale: Of the maps that weights are carried through; None where weights were fitted, and so are the next two.
        units: Whether activations' sizes were matched.
        top_k: Neurons of a projection and layer: a count, or a share.
        stream: What else was carried: embeddings, head and norms.
        fit: Of a reconstruction; None otherwise.
        fit_seconds: That the fits took, in all calls, and without those of the controls; None otherwise.
        choice: Of ``alpha: auto``; None otherwise.
        join: How several sources were joined; None of one.
        density: Share of each source's entries that this kept; None where it kept all.
    """

    what: str
    alpha: float | Literal["auto"]
    scale: str | None = None
    units: str | None = None
    top_k: int | float | None = None
    projections: Annotated[Mapping[str, FusedProjection], Field(min_length=1)]
    stream: Items[str] = ()
    fit: ReconstructionFit | None = None
    fit_seconds: float | None = None
    choice: Choice | None = None
    join: str | None = None
    density: float | None = None

    @property
    def alpha_used(self) -> float | Mapping[str, float]:
        """The alpha that the neurons were written with; one for each projection, or source, where it was chosen."""
        if self.choice is not None:
            return self.choice.alpha
        assert self.alpha != "auto"  # its run chooses
        return self.alpha

    @model_validator(mode="after")
    def _auto_has_chosen(self) -> Self:
        if self.alpha == "auto" and self.choice is None:
            raise ValueError("alpha is auto, so there has to be a choice")
        return self
