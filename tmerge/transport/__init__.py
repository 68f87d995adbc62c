"""Optimal transport between two models' features: costs, potentials, feature plans and layer plans."""

from __future__ import annotations

from tmerge.transport.cost import correlation_cost, standardise
from tmerge.transport.heads import Heads
from tmerge.transport.matching import Correspondence, couple, match
from tmerge.transport.order import in_order, nearest_cost
from tmerge.transport.plans import (
    FeaturePlans,
    LayerPlan,
    couple_layers,
    effective_weights,
    feature_plan,
    keep_layers,
    load_plans,
    mutual_top,
    save_plans,
    solve_features,
    solve_layers,
    working_dtype,
)
from tmerge.transport.relatedness import Relatedness, relatedness
from tmerge.transport.sinkhorn import SinkhornResult, plan_from_potentials, sinkhorn
from tmerge.transport.structure import STREAM_KEYS, Side, Structure, pair_layers, solve_structure
from tmerge.transport.workers import in_turn, one_thread_each

__all__ = [
    "STREAM_KEYS",
    "Correspondence",
    "FeaturePlans",
    "Heads",
    "LayerPlan",
    "Relatedness",
    "Side",
    "SinkhornResult",
    "Structure",
    "correlation_cost",
    "couple",
    "couple_layers",
    "effective_weights",
    "feature_plan",
    "in_order",
    "in_turn",
    "keep_layers",
    "load_plans",
    "match",
    "mutual_top",
    "nearest_cost",
    "one_thread_each",
    "pair_layers",
    "plan_from_potentials",
    "relatedness",
    "save_plans",
    "sinkhorn",
    "solve_features",
    "solve_layers",
    "solve_structure",
    "standardise",
    "working_dtype",
]
