"""What a coroutine gives, in a test: in a thread of its own, as playwright's loop runs in that of the tests."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from concurrent.futures import ThreadPoolExecutor
from typing import Any

__all__ = ["awaited"]


def awaited(coroutine: Coroutine[Any, Any, Any]) -> Any:
    """Its value, or what it raises."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(asyncio.run, coroutine).result()
