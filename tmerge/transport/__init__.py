"""Optimal transport between two models' features: costs, potentials, plans, and the one result of every solver."""

from __future__ import annotations

from tmerge.transport.agreement import COMPARED_WEIGHTS, ReadWeight, WeightAgreement
from tmerge.transport.apart import apart_transport, layer_maps, layer_plans, read_apart, solve_apart
from tmerge.transport.cost import correlation_cost, standardise
from tmerge.transport.heads import Heads
from tmerge.transport.layers import (
    PAIRING_NEURONS,
    PAIRING_ROWS,
    PAIRING_WEIGHTS,
    ComparedLayers,
    compare_layers,
    nearest_cost,
)
from tmerge.transport.maps import phi_in, phi_out
from tmerge.transport.matching import Correspondence, Solver, match
from tmerge.transport.neurons import match_neurons, match_stream
from tmerge.transport.order import in_order
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
from tmerge.transport.record import PlanRecorder, TransportRecord, recorded_layer_maps, recorded_transport
from tmerge.transport.relatedness import ASKED_LAYERS, ASKED_NEURONS, Relatedness, relatedness
from tmerge.transport.result import FeatureLayers, FeatureMap, LayerMap, Problems, Transport
from tmerge.transport.shared import paired_layer_maps, paired_layers, read_shared, shared_transport, solve_shared
from tmerge.transport.sides import HEAD_KEYS, STREAM_KEYS, Heard, Side, feature_keys
from tmerge.transport.sinkhorn import SinkhornResult, plan_from_potentials, sinkhorn
from tmerge.transport.sparse import MASS_AT, SparsePlans, mass_of_top, sparsify
from tmerge.transport.statistics import FeatureStatistics, Statistics
from tmerge.transport.structure import Structure, find_structure
from tmerge.transport.workers import in_turn, one_thread_each

__all__ = [
    "ASKED_LAYERS",
    "ASKED_NEURONS",
    "COMPARED_WEIGHTS",
    "HEAD_KEYS",
    "MASS_AT",
    "PAIRING_NEURONS",
    "PAIRING_ROWS",
    "PAIRING_WEIGHTS",
    "STREAM_KEYS",
    "ComparedLayers",
    "Correspondence",
    "FeatureLayers",
    "FeatureMap",
    "FeaturePlans",
    "FeatureStatistics",
    "Heads",
    "Heard",
    "LayerMap",
    "LayerPlan",
    "PlanRecorder",
    "Problems",
    "ReadWeight",
    "Relatedness",
    "Side",
    "SinkhornResult",
    "Solver",
    "SparsePlans",
    "Statistics",
    "Structure",
    "Transport",
    "TransportRecord",
    "WeightAgreement",
    "apart_transport",
    "compare_layers",
    "correlation_cost",
    "couple_layers",
    "effective_weights",
    "feature_keys",
    "feature_plan",
    "find_structure",
    "in_order",
    "in_turn",
    "keep_layers",
    "layer_maps",
    "layer_plans",
    "load_plans",
    "mass_of_top",
    "match",
    "match_neurons",
    "match_stream",
    "mutual_top",
    "nearest_cost",
    "one_thread_each",
    "paired_layer_maps",
    "paired_layers",
    "phi_in",
    "phi_out",
    "plan_from_potentials",
    "read_apart",
    "read_shared",
    "recorded_layer_maps",
    "recorded_transport",
    "relatedness",
    "save_plans",
    "shared_transport",
    "sinkhorn",
    "solve_apart",
    "solve_features",
    "solve_layers",
    "solve_shared",
    "sparsify",
    "standardise",
    "working_dtype",
]
