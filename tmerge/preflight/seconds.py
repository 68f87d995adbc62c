"""How long a run's stages are expected to take on this machine when it is idle: their work, in pieces timed here."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from tmerge.fusion import COLUMN_PROJECTIONS, neuron_count
from tmerge.models import Architecture, ModelFacts
from tmerge.models.projections import feature_key
from tmerge.preflight.fitting import FittingWork
from tmerge.preflight.pieces import WIDTH, Pieces
from tmerge.recipe import Recipe, Shared
from tmerge.transport import working_dtype

__all__ = [
    "Pace",
    "Passes",
    "carrying_seconds",
    "fitting_seconds",
    "fusing_seconds",
    "loading_seconds",
    "saving_seconds",
    "solving_seconds",
    "tokenizer_seconds",
]

# What is done around a tokenizer's building, in units of it: from its own file, and from a GGUF file, whose merges are
# made again. And around the unpacking of weights, until they are a model's: parsed, turned, checked, copied.
_TOKENIZER, _GGUF_TOKENIZER, _UNPACKED = 3, 8, 8
# How often a value is passed over when it is fused: read, added, written, and what was there before read and written.
_REPLACED = 8
# How often a block's elementwise parts pass over the stream (two norms, two sums), over what leaves q and k (rotary
# embeddings) and over an MLP's neurons (the activation and the product with the gate); and over the logits of a token,
# of which a softmax is taken in float32.
_STREAM, _TURNED, _ACTIVATED, _LOGITS = 14, 4, 3, 5


@dataclass(frozen=True)
class Passes:
    """What a model reads.

    Attributes:
        body: Tokens that pass its blocks.
        head: Tokens whose logits are made, too.
        count: Forward passes, each of which reads all weights.
    """

    body: float
    head: float
    count: float = 0.0


class Pace:
    """How fast a model reads.

    Args:
        pieces: Of the machine.
        facts: The model.
        layout: Its projections.
        dtype: That it computes in.
        threads: That share the work.
    """

    def __init__(
        self, pieces: Pieces, facts: ModelFacts, layout: Architecture, dtype: torch.dtype, threads: int
    ) -> None:
        passed, attention = pieces.passing(dtype), pieces.attention(dtype)
        views = layout.projections()
        largest = max(views, key=lambda view: view.out_features * view.in_features)
        # All of a model's products run at about one speed, that of its largest.
        a_value = pieces.product(largest.in_features, largest.out_features, dtype) / (
            largest.in_features * largest.out_features
        )
        values = sum(view.out_features * view.in_features for view in views)
        queries = sum(view.out_features for view in views if view.name == "q")
        turned = sum(view.out_features for view in views if view.name in ("q", "k"))
        activated = sum(view.out_features for view in views if view.name == "up")
        over = _STREAM * layout.num_layers * layout.hidden_size + _TURNED * turned + _ACTIVATED * activated
        self.block_values = values
        self._of_products = a_value / threads
        self._beside = (over * passed) / threads
        self._attention = queries * attention / threads
        vocabulary = int(facts.config.get_text_config().vocab_size)
        head = pieces.product(layout.hidden_size, vocabulary, dtype)
        self._head = (head + _LOGITS * vocabulary * pieces.passing(torch.float32)) / threads
        self._pass = facts.parameters * pieces.streaming(dtype) / threads

    def seconds(self, passes: Passes, tokens_per_text: int) -> float:
        """Of reading so much, in texts of so many tokens."""
        token = self.block_values * self._of_products + self._beside + self._attention * tokens_per_text
        return passes.count * self._pass + passes.body * token + passes.head * self._head


def loading_seconds(pieces: Pieces, facts: ModelFacts, dtype: torch.dtype) -> float:
    """Of bringing a model's weights from its files, which are in memory, into the dtype that they are held in."""
    seconds = pieces.conversion(dtype)
    if facts.reference.kind == "gguf":
        seconds += _UNPACKED * pieces.unpacking()
    return facts.parameters * seconds


def tokenizer_seconds(pieces: Pieces, facts: ModelFacts) -> float:
    """Of building a model's tokenizer."""
    around = _GGUF_TOKENIZER if facts.reference.kind == "gguf" else _TOKENIZER
    return around * int(facts.config.get_text_config().vocab_size) * pieces.vocabulary()


