"""Every feature of every pair of layers solved by itself (Eq. 7-13), the paper's own transport.

The plans of a projection's two sides know nothing of each other, or of the next layer's. Layers are coupled after: the
costs of their features decide which source layers feed which target layers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from tmerge.models import feature_key
from tmerge.processes import ALONE, Processes
from tmerge.recipe import Apart
from tmerge.transport.cost import standardise
from tmerge.transport.plans import (
    FeaturePlans,
    LayerPlan,
    couple_layers,
    feature_plan,
    load_plans,
    mutual_top,
    save_plans,
    solve_features,
    solve_layers,
)
from tmerge.transport.result import FeatureLayers, FeatureMap, LayerMap, Problems, Transport, Wanted
from tmerge.transport.rivals import with_fitted_maps
from tmerge.transport.sides import Heard, Read, Side, feature_keys
from tmerge.transport.statistics import Statistics, measured

__all__ = ["apart_transport", "layer_maps", "layer_plans", "read_apart", "solve_apart"]


def solve_apart(
    target: Side,
    source: Side,
    projections: Sequence[str],
    settings: Apart,
    path: Path,
    *,
    device: torch.device | None = None,
    heard: Heard | None = None,
    note: Callable[[str], None] | None = None,
    processes: Processes = ALONE,
) -> Transport:
    """Solve every feature plan of every pair of layers, and keep the potentials and the layer plans.

    Args:
        target: The target's features.
        source: The source's, of the same texts.
        projections: To be carried.
        settings: The recipe's section.
        path: Where they are written, for `read_apart`.
        device: Where to solve; the CPU if None.
        heard: Hears of every target layer.
        note: Told that a device solves fewer problems at once than were asked of it.
        processes: Among whom the target's layers are shared out; the first writes.
    """
    keys = feature_keys(projections)
    total, done = sum(len(processes.mine(target.layers_with(key))) for key in keys), 0
    plans: dict[str, FeaturePlans] = {}
    for key in keys:

        def solved(layer: int, costs: Tensor, key: str = key) -> None:
            nonlocal done
            done += 1
            if heard is not None:
                heard(f"feature plans of {key}", done, total, "layers", (key, layer, costs))

        plans[key] = solve_features(
            key,
            _reader(target, key),
            _reader(source, key),
            target.layers_with(key),
            source.layers_with(key),
            epsilon=settings.epsilon,
            max_iterations=settings.max_iterations,
            tolerance=settings.tolerance,
            device=device,
            solved=solved,
            note=note,
            processes=processes,
        )
    layers = layer_plans(plans, settings)
    processes.from_first(lambda: save_plans(plans, layers, path))
    return apart_transport(plans, target.read, source.read, projections, settings, layers)


def _reader(side: Side, key: str) -> Callable[[int], Tensor]:
    return lambda layer: side.read(layer, key)


def read_apart(path: Path, target: Side, source: Side, projections: Sequence[str], settings: Apart) -> Transport:
    """What `solve_apart` gave, from what it kept and the features that it was solved from."""
    plans, layers = load_plans(path, feature_keys(projections))
    return apart_transport(plans, target.read, source.read, projections, settings, layers)


def apart_transport(
    plans: Mapping[str, FeaturePlans],
    target: Read,
    source: Read,
    projections: Sequence[str],
    settings: Apart,
    layers: Mapping[str, LayerPlan] | None = None,
) -> Transport:
    """A transport from solved feature plans.

    Args:
        plans: Feature key -> its solved plans.
        target: (layer, key) -> (T, n) features of the target.
        source: (layer, key) -> (T, n') features of the source.
        projections: To be carried.
        settings: The recipe's section.
        layers: Feature key -> its layer plan; solved here if None.
    """
    solved_layers = layers or layer_plans(plans, settings)

    def build(layer: int, wanted: Wanted) -> dict[tuple[str, int], FeatureMap]:
        standard: dict[str, Tensor] = {}
        maps = {}
        for key, source_layer in wanted:
            solved = plans[key]
            entry = solved.target_layers.index(layer), solved.source_layers.index(source_layer)
            f, g = solved.f[entry], solved.g[entry]
            if key not in standard:
                standard[key] = standardise(target(layer, key), f.dtype)
            plan = feature_plan(
                standard[key], standardise(source(source_layer, key), f.dtype), f, g, solved.epsilon
            ).float()
            survives = mutual_top(plan, settings.entries_kept)
            maps[key, source_layer] = FeatureMap(key, layer, source_layer, plan, survives, potentials=(f, g))
        return maps

    transport = Transport(
        structure="none",
        layers={
            key: FeatureLayers(solved.target_layers, solved.source_layers, solved.cost, solved_layers[key].plan)
            for key, solved in plans.items()
        },
        layer_maps=layer_maps(projections, plans, solved_layers, settings.layers_kept),
        build=build,
        matched=False,
        measure=lambda: Statistics(
            measured(target, {key: solved.target_layers for key, solved in plans.items()}),
            measured(source, {key: solved.source_layers for key, solved in plans.items()}),
        ),
        eta={key: plan.eta for key, plan in solved_layers.items()},
        layer_plans_converged=all(plan.converged for plan in solved_layers.values()),
        problems=_problems(plans),
    )
    return with_fitted_maps(transport, target, source, settings)


def layer_plans(plans: Mapping[str, FeaturePlans], settings: Apart) -> dict[str, LayerPlan]:
    """The layer plan P of every feature key, as the recipe asks for it."""
    return {
        key: solve_layers(
            solved.cost,
            settings.eta,
            scaling=settings.layer_cost,
            marginals=settings.layer_marginals,
            max_iterations=settings.layer_max_iterations,
            tolerance=settings.layer_tolerance,
        )
        for key, solved in plans.items()
    }


def layer_maps(
    projections: Sequence[str], plans: Mapping[str, FeaturePlans], layers: Mapping[str, LayerPlan], kept: int
) -> dict[str, LayerMap]:
    """Every projection's layer map, from the layer plans of its two sides (Eq. 13).

    Args:
        projections: Their names.
        plans: Feature key -> its solved plans; they name the layers.
        layers: Feature key -> its layer plan.
        kept: Source layers kept per target layer.
    """
    maps = {}
    for projection in projections:
        pre, post = feature_key(projection, "pre"), feature_key(projection, "post")
        entering = _restricted(layers[pre], plans[pre], plans[post])
        effective, indices, weights = couple_layers(entering, layers[post], kept)
        maps[projection] = LayerMap(plans[post].target_layers, plans[post].source_layers, effective, indices, weights)
    return maps


def _restricted(layer_plan: LayerPlan, pre: FeaturePlans, post: FeaturePlans) -> LayerPlan:
    """The pre side's plan over the layers that have the post side too, of sum 1 again.

    They differ where some layers have a q but reuse the keys and values of others: what enters is there in all of
    them, k and v are not.
    """
    if (pre.target_layers, pre.source_layers) == (post.target_layers, post.source_layers):
        return layer_plan
    rows = [pre.target_layers.index(layer) for layer in post.target_layers]
    columns = [pre.source_layers.index(layer) for layer in post.source_layers]
    plan = layer_plan.plan[rows][:, columns]
    return replace(layer_plan, plan=plan / plan.sum())


def _problems(plans: Mapping[str, FeaturePlans]) -> Problems:
    iterations = torch.cat([solved.iterations.reshape(-1) for solved in plans.values()])
    errors = torch.cat([solved.marginal_error.reshape(-1) for solved in plans.values()])
    converged = torch.cat([solved.converged.reshape(-1) for solved in plans.values()])
    return Problems(
        iterations.numel(), int(iterations.median()), int(iterations.max()), float(errors.max()), int(converged.sum())
    )
