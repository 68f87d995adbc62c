"""What can be said of a merge from the two configs alone, before any weight is read.

Matched projections, sizes and licences come from the models' configs, laid out on the meta device. Seconds come from
this machine's own speed, measured for a moment here, times the operations that the run will do; they are an estimate
and say what they assume.
"""

from __future__ import annotations

import shutil
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import psutil
import torch
from huggingface_hub import constants
from torch.nn import functional

from tmerge.calibration import SAMPLES_PREFIX, sample_texts
from tmerge.errors import NotEnoughDiskError, NotEnoughMemoryError, UnsupportedModelError
from tmerge.evaluation import PROJECTION_GROUPS
from tmerge.models import (
    Architecture,
    ModelFacts,
    OutputLicence,
    available_memory,
    describe,
    feature_key,
    match,
    meta_model,
    model_commit,
    multiplies_fast,
    output_licence,
    pick_device,
    read_facts,
    trusts,
)
from tmerge.recipe import Recipe
from tmerge.transport import correlation_cost, sinkhorn, standardise, working_dtype

__all__ = ["Check", "Estimate", "check", "keys_of", "refuse_unfit"]

# What an estimate assumes of texts that it has not read.
TOKENS_PER_TEXT = 64
# Freed blocks that the C library keeps for itself; measured on the demo, where the peak was a tenth above the sum.
_ALLOCATOR_SLACK = 1.1


@dataclass(frozen=True)
class Estimate:
    """What a run is expected to take here.

    Attributes:
        seconds: Of the whole run, without download.
        memory_bytes: Peak of this process.
        disk_bytes: In the output folder.
        download_bytes: Still to be fetched from the Hub into its cache.
        assumes: In words.
        forward_seconds: Of `seconds`, those of the models' forward passes.
        read_operations: Floating-point operations until both models have read their texts.
        score_operations: Of all forward passes after that, the descent control's backward passes included.
    """

    seconds: float
    memory_bytes: int
    disk_bytes: int
    download_bytes: int
    assumes: str
    forward_seconds: float
    read_operations: float
    score_operations: float


@dataclass(frozen=True)
class Check:
    """The result of `check`.

    Attributes:
        target: Facts of the target.
        source: Facts of the source.
        target_layout: Its projections, on the meta device.
        source_layout: Likewise.
        projections: Those that both have and the recipe wants.
        skipped: projection -> why not.
        licence: What the two models' licences make of the merge's.
        notes: What a user should know before starting.
        estimate: Expected cost here.
        base: Facts of the source before its fine-tuning, for a task vector.
        base_layout: Its projections.
    """

    target: ModelFacts
    source: ModelFacts
    target_layout: Architecture
    source_layout: Architecture
    projections: list[str]
    skipped: dict[str, str]
    licence: OutputLicence
    notes: list[str]
    estimate: Estimate
    base: ModelFacts | None = None
    base_layout: Architecture | None = None

    def to_dict(self) -> dict[str, Any]:
        """As ``tmerge check --json`` prints it."""
        return {
            "target": _model(self.target, self.target_layout),
            "source": _model(self.source, self.source_layout),
            "source_base": None if self.base is None else _model(self.base, self.base_layout or self.source_layout),
            "projections": {
                "matched": {
                    name: {
                        "target": _shape(self.target_layout, name),
                        "source": _shape(self.source_layout, name),
                    }
                    for name in self.projections
                },
                "skipped": self.skipped,
            },
            "left_alone": {"target": self.target_layout.left_alone, "source": self.source_layout.left_alone},
            "licence": asdict(self.licence),
            "notes": self.notes,
            "estimate": {
                "seconds": round(self.estimate.seconds, 3),
                "memory_bytes": self.estimate.memory_bytes,
                "disk_bytes": self.estimate.disk_bytes,
                "download_bytes": self.estimate.download_bytes,
                "assumes": self.estimate.assumes,
            },
        }


