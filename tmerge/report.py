"""report.json: what a run did and whether it helped, put together from what its stages measured.

No number here is a constant: each comes from a stage's note of this run (or of the part of it that was resumed).
"""

from __future__ import annotations

import importlib.metadata
import resource
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from tmerge.evaluation import Scores, difference, resamples, score, verdict
from tmerge.fusion import neuron_count
from tmerge.fusion.selection import COLUMN_PROJECTIONS
from tmerge.models import Architecture, ModelFacts
from tmerge.preflight.check import Check
from tmerge.recipe import Recipe
from tmerge.version import VERSION

__all__ = [
    "RELATED",
    "SCHEMA",
    "alpha_words",
    "build_report",
    "library_versions",
    "peak_memory",
    "ratio_words",
    "relatedness_words",
    "solved_words",
    "summary",
    "training_summary",
]

SCHEMA = 1
_CLEAR = 0.9
RELATED = 0.5
"""Relatedness from which a merge is worth trying: more than half of the neurons are found twice alike. Relatives that
were measured lie at 0.98 and above on texts that both read (at 0.87 on means over texts), and at 0.70 on others;
strangers at 0.14 to 0.18 on single tokens and at 0.01 on means over texts (docs/experiments.md)."""


def build_report(
    recipe: Recipe,
    checked: Check,
    notes: Mapping[str, Mapping[str, Any]],
    scores: Mapping[str, Mapping[str, Any]],
    versions: Mapping[str, str],
    device: str,
) -> dict[str, Any]:
    """The report of a finished run.

    Args:
        recipe: Resolved.
        checked: Facts of the two models.
        notes: Stage -> what it measured.
        scores: ``base``, ``fused``, ``source`` and the controls -> bits and bytes of every held-out text.
        versions: Of the libraries that decide the numbers.
        device: Where it ran.

    Returns:
        JSON values, schema 1 (DESIGN: report.json).
    """
    evaluation = _evaluation(recipe, scores)
    texts = dict(notes["texts"]["texts"])
    texts["held_out_texts"] = texts.pop("held_out")
    solved = notes["transport"]
    stages = [
        {
            "name": name,
            "seconds": note["seconds"],
            "forward_seconds": note["forward_seconds"],
            "peak_rss_bytes": note["peak_rss_bytes"],
        }
        for name, note in notes.items()
    ]
    total = sum(stage["seconds"] for stage in stages)
    forward = sum(stage["forward_seconds"] for stage in stages)
    remarks = [*checked.notes, *texts.pop("notes", [])]
    if solved["converged"] < solved["problems"]:
        remarks.append(
            f"{solved['problems'] - solved['converged']} of {solved['problems']} feature plans did not reach the "
            f"tolerance (worst marginal violation {solved['worst_marginal_violation']:.1e}): raise "
            "transport.max_iterations or transport.epsilon"
        )
    for name, ratios in notes["fuse"]["norm_ratios"].items():
        if zero := [
            str(layer) for layer, ratio in zip(notes["fuse"]["layers"][name], ratios, strict=True) if ratio is None
        ]:
            remarks.append(
                f"the target's own {name} neurons are all zero in layer{'s' * (len(zero) > 1)} {', '.join(zero)}: what "
                "was transported has no norm to be held against there (norm_ratio null)"
            )
    if solved.get("relatedness") is not None:
        remarks.append(relatedness_words(solved["relatedness"]))
    choice = notes["choose"]["choice"] if "choose" in notes else None
    if choice is not None and not any(choice["alpha"].values()):
        remarks.append(
            f"fusion.alpha auto found no alpha that clearly gains on {choice['texts']} texts kept for choosing: the "
            "checkpoint is the target, unchanged"
        )
    return {
        "schema": SCHEMA,
        "tmerge": versions["tmerge"],
        "verdict": evaluation.pop("verdict"),
        "target": _model(checked.target, checked.target_layout),
        "source": _model(checked.source, checked.source_layout),
        "source_base": recipe.source_base,
        **(
            {}
            if checked.base is None
            else {"source_base_model": _model(checked.base, checked.base_layout or checked.source_layout)}
        ),
        "same_model": checked.target.commit == checked.source.commit,
        "calibration": {
            **texts,
            "tokens": {role: notes[role]["tokens"] for role in ("target", "source")},
            "truncated": {role: notes[role]["truncated"] for role in ("target", "source")},
        },
        "transport": {
            "problems": solved["problems"],
            "iterations": solved["iterations"],
            "worst_marginal_violation": solved["worst_marginal_violation"],
            "converged": solved["converged"],
            "seconds": solved["seconds"],
            "epsilon": recipe.transport.epsilon,
            "eta": recipe.transport.eta,
            "eta_used": notes["fuse"]["eta"],
            "layer_cost": recipe.transport.layer_cost,
            "layer_marginals": recipe.transport.layer_marginals,
            "layer_plans_converged": notes["fuse"]["layer_plans_converged"],
            "rows": recipe.calibration.rows,
            "structure": recipe.transport.structure,
            "matching": recipe.transport.matching,
            "signed": recipe.transport.signed,
            "map": recipe.transport.map,
            "relatedness": solved.get("relatedness"),
        },
        "projections": {
            "fused": checked.projections,
            "skipped": checked.skipped,
            "left_alone": checked.target_layout.left_alone,
        },
        "fusion": _fusion(recipe, checked, notes["fuse"]) | ({"choice": choice} if choice else {}),
        "evaluation": evaluation | ({"descent": notes["evaluate"]["descent"]} if recipe.evaluation.descent else {}),
        "stages": stages,
        "timing": {"total_seconds": total, "forward_seconds": forward, "other_seconds": total - forward},
        "device": device,
        "dtype": notes["save"]["dtype"],
        "computed_in": notes["save"]["computed_in"],
        "weights": notes["save"]["weights"],
        "plan": recipe.plan,
        "seed": recipe.seed,
        "versions": dict(versions),
        "notes": remarks,
    }


