"""Single tokens as rows of the features, where two tokenizations of a text agree (``calibration.rows: tokens``).

A mean over a text's tokens blurs most of what tells neurons apart. A single token's features can be held against the
other model's where a token of both ends: up to there both have read the same characters. The first token is
left out, since the few massive activations that many models keep there would decide every correlation.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from tmerge.errors import TokenizerError

__all__ = ["MINIMUM_ROWS", "Span", "common_ends", "complete_ends", "token_positions"]

_TEXTS_AT_ONCE = 512
MINIMUM_ROWS = 16
"""Fewest rows: a correlation over less says nothing."""

Span = tuple[int, int]
"""Where in its text a token lies, in characters: the first, and one behind the last; a special token has none."""


def complete_ends(spans: Sequence[Span]) -> list[int]:
    """Where each token ends; -1 of special ones, and of those whose last character the next token still writes on."""
    following = [*spans[1:], (0, 0)]
    return [
        end if end > start and (next_end <= next_start or next_start >= end) else -1
        for (start, end), (next_start, next_end) in zip(spans, following, strict=False)
    ]


def common_ends(
    target: PreTrainedTokenizerBase,
    source: PreTrainedTokenizerBase,
    texts: Sequence[str],
    *,
    limits: tuple[int, int],
    wanted: int | None,
    seed: int,
) -> tuple[tuple[int, ...], ...]:
    """Where in each text to read both models.

    Args:
        target: The target's tokenizer.
        source: The source's.
        texts: T texts.
        limits: Most tokens of a text, for each of the two.
        wanted: Positions in all, at most; None for the last of each text.
        seed: Of the choice.

    Returns:
        Per text, characters after which a token of both ends, ascending; about as many of each text, or all it has.

    Raises:
        TokenizerError: A tokenizer does not know where its tokens lie in the text, or they hardly ever agree.
    """
    target_ends, source_ends = _ends(target, texts, limits[0]), _ends(source, texts, limits[1])
    if wanted is None:
        last = tuple(
            tuple(sorted(set(of_target) & set(of_source))[-1:])
            for of_target, of_source in zip(target_ends, source_ends, strict=True)
        )
        _refuse_too_few(sum(map(len, last)), len(texts))
        return last
    per_text = -(-wanted // max(1, len(texts)))
    draw = random.Random(seed)
    chosen = []
    for of_target, of_source in zip(target_ends, source_ends, strict=True):
        common = sorted(set(of_target) & set(of_source))
        chosen.append(draw.sample(common, min(per_text, len(common))))
    positions = [(row, end) for row, of_text in enumerate(chosen) for end in of_text]
    _refuse_too_few(len(positions), len(texts))
    kept = draw.sample(positions, min(wanted, len(positions)))
    return tuple(tuple(sorted(end for _, end in group)) for group in _by_row(kept, len(texts)))


def _refuse_too_few(positions: int, texts: int) -> None:
    if positions < MINIMUM_ROWS:
        raise TokenizerError(
            f"the two tokenizers end a token in the same place only {positions} times in {texts} texts, where "
            f"{MINIMUM_ROWS} are needed; give more or longer texts, or set calibration.rows: texts"
        )


def _by_row(positions: Sequence[tuple[int, int]], rows: int) -> list[list[tuple[int, int]]]:
    groups: list[list[tuple[int, int]]] = [[] for _ in range(rows)]
    for position in positions:
        groups[position[0]].append(position)
    return groups


def token_positions(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], ends: Sequence[Sequence[int]], limit: int
) -> list[list[int]]:
    """Per text, the index of the token that ends at each of its `ends`.

    Args:
        tokenizer: Of the model that is read.
        texts: As given to `common_ends`.
        ends: What it returned.
        limit: As there.
    """
    at_ends = _ends(tokenizer, texts, limit)
    return [[positions[end] for end in text_ends] for positions, text_ends in zip(at_ends, ends, strict=True)]


def _ends(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], limit: int) -> list[dict[int, int]]:
    """Per text: character -> the token that has read all up to there, the first token of the text left out."""
    if not tokenizer.is_fast:
        raise TokenizerError(
            f"the tokenizer of {tokenizer.name_or_path or 'a model'} does not say where in a text its tokens lie, "
            "which calibration.rows: tokens needs; set calibration.rows: texts"
        )
    ends: list[dict[int, int]] = []
    for start in range(0, len(texts), _TEXTS_AT_ONCE):
        chunk = list(texts[start : start + _TEXTS_AT_ONCE])
        encoded = tokenizer(chunk, return_offsets_mapping=True, truncation=False, padding=False, verbose=False)
        for offsets in encoded["offset_mapping"]:
            first = next((position for position, (begin, end) in enumerate(offsets) if end > begin), 0)
            complete = enumerate(complete_ends(offsets)[:limit])
            ends.append({end: position for position, end in complete if end >= 0 and position > first})
    return ends
