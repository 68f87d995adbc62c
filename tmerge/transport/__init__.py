"""Optimal transport between two models' features: costs, potentials, feature plans and layer plans."""

from __future__ import annotations

from tmerge.transport.cost import correlation_cost, standardise
from tmerge.transport.plans import (
    FeaturePlans,
    LayerPlan,
    couple_layers,
    effective_weights,
    feature_plan,
    keep_layers,
    load_plans,
    mutual_top,
    one_thread_each,
    save_plans,
    solve_features,
    solve_layers,
    working_dtype,
)
from tmerge.transport.sinkhorn import SinkhornResult, plan_from_potentials, sinkhorn

__all__ = [
    "FeaturePlans",
    "LayerPlan",
    "SinkhornResult",
    "correlation_cost",
    "couple_layers",
    "effective_weights",
    "feature_plan",
    "keep_layers",
    "load_plans",
    "mutual_top",
    "one_thread_each",
    "plan_from_potentials",
    "save_plans",
    "sinkhorn",
    "solve_features",
    "solve_layers",
    "standardise",
    "working_dtype",
]
