"""Maps from plans, neuron selection, and the fusion itself."""

from __future__ import annotations

from tmerge.fusion.carry import Carried, carry
from tmerge.fusion.coupling import Coupling, coupling_tensors, couplings, layer_plans
from tmerge.fusion.inputs import FusionInputs, layers_with, recorded_inputs, solved_inputs, structured_inputs
from tmerge.fusion.maps import FeatureStatistics, phi_in, phi_out, unit_factors
from tmerge.fusion.merge import (
    Alpha,
    TransportedNeurons,
    alpha_of,
    fuse,
    fused_neurons,
    layer_weights,
    load_transported,
    read_neurons,
    save_transported,
    transport_neurons,
)
from tmerge.fusion.pairs import Pairs, PlanPair, RecordedPairs, SolvedPairs, Statistics, recorded_couplings
from tmerge.fusion.record import MASS_AT, SparsePlans, TransportRecord, mass_of_top, sparsify
from tmerge.fusion.selection import COLUMN_PROJECTIONS, neuron_count, neuron_side, select_neurons
from tmerge.fusion.structured import paired_couplings, paired_layers

__all__ = [
    "COLUMN_PROJECTIONS",
    "MASS_AT",
    "Carried",
    "Coupling",
    "FeatureStatistics",
    "FusionInputs",
    "Pairs",
    "PlanPair",
    "RecordedPairs",
    "SolvedPairs",
    "SparsePlans",
    "Statistics",
    "TransportRecord",
    "Alpha",
    "TransportedNeurons",
    "alpha_of",
    "carry",
    "coupling_tensors",
    "couplings",
    "fuse",
    "fused_neurons",
    "layer_plans",
    "layer_weights",
    "layers_with",
    "load_transported",
    "mass_of_top",
    "neuron_count",
    "neuron_side",
    "paired_couplings",
    "paired_layers",
    "phi_in",
    "phi_out",
    "read_neurons",
    "recorded_couplings",
    "recorded_inputs",
    "save_transported",
    "select_neurons",
    "solved_inputs",
    "sparsify",
    "structured_inputs",
    "transport_neurons",
    "unit_factors",
]
