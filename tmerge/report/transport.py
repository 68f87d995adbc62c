"""The parts of a report that say how the transport was solved, and whether the two models correspond at all."""

from __future__ import annotations

from collections.abc import Mapping

from tmerge.report.parts import Items, Part

__all__ = ["Iterations", "Relatedness", "Transport", "WeightAgreement"]


class Iterations(Part):
    """Sinkhorn sweeps of the feature plans."""

    median: int | float
    max: int


class WeightAgreement(Part):
    """How alike the weights of the two models' layers are, as `tmerge.transport.WeightAgreement`."""

    paired: float
    chance: float
    moved_layers: int
    clear: bool


class Relatedness(Part):
    """Shares of the target's neurons, 0 to 1, as `tmerge.transport.Relatedness`; earlier reports asked all neurons.

    Attributes:
        weights: Of the weights, where neurons were matched by them too.
    """

    value: float
    ci95: Items[float] | None = None
    permuted: float
    stream: float
    mlp: float | None
    rows: int
    neurons: int | None = None
    weights: WeightAgreement | None = None


class Transport(Part):
    """How the plans were solved.

    Attributes:
        problems: Feature plans, or correspondences.
        converged: Those that reached the tolerance.
        seconds: Of the stage.
        eta: Of the layer plans; it, `layer_cost` and `layer_marginals` are None of a shared structure.
        eta_used: Feature key -> eta of its layer plan.
        weights: Whether neurons were matched by their weights too, beside their activations.
        in_place: Share of the target's neurons that are matched with the source's of the same number, where both models
            are of one shape; None elsewhere.
        relatedness: None where it cannot be asked.
    """

    problems: int
    iterations: Iterations
    worst_marginal_violation: float
    converged: int
    seconds: float
    epsilon: float
    eta: float | None = None
    eta_used: Mapping[str, float]
    layer_cost: str | None = None
    layer_marginals: str | None = None
    layer_plans_converged: bool
    rows: str = "texts"
    structure: str = "none"
    matching: str = "entropic"
    weights: bool = False
    signed: bool = False
    map: str = "plan"
    relatedness: Relatedness | None = None
    in_place: float | None = None
