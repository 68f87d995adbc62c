"""How large a batch may be, as far as one that did not fit has told."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Room"]


@dataclass
class Room:
    """Remembered for as long as about as much memory is free, so that the next batch is not tried in vain.

    Attributes:
        tokens: Of a batch at most, padding included; None while all have fitted.
    """

    tokens: int | None = None

    def has(self, texts: int, longest: int) -> bool:
        """Whether a batch is worth trying; a single text always is.

        Args:
            texts: Of the batch.
            longest: Tokens of its longest text.
        """
        return texts == 1 or self.tokens is None or texts * longest <= self.tokens

    def lacked(self, texts: int, longest: int) -> None:
        """Remember that there was none for a batch, of which the larger half is tried next; arguments as `has`."""
        half = (texts - texts // 2) * longest
        self.tokens = half if self.tokens is None else min(self.tokens, half)
