"""What a run is expected to take on this machine, from two configs and the machine's speed.

The operations are counted, and are the same everywhere: who may run what is decided by them. Seconds are made of pieces
that are timed on this machine (`tmerge.preflight.seconds`); they are an estimate, shown as a range, and say what they
assume.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import psutil
import torch

from tmerge.calibration import batch_limit
from tmerge.evaluation import PROJECTION_GROUPS, most_scorings
from tmerge.models import STREAM, Architecture, ModelFacts, pick_device
from tmerge.models.agreed import own_share
from tmerge.preflight.counts import TextCounts
from tmerge.preflight.fitting import fitting_work, goal_bytes
from tmerge.preflight.holding import Place, carried_bytes, kept_bytes
from tmerge.preflight.joining import alone_scorings, carried_times, joining_passes
from tmerge.preflight.memory import computed_dtype, feature_bytes, peak_bytes, widths_of
from tmerge.preflight.pieces import Pieces
from tmerge.preflight.saved_adapter import adapter_bytes, factoring_seconds
from tmerge.preflight.seconds import (
    Pace,
    Passes,
    carrying_seconds,
    fitting_seconds,
    fusing_seconds,
    loading_seconds,
    saving_seconds,
    solving_seconds,
    tokenizer_seconds,
)
from tmerge.preflight.speed import SPEED_FILE, Timing
from tmerge.processes import on_this_machine
from tmerge.recipe import FITTED_CONTROLS, Recipe, Shared
from tmerge.transport import (
    ASKED_LAYERS,
    ASKED_NEURONS,
    COMPARED_WEIGHTS,
    HEAD_KEYS,
    PAIRING_NEURONS,
    PAIRING_ROWS,
    PAIRING_WEIGHTS,
    STREAM_KEYS,
)

__all__ = ["Estimate", "estimate_run", "scorings"]

# Beside its pieces a run does what is not counted, and they meet caches that others have emptied (docs/performance.md).
_BETWEEN = 1.2
# A run takes so many times the seconds that are expected: texts are shorter or longer than is assumed.
_LEAST, _MOST = 0.7, 1.5
# What is no product, counted as the operations of a product that takes as long, per entry of a problem's cost matrix:
# one Sinkhorn sweep, which waits for memory, and an assignment's search.
_SWEEP_OPERATIONS = 32
_SEARCH_OPERATIONS = 4000

# Feature key -> n of each layer that has it.
_Widths = dict[str, list[int]]


@dataclass(frozen=True)
class Estimate:
    """What a run is expected to take here.

    Attributes:
        stages: Stage -> its seconds on the idle machine, without download.
        memory_bytes: Peak of one process, of which several may share a machine.
        disk_bytes: In the output folder.
        download_bytes: Still to be fetched from the Hub into its cache.
        assumes: In words.
        forward_seconds: Of all, those of the models' forward passes.
        read_operations: Floating-point operations until both models have read their texts.
        score_operations: Of all forward passes after that, the descent control's backward passes included.
        solve_operations: Of the transport problems.
        fit_operations: Of a reconstruction, its forward passes included.
        measured: The dates (ISO 8601), earliest and latest, at which this machine's speed was measured.
    """

    stages: dict[str, float]
    memory_bytes: int
    disk_bytes: int
    download_bytes: int
    assumes: str
    forward_seconds: float
    read_operations: float
    score_operations: float
    solve_operations: float
    fit_operations: float
    measured: tuple[str, str]

    @property
    def seconds(self) -> float:
        """Of the whole run; `range_seconds` is what is shown."""
        return sum(self.stages.values())

    @property
    def operations(self) -> float:
        """Floating-point operations of the whole run, as counted from the configs and the recipe alone."""
        return self.read_operations + self.score_operations + self.solve_operations + self.fit_operations

    @property
    def range_seconds(self) -> tuple[float, float]:
        """Least and most seconds that the run is expected to take."""
        return _LEAST * self.seconds, _MOST * self.seconds

    @property
    def time_words(self) -> str:
        """The range as it is shown everywhere: ``about 2 to 4 min``."""
        low, high = self.range_seconds
        if high < 10:
            return "under 10 s"
        size, unit = (1.0, "s") if high < 100 else (60.0, "min") if high < 7200 else (3600.0, "h")
        return f"about {_rounded(low / size, math.floor)} to {_rounded(high / size, math.ceil)} {unit}"


def _rounded(value: float, to_whole: Callable[[float], int]) -> str:
    """In steps of about a twentieth to a tenth: an estimate is worth no more digits."""
    step = 0.5 if value < 10 else 1.0 if value < 20 else 5.0 if value < 100 else 10.0
    return f"{step * to_whole(value / step):g}"


def _body_parameters(layout: Architecture) -> int:
    return sum(view.out_features * view.in_features for view in layout.projections())


def scorings(recipe: Recipe, projections: list[str], held_out: int, choosing: int) -> float:
    """How often all held-out texts are scored with a model of the target's size, at most, the target itself included.

    Args:
        recipe: Of the run.
        projections: That are fused.
        held_out: How many texts decide the verdict.
        choosing: How many texts serve to choose alpha.
    """
    scored = 1.0 + 1 + len(recipe.evaluation.controls) + alone_scorings(recipe)
    if recipe.fusion.alpha == "auto":
        # The base once, and the alphas for all groups together and for each that there is here.
        tried = 1 + _groups(recipe, projections) * most_scorings(len(recipe.fusion.alphas), choosing)
        scored += tried * choosing / max(held_out, 1)
    return scored


def _groups(recipe: Recipe, projections: list[str]) -> int:
    """Of projections, or sources, whose alphas are chosen one after the other; and all of them together."""
    if recipe.sources:
        return len(recipe.sources) + (len(recipe.sources) > 1)
    named = {*projections, STREAM} if recipe.fusion.carries_stream else set(projections)
    groups = sum(not named.isdisjoint(group) for group in PROJECTION_GROUPS)
    return groups + (groups > 1)


def _trials(recipe: Recipe, projections: list[str]) -> float:
    """How often something is scored: of a race half of the alphas come to each round."""
    raced = 2 * len(recipe.fusion.alphas) * _groups(recipe, projections) if recipe.fusion.alpha == "auto" else 0
    return 1.0 + len(recipe.evaluation.controls) + alone_scorings(recipe) + raced


def _fusings(recipe: Recipe, projections: list[str]) -> float:
    """How often the target is changed, all of it counted as one: of a race half of the alphas come to each round."""
    fused = 2.0 + len(recipe.evaluation.controls) + alone_scorings(recipe) + bool(recipe.sources)  # joined, measured
    if recipe.fusion.alpha == "auto":
        groups = _groups(recipe, projections)
        # A group alone is a part of all.
        fused += 2 * len(recipe.fusion.alphas) * (2 if groups > 1 else 1)
    return fused


def estimate_run(
    recipe: Recipe,
    models: tuple[ModelFacts, ModelFacts, ModelFacts | None],
    layouts: tuple[Architecture, Architecture],
    projections: list[str],
    sources: Sequence[ModelFacts] = (),
) -> Estimate:
    """What a run is expected to take here.

    Args:
        recipe: Of the run.
        models: The target, the source, and the source before its fine-tuning, if there is one.
        layouts: The target's projections and the source's.
        projections: That are fused.
        sources: Several that are carried; then the source is their base.
    """
    target, source, _ = models
    target_layout, source_layout = layouts
    device = pick_device(recipe.device)
    dtype, source_dtype = (computed_dtype(facts, recipe, device) for facts in (target, source))
    counts = TextCounts.of(recipe)
    held_out, apart, read = counts.held_out, counts.apart, counts.read
    tokens_per_text, rows = counts.tokens_per_text, counts.rows

    scored = scorings(recipe, projections, held_out, min(recipe.evaluation.texts, apart))

    def forward(facts: ModelFacts, layout: Architecture, texts: int, scorings: float) -> float:
        """Operations to read some texts, and to score what is held out so often."""
        head = layout.hidden_size * int(facts.config.get_text_config().vocab_size)
        body = _body_parameters(layout)
        return 2 * tokens_per_text * (texts * body + scorings * held_out * (body + head))

    reading = forward(target, target_layout, read, 1) + forward(source, source_layout, read, 1)
    scoring = forward(target, target_layout, 0, scored - 1)
    # Of seconds, the descent control has no part: it is off unless asked for. A backward pass is two forward ones.
    slopes = 3 * min(recipe.evaluation.descent, read) / max(held_out, 1)
    fitting = fitting_work(recipe, layouts, counts.fitted)

    target_widths, source_widths = widths_of(target_layout, projections), widths_of(source_layout, projections)
    entries = 0.0 if recipe.plan is not None else _entries_of(recipe, target_widths, source_widths)

    pieces, threads = Pieces(device), _threads(device)
    paces = (
        Pace(pieces, target, target_layout, dtype, threads),
        Pace(pieces, source, source_layout, source_dtype, threads),
    )
    # The head's weights are read once more for each stretch of rows, which is part of its product's time.
    at_once = batch_limit(device, recipe.calibration.batch_tokens)
    scoring_passes, reading_passes = (math.ceil(tokens_per_text * count / at_once) for count in (held_out, read))
    passes = Passes(tokens_per_text * (read + held_out), tokens_per_text * held_out, scoring_passes + reading_passes)
    reads = [pace.seconds(passes, tokens_per_text) for pace in paces]
    tokens, trials = (scored - 1) * tokens_per_text * held_out, _trials(recipe, projections)
    rescored = paces[0].seconds(Passes(tokens, tokens, max((scored - 1) * scoring_passes, trials)), tokens_per_text)
    carried = carried_bytes(recipe, target, target_layout, projections)
    checkpoint = target.parameters * torch.finfo(dtype).bits // 8  # at most: what was widened is saved as it was
    if recipe.save.form == "adapter":
        checkpoint = adapter_bytes(recipe, (target, source), target_layout, projections)
    reducing, factoring = factoring_seconds(pieces, recipe, source, target_layout, projections, threads)
    # A neuron's weights are compared as its features are: mostly as many as the stream is wide.
    compared = rows + (min(target_layout.hidden_size, COMPARED_WEIGHTS) if recipe.matches_by_weights else 0)
    products = _pairing_products(recipe, target_widths, source_widths, target_layout.hidden_size) if entries else 0.0
    stages = {
        "texts": sum(tokenizer_seconds(pieces, facts) for facts in (target, source)),
        "target": loading_seconds(pieces, target, dtype) + reads[0],
        # With an adapter it is read without it, and scored with it.
        "source": (1 + (recipe.adapter is not None)) * loading_seconds(pieces, source, source_dtype) + reads[1],
        "transport": solving_seconds(pieces, recipe, entries, compared, products, threads) if entries else 0.0,
        "fuse": carried_times(recipe) * carrying_seconds(pieces, recipe, layouts, projections, rows) + reducing,
        "evaluate": rescored
        + fusing_seconds(pieces, carried / 4, _fusings(recipe, projections), threads, joining_passes(recipe)),
        "save": saving_seconds(pieces, checkpoint) + factoring,
    }
    if fitting.passes:
        stages["reconstruct"] = fitting_seconds(pieces, fitting, paces[0], tokens_per_text, threads)
        del stages["fuse"]
    solving = _solving_operations(recipe, entries, compared, products)

    held = [*(facts for facts in models if facts is not None), *sources]
    features = feature_bytes(recipe, models, layouts, projections, counts, device)
    kept = 1 if isinstance(recipe.transport, Shared) else min(recipe.transport.layers_kept, source_layout.num_layers)
    record = sum(
        sum(target_widths[key]) * min(_entries(recipe), max(source_widths[key])) * 4 * kept
        for key in target_widths
        if key in source_widths
    )
    kinds = 1 + len(set(FITTED_CONTROLS) & set(recipe.evaluation.controls))
    own_files = [facts for facts, named in zip(sources, recipe.sources, strict=False) if named.adapter is None]
    read_from_files = (*models[1 - recipe.matches_by_weights :], *own_files)
    packed = [facts for facts in read_from_files if facts is not None and facts.reference.kind == "gguf"]
    needed = peak_bytes(recipe, models, layouts, projections, counts, Place(device, own_share(device)), own_files)
    memory = psutil.Process().memory_info().rss + needed
    unpacked = len(packed) * kept_bytes(recipe, source_layout, projections)
    goals = goal_bytes(recipe, target_layout, counts.fitted * tokens_per_text)
    disk = checkpoint + features + record + kinds * carried_times(recipe) * carried + unpacked + goals
    return Estimate(
        {name: _BETWEEN * seconds for name, seconds in stages.items()},
        memory,
        int(disk),
        # One commit is fetched once.
        sum({_fetched(facts): facts.download_bytes or 0 for facts in held}.values()),
        f"{read + apart + held_out} texts of {tokens_per_text} tokens, {len(projections)} projections, on {device}"
        f"{_each_words(on_this_machine())}, "
        f"{_measured_words(pieces.timings)}; downloading, and what precedes the first stage, not counted",
        _BETWEEN * (sum(reads) + rescored),
        reading,
        scoring + forward(target, target_layout, 0, slopes),
        solving,
        fitting.operations(tokens_per_text),
        (min(timing.measured for timing in pieces.timings), max(timing.measured for timing in pieces.timings)),
    )


def _fetched(facts: ModelFacts) -> str | None:
    """What identifies the files that are fetched of a model."""
    return facts.commit if facts.adapter is None else facts.adapter.base_commit


def _each_words(processes: int) -> str:
    return "" if processes == 1 else f" (the memory in each of {processes} processes here, the time that of one)"


def _measured_words(timings: list[Timing]) -> str:
    when = " and ".join(sorted({timing.measured for timing in timings}))
    if not all(timing.settled for timing in timings):
        return f"measured on {when} beside other work, and once more at a later look"
    return f"measured on {when} (delete {SPEED_FILE} in tmerge's cache to measure anew)"


def _threads(device: torch.device) -> int:
    """That share the work; a processor is timed in one."""
    return torch.get_num_threads() if device.type == "cpu" else 1


def _entries_of(recipe: Recipe, target_widths: _Widths, source_widths: _Widths) -> float:
    """Entries of all problems' cost matrices."""
    if isinstance(recipe.transport, Shared):
        # Pairs of layers; and, of some of their neurons, four times what relatedness asks: of two halves, and shuffled.
        both = [(target_widths[key], max(source_widths[key])) for key in target_widths if key in source_widths]
        asked = sum(
            min(ASKED_LAYERS, len(widths)) * min(ASKED_NEURONS, max(widths)) * width for widths, width in both if widths
        )
        return float(sum(sum(widths) * width for widths, width in both) + 4 * asked)
    return float(
        sum(sum(target_widths[key]) * sum(source_widths[key]) for key in target_widths if key in source_widths)
    )