def check(recipe: Recipe) -> Check:
    """Hold a recipe's two models against each other.

    Raises:
        ModelNotFoundError, GatedModelError: A reference cannot be read.
        UnsupportedModelError: A model is not a causal decoder, or the two share no projection the recipe wants.
    """
    target, target_layout = _read(recipe.target, recipe)
    source, source_layout = _read(recipe.source, recipe)
    projections, skipped = match(target_layout, source_layout, recipe.fusion.projections)
    for role, layout in (("target", target_layout), ("source", source_layout)):
        for name in _uneven(layout, projections):
            projections.remove(name)
            skipped[name] = f"the {role}'s layers have it in different sizes, which one plan per feature cannot hold"
    if not projections:
        raise UnsupportedModelError(
            f"{recipe.target} and {recipe.source} share none of the projections "
            f"{', '.join(recipe.fusion.projections)} ({'; '.join(skipped.values())}); choose others in "
            "fusion.projections"
        )
    notes = []
    if target.commit == source.commit:
        notes.append("target and source are the same model: nothing new can be transported")
    models = [("target", target), ("source", source)]
    base, base_layout = (None, None) if recipe.source_base is None else _read_base(recipe, source_layout, projections)
    if base is not None:
        models.append(("source_base", base))
        if base.commit == source.commit:
            notes.append("source and source_base are the same model: the task vector is zero")
    for role, facts in models:
        if facts.gated:
            notes.append(f"the {role}'s repo is gated: its terms must have been accepted by your account")
        if facts.stored is not None and sum(facts.stored.values()) < facts.parameters:
            notes.append(
                f"the {role}'s files hold {sum(facts.stored.values()):,} values, fewer than its architecture's "
                f"{facts.parameters:,}: what is missing would start at random"
            )
    licence = output_licence(
        target.licence,
        source.licence,
        target_repo=target.reference.repo,
        source_repo=source.reference.repo,
        target_family=target.model_type,
        source_base=None if base is None else (base.licence, base.reference.repo),
    )
    notes += [*licence.refusals, *licence.unknown]
    layouts = (target_layout, source_layout)
    estimate = _estimate(recipe, target, source, base, *layouts, projections)
    return Check(target, source, *layouts, projections, skipped, licence, notes, estimate, base, base_layout)


def _read_base(recipe: Recipe, source_layout: Architecture, projections: list[str]) -> tuple[ModelFacts, Architecture]:
    """What the source was before its fine-tuning, which the fuse stage holds beside both."""
    base, layout = _read(recipe.source_base or "", recipe)
    if _shapes(layout, projections) != _shapes(source_layout, projections):
        raise UnsupportedModelError(
            f"source_base {recipe.source_base} is not of the source's shape; "
            "name the model that the source was fine-tuned from"
        )
    return base, layout


def refuse_unfit(result: Check, recipe: Recipe, out: Path) -> None:
    """Refuse a run that cannot fit, saying what to change.

    Raises:
        NotEnoughMemoryError, NotEnoughDiskError: With the needed and the free bytes.
    """
    needed = result.estimate.memory_bytes - psutil.Process().memory_info().rss
    device = pick_device(recipe.device)
    free = available_memory(device)
    if needed > free:
        raise NotEnoughMemoryError(
            f"this merge needs about {needed / 1e9:.1f} GB on {device}, where {free / 1e9:.1f} GB are free; "
            "set dtype: bfloat16, choose a smaller source, or lower calibration.batch_tokens"
        )
    folder = _existing(out)
    free = shutil.disk_usage(folder).free
    if result.estimate.disk_bytes > free:
        raise NotEnoughDiskError(
            f"this merge needs about {result.estimate.disk_bytes / 1e9:.1f} GB of disk in {out}, where "
            f"{free / 1e9:.1f} GB are free; lower calibration.texts, fuse fewer projections, or choose another --out"
        )
    cache = _existing(Path(constants.HF_HUB_CACHE))
    needed, free = result.estimate.download_bytes, shutil.disk_usage(cache).free
    if cache.stat().st_dev == folder.stat().st_dev:
        needed += result.estimate.disk_bytes
    if needed > free:
        raise NotEnoughDiskError(
            f"the models to download take {result.estimate.download_bytes / 1e9:.1f} GB, and {free / 1e9:.1f} GB are "
            "free on the disk of the Hub's cache; make room, or set HF_HOME to another disk"
        )


