"""The transport stage: from two models' features to a transport, solved as the recipe asks for it.

It needs no loaded model, and no session: how the heads divide was noted when the models were read.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from tmerge.errors import NoSharedStructureError
from tmerge.recipe import TransportSettings
from tmerge.transport import (
    Heard,
    Side,
    Transport,
    feature_keys,
    pair_layers,
    read_apart,
    read_shared,
    relatedness,
    solve_apart,
    solve_shared,
)

__all__ = ["measure_relatedness", "read_solved", "solve"]

# What a run keeps in its cache between being solved and being fused.
_APART, _SHARED = "plans.safetensors", "structure.safetensors"


def solve(
    target: Side,
    source: Side,
    projections: Sequence[str],
    settings: TransportSettings,
    cache: Path,
    *,
    device: torch.device,
    heard: Heard,
) -> tuple[Transport, dict[str, Any]]:
    """Solve a transport, and keep in the run's cache what `read_solved` makes it from.

    Args:
        target: The target's features.
        source: The source's.
        projections: To be fused.
        settings: The recipe's section.
        cache: The run's folder for what is finished.
        device: Where feature plans are solved.
        heard: Hears of every step.

    Returns:
        The transport, and what its stage notes of it.

    Raises:
        NoSharedStructureError: With ``structure: shared``, as `tmerge.transport.solve_structure`.
        UnsupportedModelError: Likewise, where a layer's pair lacks a projection.
    """
    began = time.perf_counter()
    if settings.structure == "shared":
        transport = solve_shared(target, source, projections, settings, cache / _SHARED, heard=heard)
    else:
        transport = solve_apart(target, source, projections, settings, cache / _APART, device=device, heard=heard)
    assert transport.problems is not None  # it was solved here
    return transport, transport.problems.to_dict() | {"solve_seconds": time.perf_counter() - began}


def read_solved(
    target: Side, source: Side, projections: Sequence[str], settings: TransportSettings, cache: Path
) -> Transport:
    """The transport that `solve` gave, in this process or an earlier one."""
    if settings.structure == "shared":
        return read_shared(cache / _SHARED, target, source, projections, settings)
    return read_apart(cache / _APART, target, source, projections, settings)


def measure_relatedness(
    transport: Transport, target: Side, source: Side, projections: Sequence[str], rows: int, *, seed: int, heard: Heard
) -> dict[str, Any] | None:
    """Whether the two models' neurons correspond at all, for the report.

    Args:
        transport: Its pairs of layers are taken where it has any.
        target: The target's features.
        source: The source's.
        projections: To be fused.
        rows: T of the features.
        seed: The recipe's.
        heard: Hears of every problem.

    Returns:
        None where it cannot be asked: what a model reads from its residual stream and what it writes are not of one
        width, which plans solved apart can do with.
    """
    pairs = transport.pairs
    if pairs is None:
        pairs, _, _ = pair_layers(target, source, feature_keys(projections))
    try:
        found = relatedness(
            target,
            source,
            pairs,
            rows,
            seed=seed,
            progress=lambda done, total: heard("relatedness", done, total, "problems"),
        )
    except NoSharedStructureError:
        return None
    return found.to_dict()
