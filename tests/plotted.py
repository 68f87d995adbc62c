"""A record and a report made by hand, for pictures to be held against."""

from dataclasses import replace

import pytest
import torch

from tests.reported import texts
from tmerge.recipe import Apart
from tmerge.transport import (
    FeatureStatistics,
    PlanRecorder,
    Statistics,
    TransportRecord,
    apart_transport,
    solve_features,
)

WIDTHS = {"qkv.pre": (48, 64), "q.post": (60, 96), "o.pre": (60, 96), "o.post": (48, 64)}
TARGET_LAYERS, SOURCE_LAYERS = (0, 1, 2, 3, 4, 7), (0, 2, 3, 5)  # numbers that are not places
GROUPS, TEXTS, KEPT = 6, 80, 16


def planted_features(role, layers, depth):
    """(layer, key) -> (T, n): neurons of a few groups, each group's signal drifting along the depth."""
    draw = torch.Generator().manual_seed(7)
    signals = {key: torch.randn(2, TEXTS, GROUPS, generator=draw, dtype=torch.float64) for key in WIDTHS}
    draw.manual_seed(role)
    found = {}
    for place, layer in enumerate(layers):
        t = place / (depth - 1)
        for key, widths in WIDTHS.items():
            group = torch.arange(widths[role]) % GROUPS
            early, late = signals[key]
            noise = torch.randn(TEXTS, widths[role], generator=draw, dtype=torch.float64)
            found[layer, key] = ((1 - t) * early + t * late)[:, group] + 0.3 * noise
    return found


@pytest.fixture(scope="module")
def record():
    """A record as a run keeps it, from solved plans of planted features."""
    settings = Apart(layers_kept=2, entries_kept=KEPT)
    features = (
        planted_features(0, TARGET_LAYERS, len(TARGET_LAYERS)),
        planted_features(1, SOURCE_LAYERS, len(SOURCE_LAYERS)),
    )
    plans = {
        key: solve_features(
            key,
            lambda layer, key=key: features[0][layer, key],
            lambda layer, key=key: features[1][layer, key],
            TARGET_LAYERS,
            SOURCE_LAYERS,
            epsilon=settings.epsilon,
        )
        for key in WIDTHS
    }
    statistics = [
        {place: FeatureStatistics(x.mean(0), x.std(0), x.abs().mean(0)) for place, x in side.items()}
        for side in features
    ]
    reads = (lambda layer, key, of=of: of[layer, key] for of in features)
    transport = apart_transport(plans, *reads, ("q", "o"), settings)
    recorder = PlanRecorder(replace(transport, measure=lambda: Statistics(*statistics)))
    for layer in TARGET_LAYERS:
        recorder.add(recorder.part(transport.feature_maps(layer).values()))
    return TransportRecord(
        {"schema": 1, "projections": ["q", "o"], "keys": list(WIDTHS), "epsilon": 0.1}, recorder.tensors()
    )


def interval(value, half, **more):
    return {"value": value, "ci95": [value - half, value + half], **more}


def control(value, change, half, fused_minus):
    return interval(value, 0.05, difference=interval(change, half), fused_minus_control=interval(fused_minus, 0.02))


@pytest.fixture
def report():
    """A document; `tests.reported.typed` makes a report of it."""
    layers = list(TARGET_LAYERS)
    model = {
        "commit": "a" * 40,
        "architecture": "llama",
        "parameters": 134515008,
        "layers": 8,
        "hidden_size": 48,
        "licence": "apache-2.0",
    }
    ratios = {"q": [0.004, 0.005, 0.006, 0.007, 0.008, 0.009], "o": [0.02, 0.03, 0.0, 0.05, 0.06, 0.07]}
    return {
        "schema": 1,
        "tmerge": "0.1.0",
        "verdict": "hurts",
        "target": {"ref": "someone/small@abc", **model},
        "source": {"ref": "someone/large", **model, "licence": None},
        "source_base": None,
        "same_model": False,
        "calibration": texts(
            held_out_texts=20, tokens={"target": 1200, "source": 900}, truncated={"target": 0, "source": 1}
        ),
        "transport": {
            "problems": 96,
            "converged": 95,
            "iterations": {"median": 6, "max": 9},
            "worst_marginal_violation": 9.6e-7,
            "seconds": 1.5,
            "epsilon": 0.1,
            "eta": 0.1,
            "eta_used": {"qkv.pre": 0.1},
            "layer_cost": "median-scaled",
            "layer_marginals": "balanced",
            "layer_plans_converged": True,
        },
        "projections": {"fused": ["q", "o"], "skipped": {"gate": "the source has no gate"}, "left_alone": ["experts"]},
        "fusion": {
            "what": "weights",
            "alpha": 0.1,
            "scale": "barycentric",
            "units": "none",
            "top_k": 16,
            "projections": {
                name: {"layers": layers, "norm_ratio": values, "neurons": 16, "of": 60, "bias": "none"}
                for name, values in ratios.items()
            },
        },
        "evaluation": {
            "metric": "bits_per_byte",
            "texts": 20,
            "bytes": 4321,
            "base": interval(2.9, 0.05),
            "fused": interval(3.1, 0.05),
            "source": interval(1.5, 0.04),
            "difference": interval(0.2, 0.02),
            "controls": {
                "shrink": control(3.09, 0.19, 0.02, 0.01),
                "noise": control(2.9, 0.001, 0.01, 0.199),
                "permuted": control(3.3, 0.4, 0.02, -0.2),
            },
        },
        "stages": [
            {"name": "target", "seconds": 3.0, "forward_seconds": 2.5, "peak_rss_bytes": 1_500_000_000},
            {"name": "fuse", "seconds": 1.0, "forward_seconds": 0.0, "peak_rss_bytes": 1_600_000_000},
        ],
        "timing": {"total_seconds": 4.0, "forward_seconds": 2.5, "other_seconds": 1.5},
        "device": "cpu",
        "dtype": "float32",
        "weights": {"model.safetensors": "d" * 64},
        "seed": 0,
        "versions": {"torch": "2.13.0"},
        "notes": ["a note"],
    }
