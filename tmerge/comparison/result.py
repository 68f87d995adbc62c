"""compare.json: what a comparison found, typed, and validated where it is read."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, Strict, model_validator

from tmerge.comparison.scores import Compared, TaskResult
from tmerge.errors import ComparisonError
from tmerge.report import Calibration, Choice, Descent, DocumentKind, Items, Measured, MergedModel, Part

if TYPE_CHECKING:
    from typing import Self  # of Python 3.11; 3.10 does not ask for it

__all__ = ["SCHEMA", "Added", "Comparison", "Published", "Row", "Seed", "SeedValue", "read_comparison"]

SCHEMA = 1


class SeedValue(Part):
    """What one seed gave."""

    seed: int
    value: float


class Seed(SeedValue):
    """A training: its bits per byte, and (step, loss) pairs."""

    loss: Items[Annotated[tuple[int, float], Strict(False)]]


class Row(Part):
    """A model that was scored, the seeds of a training averaged text by text.

    Attributes:
        name: ``base``, ``fused``, ``fused, alpha 0.1``, ``fused+sft``, ...
        kind: What it is shown under.
        tokens: Trained on; 0 of what was not trained.
        steps: Likewise.
        alpha: Of a sweep.
        of: Of a sweep, what was fused at that alpha; of another source, which.
        seconds: To make it; the mean over seeds.
        value: Bits per byte on the held-out texts.
        ci95: Its 95 % interval over texts.
        difference: To the base, paired by text; None of the base itself.
        domains: Further domain -> bits per byte there.
        tasks: Benchmark task -> result.
        seeds: Of a training.
    """

    name: str
    kind: Literal["reference", "still", "sweep", "source", "trained"]
    tokens: int
    steps: int
    alpha: float | None = None
    of: str | None = None
    seconds: float
    value: float
    ci95: Annotated[tuple[float, float], Strict(False)]
    difference: Measured | None = None
    domains: Mapping[str, Compared]
    tasks: Mapping[str, TaskResult] = Field(default_factory=dict)
    seeds: Items[Seed] = ()

    @model_validator(mode="after")
    def _has_what_its_kind_has(self) -> Self:
        if self.kind == "sweep" and None in (self.alpha, self.of):
            raise ValueError("a row of a sweep has to have alpha and of")
        if self.kind == "trained" and not self.seeds:
            raise ValueError("a trained row has to have seeds")
        return self

    @property
    def score(self) -> Measured:
        """Bits per byte with their interval."""
        return Measured(value=self.value, ci95=self.ci95)


class Added(Measured):
    """What a merge adds to a training: bits per byte with it minus those without, paired by text.

    Attributes:
        row: With the merge: ``fused+sft``.
        to: Without: ``sft``.
        seeds: The same difference, seed by seed.
    """

    row: str
    to: str
    seeds: Items[SeedValue]


class Published(Part):
    """What the paper reports for a preset's pair.

    Attributes:
        scores: Benchmark -> base, fused without adaptation, fused with adaptation.
        by_source: Size of the source -> benchmark -> fused with adaptation.
    """

    table: str
    metric: str
    scores: Mapping[str, Items[float]]
    by_source: Mapping[str, Mapping[str, float]] = Field(default_factory=dict)


class Comparison(Part):
    """compare.json.

    Attributes:
        texts: Held-out ones that every row was scored on.
        alpha: That fused rows were made with; one for each projection where it was chosen.
        choice: Of ``alpha: auto``; None otherwise.
        descent: Whether the merge points where the loss falls.
        adaptation: The recipe's section.
        data: Domain's reference or task's file -> what identified its contents.
        rows: The base first.
        added: What the merge adds to each training.
    """

    schema_number: Literal[1] = Field(alias="schema")
    metric: str
    texts: int
    target: MergedModel
    source: MergedModel
    calibration: Calibration
    alpha: float | Mapping[str, float]
    choice: Choice | None = None
    descent: Descent
    adaptation: Mapping[str, Any]
    data: Mapping[str, str] = Field(default_factory=dict)
    rows: Annotated[Items[Row], Field(min_length=1)]
    added: Items[Added]
    published: Published | None = None
    versions: Mapping[str, str]

    @model_validator(mode="after")
    def _scored_alike(self) -> Self:
        base, *others = self.rows
        if base.difference is not None or any(row.difference is None for row in others):
            raise ValueError("every row but the first, the base, has to have its difference to it")
        for row in others:
            if row.domains.keys() != base.domains.keys() or row.tasks.keys() != base.tasks.keys():
                raise ValueError("every row has to have the domains and tasks of the first")
        return self


_COMPARISONS = DocumentKind(
    Comparison, SCHEMA, "comparison", ComparisonError, "run `tmerge compare` again with the same recipe and --out"
)


def read_comparison(path: Path) -> Comparison:
    """A comparison from its compare.json.

    Raises:
        ComparisonError: It cannot be read, is no JSON, or is not a comparison of this schema.
    """
    return _COMPARISONS.read(path)