def fusing_seconds(pieces: Pieces, values: float, times: float, threads: int, joining: int = 0) -> float:
    """Of writing so many values into the target, so often, and what was there before in their place again.

    Args:
        pieces: Of the machine.
        values: How many.
        times: How often.
        threads: That share the work.
        joining: How often each is passed over before, where it is joined of several sources'.
    """
    return (_REPLACED + joining) * values * times * pieces.passing(torch.float32) / threads


def saving_seconds(pieces: Pieces, checkpoint: int) -> float:
    """Of writing a checkpoint of so many bytes, hashing it and reading it again."""
    return checkpoint * (pieces.writing() + pieces.hashing() + pieces.conversion(torch.bfloat16) / 2)


def solving_seconds(pieces: Pieces, recipe: Recipe, entries: float, rows: int, products: float, threads: int) -> float:
    """Of the transport stage, a problem a thread.

    Args:
        pieces: Of the machine.
        recipe: Says which problems there are.
        entries: Of all problems' cost matrices.
        rows: Of the features.
        products: Of numbers, by which layers are paired.
        threads: That share the work.
    """
    working = working_dtype(recipe.transport.epsilon, pieces.device)
    if isinstance(recipe.transport, Shared):
        solved = pieces.matching()
    else:
        solved = pieces.sweeps(recipe.transport.epsilon, working)
    # Assignments are the processor's, wherever the costs come from.
    solvers = torch.get_num_threads() if isinstance(recipe.transport, Shared) else threads
    return pieces.costs(working) * (entries * rows + products) / threads + entries * solved / solvers


def carrying_seconds(
    pieces: Pieces,
    recipe: Recipe,
    layouts: tuple[Architecture, Architecture],
    projections: list[str],
    rows: int,
) -> float:
    """Of Phi_out W Phi_in for all projections: by every thread the layers that are its own, or on the accelerator.

    Args:
        pieces: Of the machine.
        recipe: Of the run.
        layouts: The target's projections and the source's.
        projections: That are fused.
        rows: Of the features that a plan is made of again.
    """
    target, source = layouts
    others = {view.name: view for view in reversed(source.projections(projections))}
    feeding = None if isinstance(recipe.transport, Shared) else min(recipe.transport.layers_kept, source.num_layers)
    # Neurons that are moved are so on the CPU, wherever dense maps are met.
    workers = torch.get_num_threads() if feeding is None or pieces.device.type == "cpu" else 1
    seconds = 0.0
    made: set[tuple[int, str]] = set()
    for view in target.projections(projections):
        if view.name not in others:
            continue
        other = others[view.name]
        by_columns = view.name in COLUMN_PROJECTIONS
        chosen = neuron_count(
            getattr(recipe.fusion, "top_k", 1.0), view.in_features if by_columns else view.out_features
        )
        if feeding is None:
            # Rows and columns are picked; the source's weight is read, and its base's.
            moved = 2 * other.out_features * other.in_features + 2 * chosen * (other.in_features + view.in_features)
            seconds += moved * pieces.passing(torch.float32)
            continue
        first, last = (other.out_features, view.out_features) if by_columns else (other.in_features, view.in_features)
        # The chosen neurons' map is met first, the map of the other end then.
        inner = other.in_features if by_columns else other.out_features
        each = chosen * pieces.product(inner, first, torch.float32, pieces.device)
        each += chosen * pieces.product(first, last, torch.float32, pieces.device)
        for end, sizes in (
            ("pre", view.in_features * other.in_features),
            ("post", view.out_features * other.out_features),
        ):
            if (view.layer, feature_key(view.name, end)) not in made:
                made.add((view.layer, feature_key(view.name, end)))
                each += sizes * (rows * pieces.costs(torch.float32) + pieces.recording(recipe.transport.entries_kept))
        seconds += feeding * each
    return seconds * (1 + ("permuted" in recipe.evaluation.controls)) / workers


def fitting_seconds(pieces: Pieces, work: FittingWork, pace: Pace, tokens_per_text: int, threads: int) -> float:
    """Of a reconstruction: both models' passes, at the target's pace, and the sums and the equations of its fits."""
    if not work.passes:
        return 0.0
    passes = pace.seconds(Passes(1, 0), tokens_per_text) / (2 * pace.block_values) * work.passes
    sums = pieces.product(WIDTH, 4 * WIDTH, torch.float32) / (2 * 4 * WIDTH**2) * work.sums / threads
    return tokens_per_text * (passes + sums) + pieces.equations() * work.solved / threads
