"""What changes quickly on a page: a pause is waited for, and only the last change is answered."""

from __future__ import annotations

import asyncio
import threading
from collections import OrderedDict
from dataclasses import dataclass, field

__all__ = ["Change", "Changes", "SupersededError", "always"]

_PAGES = 1000


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
    _last: OrderedDict[str, Change] = field(default_factory=OrderedDict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def begin(self, page: str | None) -> Change:
        """A change that was made on a page just now."""
        change = Change(str(page), self)
        with self._lock:
            self._last[change.page] = change
            self._last.move_to_end(change.page)
            while len(self._last) > _PAGES:
                self._last.popitem(last=False)
        return change


@dataclass(frozen=True, eq=False)
class Change:
    """One of the `Changes` of a page."""

    page: str
    changes: Changes

    def is_last(self) -> bool:
        """Whether nothing was changed on this page since."""
        # A page that very many others came after is answered.
        return self.changes._last.get(self.page, self) is self

    async def settled(self) -> bool:
        """Wait for a pause, and say whether this is the change before it."""
        await asyncio.sleep(self.changes.seconds)
        return self.is_last()