def relatedness_words(found: Mapping[str, Any]) -> str:
    """Whether the two models' neurons correspond, in a sentence (`tmerge.transport.relatedness`)."""
    numbers = f"Relatedness {found['value']:.2f} (by chance {found['permuted']:.2f})"
    if found["value"] >= RELATED:
        sentence = f"{numbers}: these models' neurons correspond, as those of models with a common ancestor do"
        if found["value"] < _CLEAR:
            sentence += (
                "; not all were found, and more will be on texts that both models read well (calibration.match_on, by "
                "default the English samples)"
            )
        return sentence
    return (
        f"{numbers}: two halves of the calibration set do not agree on which neuron is which, so these models share "
        "no correspondence that weights could be carried by; train or distil instead (tmerge adapt)"
    )


def solved_words(solved: Mapping[str, Any]) -> str:
    """How many problems the transport solved, and how well."""
    if solved.get("structure") == "shared" and solved["matching"] == "one-to-one":
        return f"{solved['problems']} correspondences, matched one to one: the residual stream's, each layer's own"
    steps = solved["iterations"]
    return (
        f"{solved['problems']} feature plans, {solved['converged']} converged, {steps['median']} iterations in the "
        f"median, {steps['max']} at most, worst marginal violation {solved['worst_marginal_violation']:.1e}"
    )


def alpha_words(fusion: Mapping[str, Any]) -> str:
    """A report's alpha in words: ``0.1``, or what ``auto`` chose for each projection."""
    if "choice" not in fusion:
        return str(fusion["alpha"])
    chosen = ", ".join(f"{name} {alpha:g}" for name, alpha in fusion["choice"]["alpha"].items())
    return f"{fusion['alpha']} ({chosen})"


def ratio_words(ratios: Sequence[float | None]) -> str:
    """A projection's norm ratios in words: the smallest to the largest of those that there are."""
    known = [ratio for ratio in ratios if ratio is not None]
    return f"{min(known):.2g} to {max(known):.2g}" if known else "undefined: its own are zero"


def summary(report: Mapping[str, Any]) -> str:
    """The verdict as a sentence with its number and interval."""
    change = report["evaluation"]["difference"]
    value, (low, high) = change["value"], change["ci95"]
    numbers = f"{value:+.4f} bits per byte on {report['evaluation']['texts']} held-out texts"
    interval = f"95 % interval {low:+.4f} to {high:+.4f}"
    sentence = {
        "helps": "The merge helps",
        "hurts": "The merge hurts: the fused model is worse than the target it was made from",
        "no difference": "The merge makes no difference that these texts can show",
    }[report["verdict"]]
    return f"{sentence}: {numbers} ({interval}; lower is better).{_caution(report)}"


