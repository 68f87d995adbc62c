"""A source's tokens in the target's vocabulary: the pieces that the target's tokenizer makes of each one's string.

They carry what the source predicts over to the target. At a character where both tokenizers end a token, each token of
the source gives its probability to its *first piece*, which is what the target would have to predict next to write it.
Further on, the target having written the first pieces pi of a token that the source has still before it, what follows
is known from the same prediction, conditioned on pi:

    q(t | pi) m = sum of p(s) over source tokens s whose pieces begin with pi t
                  / (sum of p(s) over those that begin with pi, and of p(s) over those of which no pieces are known)

m, what these sum to, is the share of the source's belief that is told: the rest is of tokens that end with pi, behind
which the source's next token would have to tell, and of tokens that have no string of their own (special ones, and
parts of characters).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tmerge.calibration import Span

__all__ = ["Pieces", "ToldPosition", "common_positions", "inner_positions"]

# Pieces of a token that are told apart; what comes after is not carried. A word of Thai is 15 bytes and more.
_DEPTH = 16
_STRINGS_AT_ONCE = 20_000


class ToldPosition(NamedTuple):
    """A token position of the target's at which the source tells the next token.

    Attributes:
        target: Position of the token that has just been read, within its text.
        source: Position of the source's token whose prediction tells.
        depth: How many of the target's tokens lie since the character at which both had ended a token.
    """

    target: int
    source: int
    depth: int


def common_positions(target_ends: Sequence[int], source_ends: Sequence[int]) -> list[ToldPosition]:
    """Positions of tokens that end at the same character, neither being the text's last.

    Args:
        target_ends: Of the target's tokens, from `complete_ends`.
        source_ends: Of the source's.
    """
    of_source = {end: position for position, end in enumerate(source_ends) if end >= 0}
    text_end = max(target_ends, default=-1)
    return [
        ToldPosition(position, of_source[end], 0)
        for position, end in enumerate(target_ends)
        if end in of_source and end < text_end
    ]


def inner_positions(
    common: Sequence[ToldPosition], target_spans: Sequence[Span], source_spans: Sequence[Span]
) -> list[ToldPosition]:
    """Positions behind common ones, of tokens with which the source's next one has not ended.

    Args:
        common: From `common_positions`.
        target_spans: Of the target's tokens.
        source_spans: Of the source's.
    """
    taken = {position.target for position in common}
    last = max((position for position, (start, end) in enumerate(target_spans) if end > start), default=0)
    inner = []
    for target, source, _ in common:
        next_start, next_end = source_spans[source + 1] if source + 1 < len(source_spans) else (0, 0)
        for depth in range(1, _DEPTH):
            here = target + depth
            # Behind the text's last token comes no other.
            if here >= last or here in taken or next_end <= next_start:
                break
            start, end = target_spans[here]
            if end <= start or end > next_end:
                break
            inner.append(ToldPosition(here, source, depth))
    return inner


@dataclass(frozen=True)
class Pieces:
    """What the target's tokenizer makes of each source token's string.

    Attributes:
        table: (V, depth) int32, each token's first pieces; -1 behind the last, and where it has no string of its own.
        counts: (V,) int32, how many there are in all.
    """

    table: Tensor
    counts: Tensor

    @classmethod
    def of(cls, source: Any, target: Any, rows: int | None = None) -> Pieces:
        """Of two tokenizers.

        Strings are found in context (after another token), so that a leading space survives: sentencepiece decoders
        drop it at the start of a text.

        Args:
            source: The source's.
            target: The target's.
            rows: Tokens that the source can predict; all that its tokenizer knows if None.
        """
        size = min(len(source), rows or len(source))
        anchor = source("a", add_special_tokens=False)["input_ids"][-1:]
        before = source.decode(anchor, skip_special_tokens=False)
        special = set(source.all_special_ids)
        strings: list[str] = []
        for start in range(0, size, _STRINGS_AT_ONCE):
            pairs = [[*anchor, token] for token in range(start, min(start + _STRINGS_AT_ONCE, size))]
            decoded = source.batch_decode(pairs, skip_special_tokens=False, clean_up_tokenization_spaces=False)
            strings += [text[len(before) :] if text.startswith(before) else "" for text in decoded]
        # Half a character is no string, and a special token's name is not its meaning.
        usable = [token for token, text in enumerate(strings) if text and "\ufffd" not in text and token not in special]
        nothing = [-1] * _DEPTH
        table, counts = [nothing] * size, [0] * size
        lead = target("\n", add_special_tokens=False)["input_ids"]
        for start in range(0, len(usable), _STRINGS_AT_ONCE):
            part = usable[start : start + _STRINGS_AT_ONCE]
            # After a newline, for tokenizers that put a space before a text's first word.
            led = target(["\n" + strings[token] for token in part], add_special_tokens=False)["input_ids"]
            for token, ids in zip(part, led, strict=True):
                if ids[: len(lead)] != lead or len(ids) == len(lead):
                    ids = lead + target(strings[token], add_special_tokens=False)["input_ids"]
                own = ids[len(lead) :]
                counts[token], table[token] = len(own), [*own, *nothing][:_DEPTH]
        return cls(torch.tensor(table, dtype=torch.int32), torch.tensor(counts, dtype=torch.int32))

    def known(self, chances: Tensor) -> Tensor:
        """(P,) how much of the source's belief (P, V') is on tokens of which pieces are known."""
        # A model's vocabulary may be padded past its tokenizer's.
        return chances[:, : len(self.counts)] @ (self.counts > 0).to(chances)

    @cached_property
    def _by_first(self) -> tuple[Tensor, Tensor]:
        """All tokens in the order of their first pieces, and these."""
        firsts, order = self.table[:, 0].sort(stable=True)
        return firsts, order

    def firsts(self, tokens: Tensor, chances: Tensor, known: Tensor) -> tuple[Tensor, Tensor]:
        """What comes first, where no piece has been written.

        Args:
            tokens: (P, k) the source's likeliest.
            chances: (P, k) their probabilities.
            known: (P,) from `known`.

        Returns:
            (P, k) ids of the target, -1 where there is none, and (P, k) q(t) m: those of one piece are summed, and
            stand for all that are known.
        """
        size = len(self.table)
        ids = torch.where(tokens < size, self.table[tokens.clamp(max=size - 1), 0].long(), -1)
        chances = chances.masked_fill(ids < 0, 0.0)
        order = ids.argsort(dim=1, stable=True)
        ids, chances = ids.gather(1, order), chances.gather(1, order)
        is_first = torch.ones_like(ids, dtype=torch.bool)
        is_first[:, 1:] = ids[:, 1:] != ids[:, :-1]
        group = is_first.long().cumsum(1) - 1
        summed = torch.zeros_like(chances).scatter_add_(1, group, chances)
        carried = torch.full_like(ids, -1).scatter_(1, group, ids)
        return carried, summed * (known / summed.sum(1).clamp_min(1e-9)).unsqueeze(1)

    def beginning(self, prefix: Sequence[int]) -> Tensor:
        """(c,) the tokens whose pieces begin with some, 1 to depth - 1 of them."""
        firsts, order = self._by_first
        low, high = torch.searchsorted(firsts, torch.tensor([prefix[0], prefix[0] + 1])).tolist()
        found = order[low:high]
        return found[(self.table[found, : len(prefix)] == torch.tensor(prefix)).all(1)]

    def following(self, tokens: Tensor, chances: Tensor, known: float, depth: int, most: int) -> tuple[Tensor, Tensor]:
        """What comes next, where some pieces have been written.

        Args:
            tokens: (c,) as `beginning` gives them.
            chances: (c,) their probabilities.
            known: As of `firsts`, at this position.
            depth: How many pieces have been written.
            most: Ids that are wanted.

        Returns:
            (r,) ids of the target, at most so many, and (r,) q(t | pi) m.
        """
        goes_on = self.counts[tokens] > depth
        pieces, group = self.table[tokens[goes_on], depth].unique(return_inverse=True)
        begun = float(chances.sum()) + max(0.0, 1.0 - known)
        summed = torch.zeros(len(pieces)).index_add_(0, group, chances[goes_on]) / max(begun, 1e-9)
        top = summed.topk(min(most, len(pieces)))
        return pieces[top.indices].long(), top.values