def _existing(folder: Path) -> Path:
    """The folder, or the nearest one above it that is there."""
    folder = folder.absolute()
    while not folder.exists():
        folder = folder.parent
    return folder


def _read(reference: str, recipe: Recipe) -> tuple[ModelFacts, Architecture]:
    trusted = trusts(recipe.trust_remote_code, reference)
    facts = read_facts(reference, trust_remote_code=trusted)
    if facts.commit is None:  # a local model: what identifies it is its contents
        facts = replace(facts, commit=model_commit(reference))
    return facts, describe(meta_model(facts.config, trusted))


def _model(facts: ModelFacts, layout: Architecture) -> dict[str, Any]:
    return {
        "ref": facts.reference.text,
        "commit": facts.commit,
        "architecture": facts.model_type,
        "parameters": facts.parameters,
        "weight_bytes": facts.weight_bytes,
        "layers": layout.num_layers,
        "hidden_size": layout.hidden_size,
        "heads": layout.heads,
        "kv_heads": layout.kv_heads,
        "licence": facts.licence,
        "gated": facts.gated,
        "private": facts.private,
        "stored": facts.stored,
        "download_bytes": facts.download_bytes,
        "tied_embeddings": bool(getattr(facts.config, "tie_word_embeddings", False)),
    }


def _shape(layout: Architecture, name: str) -> list[int]:
    view = layout.projections([name])[0]
    return [view.out_features, view.in_features]


def _shapes(layout: Architecture, projections: list[str]) -> list[list[int]]:
    return [[view.layer, view.out_features, view.in_features] for view in layout.projections(projections)]


def _body_parameters(layout: Architecture) -> int:
    return sum(view.out_features * view.in_features for view in layout.projections())


def _widths(layout: Architecture, projections: list[str]) -> dict[str, list[int]]:
    """Feature key -> the width in every layer that has it."""
    widths: dict[str, list[int]] = {}
    for tap in layout.taps(projections):
        widths.setdefault(tap.key, []).append(tap.features)
    return widths


def _uneven(layout: Architecture, projections: list[str]) -> list[str]:
    """Projections whose inputs or outputs are not of one size in all layers, as with gemma4's two head sizes."""
    widths = _widths(layout, projections)
    return [
        name for name in projections if any(len(set(widths[feature_key(name, side)])) > 1 for side in ("pre", "post"))
    ]


def _seconds_of(action: Any, at_least: float = 0.05) -> float:
    """Seconds of the fastest call, after a first that warms up, of as many as fill a moment.

    The fastest, as whatever else the machine does can only slow a call down.
    """
    action()
    fastest, until = float("inf"), time.perf_counter() + at_least
    while (began := time.perf_counter()) < until:
        action()
        fastest = min(fastest, time.perf_counter() - began)
    return fastest


