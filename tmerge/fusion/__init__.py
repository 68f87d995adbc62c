"""Neuron selection, what a transport makes of the selected neurons, and the fusion itself."""

from __future__ import annotations

from tmerge.fusion.carry import Carried, carry
from tmerge.fusion.maps import unit_factors
from tmerge.fusion.merge import (
    Alpha,
    NeuronSequence,
    TransportedNeurons,
    alpha_of,
    fuse,
    fused_neurons,
    layer_weights,
    read_neurons,
    transport_neurons,
)
from tmerge.fusion.selection import COLUMN_PROJECTIONS, neuron_count, neuron_side, select_neurons
from tmerge.fusion.stored import NeuronWriter, StoredNeurons

__all__ = [
    "COLUMN_PROJECTIONS",
    "Alpha",
    "Carried",
    "NeuronSequence",
    "NeuronWriter",
    "StoredNeurons",
    "TransportedNeurons",
    "alpha_of",
    "carry",
    "fuse",
    "fused_neurons",
    "layer_weights",
    "neuron_count",
    "neuron_side",
    "read_neurons",
    "select_neurons",
    "transport_neurons",
    "unit_factors",
]
