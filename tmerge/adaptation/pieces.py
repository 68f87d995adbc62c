"""A source's tokens in the target's vocabulary: the pieces that the target's tokenizer makes of each one's string.

They carry what the source predicts over to the target. At a character where both tokenizers end a token, each token of
the source gives its probability to its *first piece*, which is what the target would have to predict next to write it.
Further on, the target having written the first pieces pi of a token that the source has still before it, what follows
is known from the same prediction, conditioned on pi:

    q(t | pi) = sum of p(s) over source tokens s whose pieces begin with pi t  /  the same sum over pi and more

These sum to m, the share of what begins with pi that goes on past it; of the rest the source's next token would have to
tell.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

__all__ = ["Pieces", "Place", "common_positions", "inner_positions"]

# Pieces of a token that are told apart; what comes after is not carried. A word of Thai is 15 bytes and more.
_DEPTH = 16
_STRINGS_AT_ONCE = 20_000


class Place(NamedTuple):
    """Where the source says what the target's next token is.

    Attributes:
        position: Of the target's token that has just been read, within its text.
        source_position: Of the source's, whose prediction tells.
        depth: How many of the target's tokens lie since the character at which both had ended a token.
    """

    position: int
    source_position: int
    depth: int


def common_positions(target_ends: Sequence[int], source_ends: Sequence[int]) -> list[Place]:
    """Places of tokens that end at the same character, neither being the text's last.

    Args:
        target_ends: Where each of the target's tokens ends, in characters; -1 for special tokens.
        source_ends: Likewise of the source.

    A character that several tokens write is complete only with the last of them.
    """
    last_of_source = {end: position for position, end in enumerate(source_ends) if end >= 0}
    last_of_target = {end: position for position, end in enumerate(target_ends) if end >= 0}
    text_end = max([*last_of_target, 0])
    return [
        Place(position, last_of_source[end], 0)
        for end, position in last_of_target.items()
        if end in last_of_source and end < text_end
    ]


def inner_positions(target_ends: Sequence[int], source_ends: Sequence[int]) -> list[Place]:
    """Places behind those, of tokens with which the source's next one has not ended; the same arguments."""
    common = common_positions(target_ends, source_ends)
    taken = {place.position for place in common}
    inner = []
    for position, source_position, _ in common:
        following = source_ends[source_position + 1] if source_position + 1 < len(source_ends) else -1
        for depth in range(1, _DEPTH):
            here = position + depth
            # Of tokens that write one character together all but the last have not ended it.
            if here >= len(target_ends) - 1 or here in taken or not 0 <= target_ends[here] <= following:
                break
            inner.append(Place(here, source_position, depth))
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

    @cached_property
    def _by_first(self) -> tuple[Tensor, Tensor]:
        """All tokens in the order of their first pieces, and these."""
        firsts, order = self.table[:, 0].sort(stable=True)
        return firsts, order

    def firsts(self, tokens: Tensor, chances: Tensor) -> tuple[Tensor, Tensor]:
        """What comes first, of the likeliest tokens at some places.

        Args:
            tokens: (P, k) of the source.
            chances: (P, k) their probabilities.

        Returns:
            (P, k) ids of the target, -1 where there is none, and (P, k) their probabilities: those of one piece are
            summed, and rows sum to 1 over what could be carried.
        """
        # A model's vocabulary may be padded past its tokenizer's.
        size = len(self.table)
        known = torch.where(tokens < size, self.table[tokens.clamp(max=size - 1), 0].long(), -1)
        chances = chances.masked_fill(known < 0, 0.0)
        order = known.argsort(dim=1, stable=True)
        known, chances = known.gather(1, order), chances.gather(1, order)
        is_first = torch.ones_like(known, dtype=torch.bool)
        is_first[:, 1:] = known[:, 1:] != known[:, :-1]
        group = is_first.long().cumsum(1) - 1
        summed = torch.zeros_like(chances).scatter_add_(1, group, chances)
        ids = torch.full_like(known, -1).scatter_(1, group, known)
        return ids, summed / summed.sum(1, keepdim=True).clamp(min=1e-9)

    def beginning(self, prefix: Sequence[int]) -> Tensor:
        """(c,) the tokens whose pieces begin with some, 1 to depth - 1 of them."""
        firsts, order = self._by_first
        low, high = torch.searchsorted(firsts, torch.tensor([prefix[0], prefix[0] + 1])).tolist()
        found = order[low:high]
        return found[(self.table[found, : len(prefix)] == torch.tensor(prefix)).all(1)]

    def following(self, tokens: Tensor, chances: Tensor, depth: int, most: int) -> tuple[Tensor, Tensor]:
        """What comes next, where some pieces have been written.

        Args:
            tokens: (c,) as `beginning` gives them.
            chances: (c,) their probabilities.
            depth: How many pieces have been written.
            most: Ids that are wanted.

        Returns:
            (most,) ids of the target, -1 where there is none, and (most,) q(t | pi) m: they sum to m.
        """
        ids, found = torch.full((most,), -1), torch.zeros(most)
        begun = float(chances.sum())
        goes_on = self.counts[tokens] > depth
        if begun > 0 and bool(goes_on.any()):
            pieces, group = self.table[tokens[goes_on], depth].unique(return_inverse=True)
            summed = torch.zeros(len(pieces)).index_add_(0, group, chances[goes_on]) / begun
            top = summed.topk(min(most, len(pieces)))
            ids[: len(top.indices)], found[: len(top.indices)] = pieces[top.indices], top.values
        return ids, found