def _estimate(
    recipe: Recipe,
    target: ModelFacts,
    source: ModelFacts,
    base: ModelFacts | None,
    target_layout: Architecture,
    source_layout: Architecture,
    projections: list[str],
) -> Estimate:
    device = pick_device(recipe.device)
    dtype = {"float32": torch.float32, "float16": torch.float16}.get(recipe.dtype, torch.bfloat16)
    if recipe.dtype == "auto" and not multiplies_fast(dtype, device):
        dtype = torch.float32  # as they are held here
    texts, dataset = recipe.calibration.texts, recipe.calibration.dataset
    if dataset.startswith(SAMPLES_PREFIX):
        texts = min(texts, len(sample_texts(dataset.removeprefix(SAMPLES_PREFIX))))
    held_out = min(recipe.evaluation.texts, round(texts * recipe.calibration.held_out))
    # With another run's plan nothing is calibrated: the models only read what is held out.
    read = 0 if recipe.plan is not None else texts - held_out
    tokens_per_text = min(recipe.calibration.max_tokens, TOKENS_PER_TEXT)

    side = 1024
    left = torch.randn(side, side, device=device).to(dtype)
    # float16 products are emulated on most CPUs; the measured rate shows it.
    flops = 2 * side**3 / _seconds_of(lambda: functional.linear(left, left)[0, 0].item())
    scored = 1 + 1 + len(recipe.evaluation.controls)
    if recipe.fusion.alpha == "auto":
        # The base once, and every alpha for every group of projections that has one here.
        groups = sum(any(name in projections for name in group) for group in PROJECTION_GROUPS)
        scored += 1 + groups * len(recipe.fusion.alphas)

    def forward(facts: ModelFacts, layout: Architecture, texts: int, scorings: float) -> float:
        """Operations to read some texts, and to score what is held out so often."""
        head = layout.hidden_size * int(facts.config.get_text_config().vocab_size)
        body = _body_parameters(layout)
        return 2 * tokens_per_text * (texts * body + scorings * held_out * (body + head))

    reading = forward(target, target_layout, read, 1) + forward(source, source_layout, read, 1)
    scoring = forward(target, target_layout, 0, scored - 1)
    # Of seconds, the descent control has no part: it is off unless asked for. A backward pass is two forward ones.
    slopes = 3 * min(recipe.evaluation.descent, read) / max(held_out, 1)
    forward_seconds = seconds = (reading + scoring) / flops

    width = 512
    working = working_dtype(recipe.transport.epsilon)
    features = standardise(torch.randn(read if read > 1 else 2, width), working).to(device)
    cost = correlation_cost(features, features)
    product = _seconds_of(lambda: correlation_cost(features, features)) / width**2
    solving = _seconds_of(lambda: sinkhorn(cost, recipe.transport.epsilon)) / width**2
    mine, theirs = _widths(target_layout, projections), _widths(source_layout, projections)
    entries = sum(sum(mine[key]) * sum(theirs[key]) for key in mine if key in theirs)
    if recipe.plan is None:
        seconds += entries * (product + solving)

    # All are held at once while weights are transported.
    models = [target, source] if base is None else [target, source, base]
    weights = sum(facts.parameters for facts in models) * torch.finfo(dtype).bits // 8
    vocabulary = max(int(facts.config.get_text_config().vocab_size) for facts in (target, source))
    logits = min(1 << 26, recipe.calibration.batch_tokens * vocabulary) * (torch.finfo(dtype).bits // 8 + 1)
    largest = max(max(mine[key]) * max(theirs[key]) for key in mine if key in theirs)
    problem = 3 * largest * working.itemsize * torch.get_num_threads()
    pooled = sum(map(sum, mine.values())) + sum(map(sum, theirs.values()))
    feature_bytes = 0 if recipe.plan is not None else 4 * texts * pooled
    checkpoint = target.parameters * torch.finfo(dtype).bits // 8  # at most: what was widened is saved as it was
    kept = min(recipe.transport.layers_kept, source_layout.num_layers)
    record = sum(
        sum(mine[key]) * min(recipe.transport.entries_kept, max(theirs[key])) * 4 * kept
        for key in mine
        if key in theirs
    )
    # A GGUF's weights are unpacked in float32 before they take the asked dtype.
    unpacked = max((4 * facts.parameters for facts in models if facts.reference.kind == "gguf"), default=0)
    # Reloading the checkpoint to compare it holds a second copy of the target, and the record exists twice while its
    # parts are joined.
    needed = weights + checkpoint + logits + problem + unpacked + 2 * record + min(feature_bytes, 1 << 30)
    memory = psutil.Process().memory_info().rss + _ALLOCATOR_SLACK * needed
    disk = checkpoint + feature_bytes + record
    return Estimate(
        seconds,
        int(memory),
        int(disk),
        # One commit is fetched once.
        sum({facts.commit: facts.download_bytes or 0 for facts in models}.values()),
        f"{read + held_out} texts of {tokens_per_text} tokens, {len(projections)} projections, on {device} at "
        f"{flops / 1e9:.0f} GFLOP/s measured now; downloading and loading not counted",
        forward_seconds,
        reading,
        scoring + forward(target, target_layout, 0, slopes),
    )


def keys_of(projections: list[str]) -> list[str]:
    """Feature keys of some projections, each once, in their order."""
    return list(dict.fromkeys(feature_key(name, side) for name in projections for side in ("pre", "post")))
