"""Problems side by side: in order, few at a time, one thread each where they share a CPU."""

from __future__ import annotations

import threading
import time
import weakref

import pytest
import torch

from tmerge.transport import in_turn, one_thread_each


class _Large:
    """Stands for what a result holds in memory."""


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def test_one_thread_each_gives_the_threads_back():
    before = torch.get_num_threads()
    with pytest.raises(RuntimeError), one_thread_each() as workers:
        assert (workers, torch.get_num_threads()) == (before, 1)
        raise RuntimeError
    assert torch.get_num_threads() == before


@pytest.mark.parametrize("device", ["cuda", "cuda:1", "mps"])
def test_an_accelerator_has_one_worker_and_leaves_torch_its_threads(two_threads, device):
    with one_thread_each(torch.device(device)) as workers:
        assert (workers, torch.get_num_threads()) == (1, 2)
    with one_thread_each(torch.device("cpu")) as workers:
        assert (workers, torch.get_num_threads()) == (2, 1)


@pytest.mark.parametrize("workers", [1, 3])
def test_results_are_handed_over_in_order(workers):
    taken = []

    def work(item):
        time.sleep(0.003 * (item % 3 == 0))  # some are overtaken
        return item**2

    in_turn(work, range(20), workers, lambda item, result: taken.append((item, result)))
    assert taken == [(item, item**2) for item in range(20)]


def test_a_worker_has_the_callers_threads(two_threads):
    found = []
    with one_thread_each() as workers:
        in_turn(lambda item: torch.get_num_threads(), range(4), workers, lambda item, threads: found.append(threads))
    assert found == [1, 1, 1, 1]
    in_turn(lambda item: torch.get_num_threads(), range(2), 1, lambda item, threads: found.append(threads))
    assert found[4:] == [2, 2]


@pytest.mark.parametrize("items", [5, 40])
@pytest.mark.parametrize("workers", [1, 3])
def test_no_more_than_workers_and_one_are_there_at_once(items, workers):
    made, lock, most = [], threading.Lock(), 0

    def count():
        nonlocal most
        with lock:
            most = max(most, sum(reference() is not None for reference in made))

    def work(item):
        large = _Large()
        with lock:
            made.append(weakref.ref(large))
        count()
        return large

    def take(item, large):
        time.sleep(0.002)  # so that all others could have been made meanwhile
        count()

    in_turn(work, range(items), workers, take)
    assert len(made) == items and most <= workers + 1
    assert not any(reference() is not None for reference in made)


@pytest.mark.parametrize("where", ["work", "take"])
def test_what_is_raised_stops_it(where):
    begun, taken = [], []

    def work(item):
        begun.append(item)
        if where == "work" and item == 2:
            raise ValueError("work")
        return item

    def take(item, result):
        taken.append(item)
        if where == "take" and item == 1:
            raise ValueError("take")

    with pytest.raises(ValueError, match=where):
        in_turn(work, range(50), 2, take)
    assert taken == [0, 1] and len(begun) <= 5
