"""What a run is expected to take on this machine, from two configs and a moment's measuring.

Seconds come from this machine's own speed times the operations that the run will do; they are an estimate and say what
they assume.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import psutil
import torch
from torch.nn import functional

from tmerge.calibration import SAMPLES_PREFIX, sample_texts
from tmerge.evaluation import PROJECTION_GROUPS
from tmerge.fusion import COLUMN_PROJECTIONS, neuron_count
from tmerge.models import STREAM, Architecture, ModelFacts, multiplies_fast, pick_device
from tmerge.recipe import Recipe
from tmerge.transport import correlation_cost, match, sinkhorn, standardise, working_dtype

__all__ = ["TOKENS_PER_TEXT", "Estimate", "estimate_run", "widths_of"]

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


def _body_parameters(layout: Architecture) -> int:
    return sum(view.out_features * view.in_features for view in layout.projections())


def widths_of(layout: Architecture, projections: list[str]) -> dict[str, list[int]]:
    """Feature key -> the width in every layer that has it."""
    widths: dict[str, list[int]] = {}
    for tap in layout.taps(projections):
        widths.setdefault(tap.key, []).append(tap.features)
    return widths


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


def estimate_run(
    recipe: Recipe,
    models: tuple[ModelFacts, ModelFacts, ModelFacts | None],
    layouts: tuple[Architecture, Architecture],
    projections: list[str],
) -> Estimate:
    """What a run is expected to take here.

    Args:
        recipe: Of the run.
        models: The target, the source, and the source before its fine-tuning, if there is one.
        layouts: The target's projections and the source's.
        projections: That are fused.
    """
    target, source, _ = models
    target_layout, source_layout = layouts
    device = pick_device(recipe.device)
    dtype = {"float32": torch.float32, "float16": torch.float16}.get(recipe.dtype, torch.bfloat16)
    if recipe.dtype == "auto" and (not multiplies_fast(dtype, device) or _itemsize(target, recipe, dtype) == 4):
        dtype = torch.float32  # as they are held here
    texts = _most_texts(recipe.calibration.dataset, recipe.calibration.texts)
    held_out = min(recipe.evaluation.texts, round(texts * recipe.calibration.held_out))
    # With another run's plan nothing is calibrated: the models only read what is held out.
    read = texts - held_out
    if recipe.calibration.match_on is not None:
        read = _most_texts(recipe.calibration.match_on, recipe.calibration.texts)
    if recipe.plan is not None:
        read = 0
    tokens_per_text = min(recipe.calibration.max_tokens, TOKENS_PER_TEXT)

    side = 1024
    left = torch.randn(side, side, device=device).to(dtype)
    # float16 products are emulated on most CPUs; the measured rate shows it.
    flops = 2 * side**3 / _seconds_of(lambda: functional.linear(left, left)[0, 0].item())
    scored = 1 + 1 + len(recipe.evaluation.controls)
    if recipe.fusion.alpha == "auto":
        # The base once, and every alpha for all groups of projections together and for each that has one here.
        named = {*projections, STREAM} if recipe.fusion.stream else set(projections)
        groups = sum(not named.isdisjoint(group) for group in PROJECTION_GROUPS)
        groups += groups > 1
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

    mine, theirs = widths_of(target_layout, projections), widths_of(source_layout, projections)
    by_token = recipe.calibration.rows == "tokens"
    rows = min(recipe.calibration.token_rows, read * tokens_per_text) if by_token else read
    if recipe.plan is None:
        seconds += _solving_seconds(recipe, mine, theirs, rows, device)

    # All are held at once while weights are transported.
    held = [facts for facts in models if facts is not None]
    weights = sum(facts.parameters * _itemsize(facts, recipe, dtype) for facts in held)
    vocabulary = max(int(facts.config.get_text_config().vocab_size) for facts in (target, source))
    logits = min(1 << 26, recipe.calibration.batch_tokens * vocabulary) * (torch.finfo(dtype).bits // 8 + 1)
    sizes = [max(mine[key]) * max(theirs[key]) for key in mine if key in theirs]
    if recipe.transport.structure == "shared":
        problem = sum(sizes) * 8 + max(sizes) * 16  # one pair of layers at a time, all features of it
    else:
        problem = 3 * max(sizes) * working_dtype(recipe.transport.epsilon).itemsize * torch.get_num_threads()
    pooled = sum(map(sum, mine.values())) + sum(map(sum, theirs.values()))
    feature_bytes = 0 if recipe.plan is not None else 4 * rows * pooled
    checkpoint = target.parameters * torch.finfo(dtype).bits // 8  # at most: what was widened is saved as it was
    kept = min(recipe.transport.layers_kept, source_layout.num_layers)
    if recipe.transport.structure == "shared":
        kept = 1
    record = sum(sum(mine[key]) * min(_entries(recipe), max(theirs[key])) * 4 * kept for key in mine if key in theirs)
    # A GGUF's weights are unpacked in float32 before they take the asked dtype.
    unpacked = max((4 * facts.parameters for facts in held if facts.reference.kind == "gguf"), default=0)
    # Reloading the checkpoint to compare it holds a second copy of the target, and the record exists twice while its
    # parts are joined.
    each = _carried_bytes(recipe, target, target_layout, projections)
    carried = each * (2 if "permuted" in recipe.evaluation.controls else 1)
    # While a control is scored there are also the control itself and the neurons that it took the place of.
    needed = weights + checkpoint + logits + problem + unpacked + 2 * record + carried + 2 * each
    needed += min(feature_bytes, 1 << 30)
    memory = psutil.Process().memory_info().rss + _ALLOCATOR_SLACK * needed
    disk = checkpoint + feature_bytes + record + carried
    return Estimate(
        seconds,
        int(memory),
        int(disk),
        # One commit is fetched once.
        sum({facts.commit: facts.download_bytes or 0 for facts in held}.values()),
        f"{read + held_out} texts of {tokens_per_text} tokens, {len(projections)} projections, on {device} at "
        f"{flops / 1e9:.0f} GFLOP/s measured now; downloading and loading not counted",
        forward_seconds,
        reading,
        scoring + forward(target, target_layout, 0, slopes),
    )


def _most_texts(dataset: str, wanted: int) -> int:
    """As many as are asked for, or as the built-in samples have."""
    if not dataset.startswith(SAMPLES_PREFIX):
        return wanted
    return min(wanted, len(sample_texts(dataset.removeprefix(SAMPLES_PREFIX))))


def _solving_seconds(
    recipe: Recipe, mine: dict[str, list[int]], theirs: dict[str, list[int]], rows: int, device: torch.device
) -> float:
    """Of the transport stage: the measured time of a small problem, by the sizes of those that there are."""
    width = 512
    working = working_dtype(recipe.transport.epsilon)
    features = standardise(torch.randn(max(rows, 2), width), working).to(device)
    cost = correlation_cost(features, features)
    product = _seconds_of(lambda: correlation_cost(features, features)) / width**2
    if recipe.transport.structure == "shared":
        # Pairs of layers alone, and of an eighth of them as much again for each half that relatedness looks at.
        entries = sum(sum(mine[key]) * max(theirs[key]) for key in mine if key in theirs)
        small = cost.float().cpu()
        return 1.5 * entries * (product + _seconds_of(lambda: match(small)) / width**2)
    entries = sum(sum(mine[key]) * sum(theirs[key]) for key in mine if key in theirs)
    return entries * (product + _seconds_of(lambda: sinkhorn(cost, recipe.transport.epsilon)) / width**2)


def _entries(recipe: Recipe) -> int:
    """Of a plan's row that are kept, at most."""
    matched = recipe.transport.structure == "shared" and recipe.transport.matching == "one-to-one"
    return 1 if matched else recipe.transport.entries_kept


def _itemsize(facts: ModelFacts, recipe: Recipe, dtype: torch.dtype) -> int:
    """Bytes that a model's values are held in: with dtype auto those that they are stored in, if these are more."""
    if recipe.dtype != "auto" or facts.reference.kind == "gguf":
        return dtype.itemsize
    return max(dtype.itemsize, 4 if facts.weight_bytes > 3 * facts.parameters else 2)


def _carried_bytes(recipe: Recipe, target: ModelFacts, layout: Architecture, projections: list[str]) -> int:
    """What is transported, in float32."""
    values = 0
    for view in layout.projections(projections):
        by_columns = view.name in COLUMN_PROJECTIONS
        neurons, across = (view.in_features, view.out_features) if by_columns else (view.out_features, view.in_features)
        values += neuron_count(recipe.fusion.top_k, neurons) * across
    if recipe.fusion.stream:
        values += layout.hidden_size * int(target.config.get_text_config().vocab_size)
    return 4 * values
