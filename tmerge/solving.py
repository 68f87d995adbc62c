"""The transport stage: from two models' features to what the fusion reads, solved apart or with a shared structure.

It needs no loaded model: how the heads divide was noted when the models were read.
"""

from __future__ import annotations

import time
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from tmerge.calibration import FeatureStore
from tmerge.errors import NoSharedStructureError
from tmerge.fusion import (
    FusionInputs,
    layers_with,
    paired_couplings,
    paired_layers,
    recorded_inputs,
    solved_inputs,
    structured_inputs,
)
from tmerge.preflight.check import keys_of
from tmerge.session import Session
from tmerge.transport import (
    FeaturePlans,
    Heads,
    Side,
    Structure,
    load_plans,
    pair_layers,
    relatedness,
    save_plans,
    solve_features,
    solve_structure,
)

__all__ = ["fusion_inputs", "measure_relatedness", "solve_apart", "solve_shared"]


def _structure_path(session: Session) -> Path:
    """Where a run keeps its structure until it is fused."""
    return session.run.cache / "structure.safetensors"


def _sides(session: Session) -> tuple[Side, Side]:
    """The target and the source, as their features and notes tell."""
    target, source = (_side(session, role) for role in ("target", "source"))
    return target, source


def _side(session: Session, role: str) -> Side:
    store = FeatureStore(session.feature_folder(role))
    heads = {int(layer): Heads.of(facts) for layer, facts in session.notes[role]["heads"].items()}
    return Side(store.get, {layer: store.keys(layer) for layer in store.layers}, heads)


def solve_apart(session: Session) -> dict[str, Any]:
    """Solve every feature plan of every pair of layers (Eq. 7-10), and keep the potentials in the run's cache.

    Returns:
        What the transport stage notes of it.
    """
    settings = session.recipe.transport
    keys = keys_of(session.check.projections)
    stores = {role: FeatureStore(session.feature_folder(role)) for role in ("target", "source")}
    plans: dict[str, FeaturePlans] = {}
    began = time.perf_counter()
    layers = {role: {key: layers_with(stores[role], key) for key in keys} for role in stores}
    total, done = sum(len(layers["target"][key]) for key in keys), 0
    for key in keys:

        def solved(layer: int, costs: Tensor, key: str = key) -> None:
            nonlocal done
            done += 1
            session.step("transport", f"feature plans of {key}", done, total, "layers", (key, layer, costs))

        plans[key] = solve_features(
            key,
            partial(stores["target"].get, key=key),
            partial(stores["source"].get, key=key),
            layers["target"][key],
            layers["source"][key],
            epsilon=settings.epsilon,
            max_iterations=settings.max_iterations,
            tolerance=settings.tolerance,
            device=session.device,
            solved=solved,
        )
    save_plans(plans, session.run.cache / "plans.safetensors")
    iterations = torch.cat([solved.iterations.reshape(-1) for solved in plans.values()])
    errors = torch.cat([solved.marginal_error.reshape(-1) for solved in plans.values()])
    converged = torch.cat([solved.converged.reshape(-1) for solved in plans.values()])
    return {
        "problems": iterations.numel(),
        "iterations": {"median": int(iterations.median()), "max": int(iterations.max())},
        "worst_marginal_violation": float(errors.max()),
        "converged": int(converged.sum()),
        "solve_seconds": time.perf_counter() - began,
    }


def solve_shared(session: Session) -> dict[str, Any]:
    """Solve the structure of a run whose ``transport.structure`` is ``shared``, and keep it in the run's cache.

    Returns:
        What the transport stage notes of it.
    """
    settings = session.recipe.transport
    began = time.perf_counter()
    target, source = _sides(session)
    keys = keys_of(session.check.projections)
    total, done = sum(key in of for key in keys for of in target.keys.values()), 0

    def compared(key: str, layer: int, costs: Tensor) -> None:
        nonlocal done
        done += 1
        session.step("transport", f"layers by {key}", done, total, "layers", (key, layer, costs))

    pairs, cost, layers = pair_layers(target, source, keys, signed=settings.signed, solved=compared)
    stream, inner = solve_structure(
        target,
        source,
        pairs,
        epsilon=None if settings.matching == "one-to-one" else settings.epsilon,
        max_iterations=settings.max_iterations,
        tolerance=settings.tolerance,
        signed=settings.signed,
        progress=lambda done, total: session.step("transport", "matching heads and neurons", done, total, "layers"),
    )
    structure = Structure(pairs, cost, layers, stream, inner)
    # Said now, and not after the third model was loaded.
    paired_couplings(session.check.projections, paired_layers(structure))
    structure.save(_structure_path(session))
    found = structure.problems
    sweeps = [item.iterations for item in found]
    return {
        "problems": len(found),
        "iterations": {"median": int(median(sweeps)), "max": max(sweeps)},
        "worst_marginal_violation": max(item.marginal_error for item in found),
        "converged": sum(item.marginal_error <= settings.tolerance for item in found),
        "solve_seconds": time.perf_counter() - began,
    }


def measure_relatedness(session: Session) -> dict[str, Any] | None:
    """Whether the two models' neurons correspond at all, for the report.

    None where it cannot be asked: what a model reads from its residual stream and what it writes are not of one width,
    which plans solved apart can do with.
    """
    target, source = _sides(session)
    if session.recipe.transport.structure == "shared":
        pairs = Structure.load(_structure_path(session)).pairs
    else:
        pairs, _, _ = pair_layers(target, source, keys_of(session.check.projections))
    rows = FeatureStore(session.feature_folder("target")).texts
    try:
        found = relatedness(
            target,
            source,
            pairs,
            rows,
            seed=session.recipe.seed,
            progress=lambda done, total: session.step("transport", "relatedness", done, total, "problems"),
        )
    except NoSharedStructureError:
        return None
    return found.to_dict()


def fusion_inputs(session: Session) -> FusionInputs:
    """What the fusion reads: of this run, or of the one whose plan it takes."""
    projections, settings = session.check.projections, session.recipe.transport
    if session.plan is not None:
        return recorded_inputs(session.plan.record, session.plan.report.transport.to_dict(), projections)
    target, source = (FeatureStore(session.feature_folder(role)) for role in ("target", "source"))
    if settings.structure == "shared":
        return structured_inputs(Structure.load(_structure_path(session)), target, source, projections, settings)
    plans = load_plans(session.run.cache / "plans.safetensors", keys_of(projections))
    return solved_inputs(plans, target, source, projections, settings)
