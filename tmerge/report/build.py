"""The report of a run: what it did and whether it helped, put together from what its stages measured.

No number here is a constant: each comes from a stage's note of this run (or of the part of it that was resumed).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from tmerge.evaluation import Scores, difference, resamples, score, verdict
from tmerge.fusion import neuron_count
from tmerge.fusion.selection import COLUMN_PROJECTIONS
from tmerge.preflight.check import Check, described
from tmerge.recipe import Recipe, Reconstruction
from tmerge.report.report import SCHEMA, Kept, Report
from tmerge.report.words import kept_words, relatedness_words

__all__ = ["build_report"]

# Of the recipe's transport, where its kind has it.
_QUOTED = {"structure", "matching", "signed", "map", "epsilon", "eta", "layer_cost", "layer_marginals"}


def build_report(
    recipe: Recipe,
    checked: Check,
    notes: Mapping[str, Mapping[str, Any]],
    scores: Mapping[str, Mapping[str, Any]],
    versions: Mapping[str, str],
    device: str,
) -> Report:
    """The report of a finished run.

    Args:
        recipe: Resolved.
        checked: Facts of the two models.
        notes: Stage -> what it measured.
        scores: ``base``, ``fused``, ``source`` and the controls -> bits and bytes of every held-out text.
        versions: Of the libraries that decide the numbers.
        device: Where it ran.

    Returns:
        Of schema 1, as it is written to report.json.
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
    remarks = [*checked.notes, *texts.pop("notes", []), *(notes["texts"]["kept"] or {}).get("notes", [])]
    if solved["converged"] < solved["problems"]:
        remarks.append(
            f"{solved['problems'] - solved['converged']} of {solved['problems']} feature plans did not reach the "
            f"tolerance (worst marginal violation {solved['worst_marginal_violation']:.1e}): raise "
            "transport.max_iterations or transport.epsilon"
        )
    fused = notes["fuse"] if "fuse" in notes else notes["reconstruct"]
    for name, ratios in fused["norm_ratios"].items():
        if zero := [str(layer) for layer, ratio in zip(fused["layers"][name], ratios, strict=True) if ratio is None]:
            remarks.append(
                f"the target's own {name} neurons are all zero in layer{'s' * (len(zero) > 1)} {', '.join(zero)}: what "
                "was transported has no norm to be held against there (norm_ratio null)"
            )
    if solved.get("relatedness") is not None:
        remarks.append(relatedness_words(solved["relatedness"]["value"], solved["relatedness"]["permuted"]))
    choice = notes["choose"]["choice"] if "choose" in notes else None
    if choice is not None and not any(choice["alpha"].values()):
        remarks.append(
            f"fusion.alpha auto found no alpha that clearly gains on {choice['texts']} texts kept for choosing: the "
            "checkpoint is the target, unchanged"
        )
    kept = _kept(recipe, notes["texts"], notes["evaluate"])
    if kept is not None:
        remarks.append(kept_words(kept))
    document = {
        "schema": SCHEMA,
        "tmerge": versions["tmerge"],
        "verdict": evaluation.pop("verdict"),
        "target": described(checked.target, checked.target_layout),
        "source": described(checked.source, checked.source_layout),
        "source_base": recipe.source_base,
        **(
            {}
            if checked.base is None
            else {"source_base_model": described(checked.base, checked.base_layout or checked.source_layout)}
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
            **recipe.transport.model_dump(mode="json", include=_QUOTED),
            "eta_used": fused["eta"],
            "layer_plans_converged": fused["layer_plans_converged"],
            "rows": recipe.calibration.rows,
            "relatedness": solved.get("relatedness"),
        },
        "projections": {
            "fused": checked.projections,
            "skipped": checked.skipped,
            "left_alone": checked.target_layout.left_alone,
        },
        "fusion": _fusion(recipe, checked, fused) | ({"choice": choice} if choice else {}),
        "evaluation": evaluation
        | ({} if kept is None else {"kept": kept.model_dump(mode="json")})
        | ({"descent": notes["evaluate"]["descent"]} if recipe.evaluation.descent else {}),
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
    return Report.model_validate(document)


def _scores(note: Mapping[str, Any]) -> Scores:
    bits, sizes = (torch.tensor(note[name], dtype=torch.float64) for name in ("bits", "bytes"))
    return Scores(bits, sizes, note["tokens"], 0.0)


def _kept(recipe: Recipe, texts: Mapping[str, Any], note: Mapping[str, Any]) -> Kept | None:
    """Scores on the texts that a reconstruction is to leave the target as it is on."""
    if not note.get("kept"):
        return None
    base, fused = (_scores(note["kept"][name]) for name in ("base", "fused"))
    counts = resamples(len(base.bits), recipe.evaluation.bootstrap, recipe.seed)
    return Kept.model_validate(
        {
            **{name: texts["kept"][name] for name in ("dataset", "revision", "file_sha256", "sha256")},
            "texts": len(base.bits),
            "base": score(base, counts).to_dict(),
            "fused": score(fused, counts).to_dict(),
            "difference": difference(fused, base, counts).to_dict(),
        }
    )


def _evaluation(recipe: Recipe, notes: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    scores = {name: _scores(note) for name, note in notes.items()}
    base = scores["base"]
    counts = resamples(len(base.bits), recipe.evaluation.bootstrap, recipe.seed)
    change = difference(scores["fused"], base, counts)
    over = {name: difference(scores["fused"], scores[name], counts) for name in recipe.evaluation.controls}
    return {
        "verdict": verdict(change, over.values()),
        "metric": "bits_per_byte",
        "texts": len(base.bits),
        "bytes": int(base.bytes.sum()),
        **{name: score(scores[name], counts).to_dict() for name in ("base", "fused", "source")},
        "difference": change.to_dict(),
        "controls": {
            name: {
                **score(scores[name], counts).to_dict(),
                "difference": difference(scores[name], base, counts).to_dict(),
                "fused_minus_control": beyond.to_dict(),
            }
            for name, beyond in over.items()
        },
    }


def _fusion(recipe: Recipe, checked: Check, note: Mapping[str, Any]) -> dict[str, Any]:
    settings = recipe.fusion
    projections = {}
    for name in [name for name in checked.projections if note["layers"].get(name)]:
        layers = note["layers"][name]
        view = checked.target_layout.layers[layers[0]][name]
        neurons = view.in_features if name in COLUMN_PROJECTIONS else view.out_features
        selected = 1.0 if isinstance(settings, Reconstruction) else settings.top_k
        projections[name] = {
            "layers": layers,
            "norm_ratio": note["norm_ratios"][name],
            "neurons": neuron_count(selected, neurons),
            "of": neurons,
            "bias": note["biases"][name],
        }
    how: dict[str, Any]
    if isinstance(settings, Reconstruction):
        measured = {name: note[name] for name in ("rows", "final_goal", "keep", "keep_texts", "errors", "ridges")}
        how = {"fit": {"ridge": settings.ridge, "rank": settings.rank, **measured}, "fit_seconds": note["fit_seconds"]}
    else:
        how = {"scale": settings.scale, "units": settings.units, "top_k": settings.top_k}
    return {
        "what": settings.what,
        "alpha": settings.alpha,
        **how,
        "projections": projections,
        "stream": note["stream"],
    }