def _is_matched(recipe: Recipe) -> bool:
    """Whether the problems are assignments, and not solved by Sinkhorn's sweeps."""
    return isinstance(recipe.transport, Shared) and recipe.transport.matching == "one-to-one"


def _pairing_products(recipe: Recipe, target_widths: _Widths, source_widths: _Widths, hidden_size: int) -> float:
    """Of every target layer's neurons that are asked with all of the source's, to pair the layers of one structure."""
    if not isinstance(recipe.transport, Shared):
        return 0.0
    products, common = 0.0, target_widths.keys() & source_widths.keys()
    weighed = (common & set(HEAD_KEYS)) or (common - set(STREAM_KEYS))
    for key in common:
        widths, others = target_widths[key], sum(source_widths[key])
        products += others * PAIRING_ROWS * sum(min(PAIRING_NEURONS, width) for width in widths)
        if recipe.matches_by_weights and key in weighed:
            products += others * hidden_size * sum(min(PAIRING_WEIGHTS, width) for width in widths)
    return products


def _solving_operations(recipe: Recipe, entries: float, rows: int, products: float) -> float:
    """Of the transport stage, of which `rows` of every two neurons are compared, after so many products."""
    solved = _SEARCH_OPERATIONS if _is_matched(recipe) else _SWEEP_OPERATIONS * recipe.transport.max_iterations
    return entries * (2 * rows + solved) + 2 * products


def _entries(recipe: Recipe) -> int:
    """Of a plan's row that are kept, at most."""
    return 1 if _is_matched(recipe) else recipe.transport.entries_kept
