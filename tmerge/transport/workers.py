"""Problems side by side on a CPU, one thread each, and no more of them at once than are being worked on."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

import torch

__all__ = ["in_turn", "one_thread_each"]

Item = TypeVar("Item")
Result = TypeVar("Result")


@contextmanager
def one_thread_each(device: torch.device | None = None) -> Iterator[int]:
    """Share torch's threads among workers that have one each.

    Whole problems run side by side, each on one thread: their products are too small to be split, and threads that wait
    for each other within one cost more than they bring (100 times, on a busy machine). An accelerator is not shared:
    there is one worker, and torch keeps its threads for what that one does on the CPU.

    Args:
        device: Where the problems are solved; the CPU if None.

    Yields:
        How many workers there are.
    """
    if device is not None and device.type != "cpu":
        yield 1
        return
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield threads
    finally:
        torch.set_num_threads(threads)


def in_turn(
    work: Callable[[Item], Result], items: Sequence[Item], workers: int, take: Callable[[Item, Result], None]
) -> None:
    """Work on items side by side, and hand each result over in the items' order.

    At most ``workers + 1`` results exist or are being made at any time, the one that `take` has included: what an item
    needs of memory is not multiplied by their number.

    Args:
        work: Called with an item, in a thread that torch gives as many threads as the caller's.
        items: All of them.
        workers: How many at a time.
        take: Called with an item and its result, in the caller's thread; may raise to stop.

    Raises:
        BaseException: What `work` or `take` raised first; items that were not begun are left.
    """
    # Each worker is told too: what torch was told elsewhere does not reach LAPACK in a thread that begins later, and an
    # SVD took 300 times as long in two threads where the cores are busy.
    threads = torch.get_num_threads()
    waiting = deque(items)
    flying: deque[tuple[Item, Future[Result]]] = deque()

    with ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(threads,)) as pool:

        def begin() -> None:
            if waiting:
                item = waiting.popleft()
                flying.append((item, pool.submit(work, item)))

        def hand_over(item: Item, future: Future[Result]) -> None:
            take(item, future.result())

        try:
            for _ in range(workers + 1):
                begin()
            while flying:
                hand_over(*flying.popleft())
                begin()
        except BaseException:
            for _, future in flying:
                future.cancel()
            raise
