"""What changes quickly on a page: a pause is waited for, and only the last change is answered."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from weakref import WeakValueDictionary

__all__ = ["Change", "Changes", "SupersededError", "always"]


class SupersededError(Exception):
    """What is asked has been changed since, and there is no answer. Nobody's mistake, and not to be shown."""


def always() -> bool:
    """For a question whose answer is wanted whatever is changed meanwhile."""
    return True


@dataclass
class Changes:
    """Of one kind, on all pages.

    Attributes:
        seconds: Without a further change, after which one is taken for the last.
    """

    seconds: float
    # The last one of each page, for as long as somebody may ask whether it is.
    _last: WeakValueDictionary[str, Change] = field(default_factory=WeakValueDictionary)

    def begin(self, page: str | None) -> Change:
        """A change that was made on a page just now."""
        change = self._last[str(page)] = Change(str(page), self)
        return change


@dataclass(frozen=True, eq=False)
class Change:
    """One of the `Changes` of a page."""

    page: str
    changes: Changes

    def is_last(self) -> bool:
        """Whether nothing was changed on this page since."""
        return self.changes._last.get(self.page) is self

    async def settled(self) -> bool:
        """Wait for a pause, and say whether this is the change before it."""
        await asyncio.sleep(self.changes.seconds)
        return self.is_last()
