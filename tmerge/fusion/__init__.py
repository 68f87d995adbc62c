"""Neuron selection, what a transport makes of the selected neurons, and the fusion itself."""

from __future__ import annotations

from tmerge.fusion.block_fit import BlockNote, FittedBlock
from tmerge.fusion.carry import Carried, carry, norm_ratio
from tmerge.fusion.joining import Join, JoinedNeurons, SourcePart, trimmed
from tmerge.fusion.logit_goal import FinalGoal
from tmerge.fusion.maps import unit_factors
from tmerge.fusion.merge import (
    Alpha,
    NeuronSequence,
    TransportedNeurons,
    alpha_of,
    fuse,
    fused_neurons,
    layer_weights,
    places_of,
    read_neurons,
    transport_neurons,
)
from tmerge.fusion.module_change import changed_together, module_change, unchanged_modules
from tmerge.fusion.passage import Passage
from tmerge.fusion.projection import goal_factor, score_factor
from tmerge.fusion.reconstruct import reconstruct
from tmerge.fusion.seeded import generator_for
from tmerge.fusion.selection import COLUMN_PROJECTIONS, neuron_count, neuron_side, select_neurons
from tmerge.fusion.stored import NeuronWriter, StoredNeurons, is_stored

__all__ = [
    "COLUMN_PROJECTIONS",
    "Alpha",
    "BlockNote",
    "Carried",
    "FinalGoal",
    "FittedBlock",
    "Join",
    "JoinedNeurons",
    "NeuronSequence",
    "NeuronWriter",
    "Passage",
    "SourcePart",
    "StoredNeurons",
    "TransportedNeurons",
    "alpha_of",
    "carry",
    "changed_together",
    "fuse",
    "fused_neurons",
    "generator_for",
    "is_stored",
    "layer_weights",
    "module_change",
    "neuron_count",
    "neuron_side",
    "norm_ratio",
    "places_of",
    "read_neurons",
    "reconstruct",
    "goal_factor",
    "score_factor",
    "select_neurons",
    "transport_neurons",
    "trimmed",
    "unchanged_modules",
    "unit_factors",
]
