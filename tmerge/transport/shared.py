"""One correspondence for a whole model (`tmerge.transport.structure`) as a transport.

One source layer feeds each target layer, with all of the weight. The layer plan that is recorded is that pairing, with
uniform mass over the target's layers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median

import torch

from tmerge.errors import UnsupportedModelError
from tmerge.models import feature_key
from tmerge.processes import ALONE, Processes
from tmerge.recipe import Shared
from tmerge.transport.matching import Solver
from tmerge.transport.plans import mutual_top
from tmerge.transport.result import FeatureLayers, FeatureMap, LayerMap, Problems, Transport, Wanted
from tmerge.transport.rivals import with_fitted_maps
from tmerge.transport.sides import Heard, Read, Side, feature_keys
from tmerge.transport.sparse import sparse_plan
from tmerge.transport.statistics import Statistics, measured
from tmerge.transport.structure import Structure, find_structure

__all__ = ["paired_layer_maps", "paired_layers", "read_shared", "shared_transport", "solve_shared"]


def solve_shared(
    target: Side,
    source: Side,
    projections: Sequence[str],
    settings: Shared,
    path: Path,
    *,
    heard: Heard | None = None,
    processes: Processes = ALONE,
) -> Transport:
    """Pair the layers, solve the structure, and keep it.

    Args:
        target: The target's features.
        source: The source's, of the same texts.
        projections: To be carried.
        settings: The recipe's section.
        path: Where the structure is written, for `read_shared`.
        heard: Hears of every target layer.
        processes: Among whom the target's layers are shared out; the first writes.

    Raises:
        NoSharedStructureError: As `find_structure`.
        UnsupportedModelError: As `paired_layer_maps`.
    """
    epsilon = None if settings.matching == "one-to-one" else settings.epsilon
    solver = Solver(epsilon, settings.max_iterations, settings.tolerance, settings.signed)
    keys = feature_keys(projections)
    structure = find_structure(target, source, keys, solver, heard=heard, processes=processes)
    # What does not fit is said by this, before anything is kept.
    transport = shared_transport(structure, target.read, source.read, projections, settings)
    processes.from_first(lambda: structure.save(path))
    return transport


def read_shared(path: Path, target: Side, source: Side, projections: Sequence[str], settings: Shared) -> Transport:
    """What `solve_shared` gave, from the structure that it kept."""
    return shared_transport(Structure.load(path), target.read, source.read, projections, settings)


def shared_transport(
    structure: Structure, target: Read, source: Read, projections: Sequence[str], settings: Shared
) -> Transport:
    """A transport from a solved structure.

    Args:
        structure: Its correspondences serve as plans.
        target: (layer, key) -> (T, n) features of the target.
        source: (layer, key) -> (T, n') features of the source.
        projections: To be carried.
        settings: The recipe's section.

    Raises:
        UnsupportedModelError: As `paired_layer_maps`.
    """
    layers = paired_layers(structure)

    def build(layer: int, wanted: Wanted) -> dict[tuple[str, int], FeatureMap]:
        maps = {}
        for key, source_layer in wanted:
            correspondence = structure.of(layer, key)
            plan, survives = sparse_plan(correspondence, settings.entries_kept), None
            if plan is None:
                plan = correspondence.dense() / correspondence.shape[0]
                survives = (plan != 0) & mutual_top(plan.abs(), settings.entries_kept)
            maps[key, source_layer] = FeatureMap(key, layer, source_layer, plan, survives, partial=True)
        return maps

    transport = Transport(
        structure="shared",
        layers=layers,
        layer_maps=paired_layer_maps(projections, layers),
        build=build,
        matched=True,
        measure=lambda: Statistics(
            measured(target, {key: of.target_layers for key, of in layers.items()}),
            measured(source, {key: of.source_layers for key, of in layers.items()}),
        ),
        eta={},
        layer_plans_converged=True,
        pairs=structure.pairs,
        problems=_problems(structure, settings.tolerance),
        agreement=structure.agreement,
    )
    return with_fitted_maps(transport, target, source, settings)


def paired_layers(structure: Structure) -> dict[str, FeatureLayers]:
    """Every feature's layers, by feature key in the order of the structure's."""
    paired = {}
    for key, (rows, columns) in structure.layers.items():
        plan = torch.zeros(len(rows), len(columns), dtype=torch.float64)
        for row, layer in enumerate(rows):
            if structure.pairs[layer] in columns:
                plan[row, columns.index(structure.pairs[layer])] = 1.0 / len(rows)
        paired[key] = FeatureLayers(rows, columns, structure.cost[key], plan)
    return paired


def paired_layer_maps(projections: Sequence[str], layers: Mapping[str, FeatureLayers]) -> dict[str, LayerMap]:
    """Every projection's layer map: the one source layer that each target layer is paired with.

    Raises:
        UnsupportedModelError: A layer's pair lacks a projection that the layer has.
    """
    maps = {}
    for projection in projections:
        paired = layers[feature_key(projection, "post")]
        if bool((paired.plan.sum(1) == 0).any()):
            layer = paired.target_layers[int((paired.plan.sum(1) == 0).nonzero()[0])]
            raise UnsupportedModelError(
                f"layer {layer} of the target is paired with a source layer that has no {projection}; leave it out of "
                "fusion.projections, or set transport.structure: none"
            )
        columns = paired.plan.argmax(1, keepdim=True)
        weights = paired.plan.gather(1, columns)
        maps[projection] = LayerMap(paired.target_layers, paired.source_layers, paired.plan.clone(), columns, weights)
    return maps


def _problems(structure: Structure, tolerance: float) -> Problems:
    correspondences = structure.problems
    sweeps = [correspondence.iterations for correspondence in correspondences]
    return Problems(
        len(correspondences),
        int(median(sweeps)),
        max(sweeps),
        max(correspondence.marginal_error for correspondence in correspondences),
        sum(correspondence.marginal_error <= tolerance for correspondence in correspondences),
        structure.in_place,
    )