def _caution(report: Mapping[str, Any]) -> str:
    """What a gain is worth that a control makes as well: the correspondence is then not what helps."""
    if report["verdict"] != "helps":
        return ""
    controls = report["evaluation"]["controls"]
    as_good = [
        f"{name} ({item['difference']['value']:+.4f})"
        for name, item in controls.items()
        if item["fused_minus_control"]["ci95"][1] >= 0 and item["difference"]["ci95"][1] < 0
    ]
    if not as_good:
        return ""
    listed = ", ".join(as_good)
    return f" But as far as these texts show, it is not the source's knowledge that helps: {listed} gain as much."


def training_summary(report: Mapping[str, Any]) -> str:
    """What training on top of the merge did."""
    adaptation, adapted = report["adaptation"], report["evaluation"]["adapted"]
    kept = "held fixed" if adaptation["residual"] == "frozen" else "trained as well"
    return (
        f"{len(adaptation['loss_curve'])} steps of {adaptation['objective']} over {adaptation['tokens']:,} tokens, "
        f"what was transported {kept}. Against the target: {adapted['difference']['value']:+.4f} bits per byte "
        f"(95 % interval {_span(adapted['difference'])}); against the merge before training: "
        f"{adapted['difference_to_fused']['value']:+.4f} ({_span(adapted['difference_to_fused'])})."
    )


def _span(item: Mapping[str, Any]) -> str:
    return "{:+.4f} to {:+.4f}".format(*item["ci95"])


def _evaluation(recipe: Recipe, notes: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    scores = {
        name: Scores(
            torch.tensor(note["bits"], dtype=torch.float64),
            torch.tensor(note["bytes"], dtype=torch.float64),
            note["tokens"],
            0.0,
        )
        for name, note in notes.items()
    }
    base = scores["base"]
    counts = resamples(len(base.bits), recipe.evaluation.bootstrap, recipe.seed)
    change = difference(scores["fused"], base, counts)
    return {
        "verdict": verdict(change),
        "metric": "bits_per_byte",
        "texts": len(base.bits),
        "bytes": int(base.bytes.sum()),
        **{name: score(scores[name], counts).to_dict() for name in ("base", "fused", "source")},
        "difference": change.to_dict(),
        "controls": {
            name: {
                **score(scores[name], counts).to_dict(),
                "difference": difference(scores[name], base, counts).to_dict(),
                "fused_minus_control": difference(scores["fused"], scores[name], counts).to_dict(),
            }
            for name in recipe.evaluation.controls
        },
    }


def _fusion(recipe: Recipe, checked: Check, note: Mapping[str, Any]) -> dict[str, Any]:
    settings = recipe.fusion
    projections = {}
    for name in checked.projections:
        layers = note["layers"][name]
        view = checked.target_layout.layers[layers[0]][name]
        neurons = view.in_features if name in COLUMN_PROJECTIONS else view.out_features
        projections[name] = {
            "layers": layers,
            "norm_ratio": note["norm_ratios"][name],
            "neurons": neuron_count(settings.top_k, neurons),
            "of": neurons,
            "bias": note["biases"][name],
        }
    return {
        "what": settings.what,
        "alpha": settings.alpha,
        "scale": settings.scale,
        "units": settings.units,
        "top_k": settings.top_k,
        "projections": projections,
        "stream": note["stream"],
    }


def _model(facts: ModelFacts, layout: Architecture) -> dict[str, Any]:
    return {
        "ref": facts.reference.text,
        "commit": facts.commit,
        "architecture": facts.model_type,
        "parameters": facts.parameters,
        "layers": layout.num_layers,
        "hidden_size": layout.hidden_size,
        "licence": facts.licence,
    }


def peak_memory() -> int:
    """Peak resident bytes of this process so far; Linux counts them in KiB, macOS in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def library_versions() -> dict[str, str]:
    """Of Python and the libraries that decide the numbers."""
    names = ("torch", "transformers", "tokenizers", "datasets", "safetensors", "numpy", "scipy")
    versions = {"python": ".".join(map(str, sys.version_info[:3])), "tmerge": VERSION}
    for name in names:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "not installed"
    return versions
