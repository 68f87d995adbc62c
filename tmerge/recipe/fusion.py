"""The section ``fusion``: what is written into the target (Eq. 14, A.5), of three kinds with defaults of their own.

The defaults of weights are the paper's. Those of a task vector are what was measured best on models that are related,
and no worse than nothing elsewhere: see docs/experiments.md.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, Tag, field_validator, model_validator

from tmerge.recipe.section import ProjectionName, Section, chosen_by, counted

__all__ = ["CarriedSettings", "FusionSettings", "Reconstruction", "TaskVector", "Weights"]

_WHAT = (
    "weights: the source's; task-vector: what it learned since `source_base`; reconstruct: what its neurons do, fitted "
    "to what the target's read"
)
_ALPHA = "fusion strength; auto chooses it per projection group, 0 included, on texts kept for that"
_ALPHAS = "what alpha: auto tries beside 0"
_TOP_K = "neurons selected per projection and layer: a count, or a fraction such as 0.1"
_PROJECTIONS = "sublayers that are fused"

_TopK = Annotated[int, Field(ge=1)] | Annotated[float, Field(gt=0, le=1)]


class _Fused(Section):
    """What all kinds have."""

    what: Literal["weights", "task-vector", "reconstruct"]
    alpha: float | Literal["auto"]
    alphas: tuple[float, ...]
    projections: tuple[ProjectionName, ...]

    @field_validator("projections")
    @classmethod
    def _some_and_distinct(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if not value or len(set(value)) != len(value):
            raise ValueError("name at least one projection, each once")
        return value

    @property
    def carries_stream(self) -> bool:
        """Whether embeddings and norms are carried as well."""
        return False

    @property
    def chosen(self) -> tuple[str, ...]:
        """Keys whose values are chosen on texts that are kept for it."""
        return ("fusion.alpha",) if self.alpha == "auto" else ()

    @property
    def kept_on(self) -> str | None:
        """The dataset of texts on which the target is to stay as it is; None without one."""
        return None


class _Carried(_Fused):
    """What those have that carry weights."""

    scale: Literal["barycentric", "literal", "row-norm"]
    units: Literal["none", "layer", "feature"] = Field(
        "none", description="match the sizes of the two models' activations: not, one factor a layer, or per feature"
    )
    top_k: _TopK
    affine: bool = Field(
        False, description="the features' means go into the biases: maps carry deviations (where the target has biases)"
    )
    biases: bool = Field(True, description="fuse the biases of these projections as well, where both models have them")

    @model_validator(mode="after")
    def _affine_has_biases(self) -> _Carried:
        if self.affine and not self.biases:
            raise ValueError("fusion.affine writes into biases, and fusion.biases is off; set one of them otherwise")
        return self


class Weights(_Carried):
    """The source's weights, interpolated with the target's (Eq. 14, A.5)."""

    beside: ClassVar[dict[str, dict[str, Any]]] = {"transport": {"structure": "none"}}
    """Section -> key -> what goes with this kind of fusion in the other sections, where a recipe does not say it."""

    what: Literal["weights"] = Field("weights", description=_WHAT)
    # A weight is interpolated, and past 1 it would extrapolate.
    alpha: Annotated[float, Field(ge=0, le=1)] | Literal["auto"] = Field("auto", description=_ALPHA)
    alphas: tuple[Annotated[float, Field(gt=0, le=1)], ...] = Field(
        (0.01, 0.03, 0.1, 0.3, 1.0), min_length=1, description=_ALPHAS
    )
    scale: Literal["barycentric", "literal", "row-norm"] = Field(
        "barycentric", description="barycentric: maps that average; literal: the paper's; row-norm: as large as the row"
    )
    top_k: _TopK = Field(128, description=_TOP_K)
    projections: tuple[ProjectionName, ...] = Field(("q", "k", "v", "o"), description=_PROJECTIONS)


class TaskVector(_Carried):
    """What the source learned since `source_base`, added to the target."""

    beside: ClassVar[dict[str, dict[str, Any]]] = {
        "calibration": {"rows": "tokens", "match_on": "samples:english"},
        "transport": {"structure": "shared"},
    }
    """As `Weights.beside`."""

    what: Literal["task-vector"] = Field("task-vector", description=_WHAT)
    # It may be overshot on purpose.
    alpha: Annotated[float, Field(ge=0)] | Literal["auto"] = Field("auto", description=_ALPHA)
    alphas: tuple[Annotated[float, Field(gt=0)], ...] = Field((0.3, 0.5, 1.0, 1.5), min_length=1, description=_ALPHAS)
    # No row-norm: it would make what was learned as long as the target's own rows.
    scale: Literal["barycentric", "literal"] = Field(
        "barycentric", description="barycentric: maps that average; literal: the paper's"
    )
    top_k: _TopK = Field(1.0, description=_TOP_K)
    projections: tuple[ProjectionName, ...] = Field(
        ("q", "k", "v", "o", "gate", "up", "down"), description=_PROJECTIONS
    )
    stream: bool = Field(
        True,
        description="norms too (of q and k, where these are among projections), and where the vocabulary is shared "
        "embeddings and head; needs structure: shared and map: plan, and is false by itself without them, and with "
        "save.form: adapter",
    )
    rank: Annotated[int, counted(1, 1_000_000)] | None = Field(
        None, description="most of each carried change, the nearest of that rank; as it comes if left out"
    )
    join: Literal["sum", "ties", "dare"] = Field(
        "sum",
        description="with several sources: their sum, or of the entries that are left of each (density) those of the "
        "elected sign, averaged (ties), or the sum of what is drawn by lot, made larger for what is not (dare)",
    )
    density: Annotated[float, Field(gt=0, le=1)] = Field(
        0.5, description="share of a source's entries that ties (the largest) and dare (drawn by lot) keep"
    )

    @property
    def carries_stream(self) -> bool:
        """Whether embeddings and norms are carried as well."""
        return self.stream


class Reconstruction(_Fused):
    """What the source's neurons do, fitted in closed form to what the target's own read, block by block."""

    beside: ClassVar[dict[str, dict[str, Any]]] = {
        "calibration": {"rows": "tokens", "match_on": "samples:english"},
        "transport": {"structure": "shared"},
        "compare": {"rows": ["sft", "sft+time", "fused+sft"]},
    }
    """As `Weights.beside`."""

    what: Literal["reconstruct"] = Field("reconstruct", description=_WHAT)
    # A step towards a fit; past it lies nothing that was fitted.
    alpha: Annotated[float, Field(ge=0, le=1)] | Literal["auto"] = Field("auto", description=_ALPHA)
    alphas: tuple[Annotated[float, Field(gt=0, le=1)], ...] = Field(
        (0.25, 0.5, 0.75, 1.0), min_length=1, description=_ALPHAS
    )
    projections: tuple[ProjectionName, ...] = Field(
        ("q", "k", "v", "o", "gate", "up", "down"), description=_PROJECTIONS
    )
    ridge: Annotated[float, Field(gt=0)] | Literal["auto"] = Field(
        "auto",
        description="how much a fit is held back, in units of its inputs' mean square; auto chooses it for each, on "
        "texts kept for that",
    )
    ridges: tuple[Annotated[float, Field(gt=0)], ...] = Field(
        (0.01, 0.1, 1.0), min_length=1, description="what ridge: auto tries"
    )
    rank: Annotated[int, counted(1, 1_000_000)] | None = Field(
        None, description="most of each fitted change; full if left out"
    )
    final_goal: Literal["logits", "stream"] = Field(
        "logits",
        description="what the last block is fitted to: the source's logits through the target's own head, where the "
        "vocabulary is shared, or the source's residual stream",
    )
    keep: str | None = Field(
        "samples:english", description="texts on which the target goes on doing what it does: as calibration.dataset"
    )
    keep_texts: Annotated[int, counted(1)] = Field(
        200, description="of them, at most; the held-out share of them is scored, the others are fitted on"
    )
    keep_share: Annotated[float, Field(gt=0, lt=1)] = Field(
        0.5, description="of a fit's weight, that of all their tokens together"
    )

    @property
    def chosen(self) -> tuple[str, ...]:
        """As `_Fused.chosen`."""
        return (*super().chosen, *(("fusion.ridge",) if self.ridge == "auto" else ()))

    @property
    def tried_ridges(self) -> tuple[float, ...]:
        """Those of which each fit takes the one that does best on texts it was not fitted on."""
        return self.ridges if self.ridge == "auto" else (self.ridge,)

    @property
    def kept_on(self) -> str | None:
        """As `_Fused.kept_on`."""
        return self.keep


CarriedSettings = Weights | TaskVector
"""Those kinds that carry weights through a transport."""

FusionSettings = Annotated[
    Annotated[Weights, Tag("weights")]
    | Annotated[TaskVector, Tag("task-vector")]
    | Annotated[Reconstruction, Tag("reconstruct")],
    chosen_by("what"),
]
