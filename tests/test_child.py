"""A process beside this one: what it answers, what it tells on the way, and that it always ends."""

import os
import signal
import time

import psutil
import pytest

from tests import forked
from tests.ui import merges
from tmerge.child import Child, ChildFaultError, ChildLostError
from tmerge.errors import Cancelled, DatasetError, TmergeError


@pytest.fixture
def child():
    child = Child("tmerge-test")
    yield child
    child.end()
    assert not child.alive


def test_it_answers_elsewhere_and_in_turn(child):
    assert child.call(os.getpid) == child.pid != os.getpid()
    assert child.call(max, 3, 5) == 5


def test_errors_come_back_as_they_are_and_it_goes_on(child, tmp_path):
    with pytest.raises(DatasetError, match="is empty; choose another"):
        child.call(merges.mistaken, None, tmp_path, hear=print)
    with pytest.raises(ChildFaultError, match="Traceback(?s:.*)secret detail"):
        child.call(merges.at_fault, None, tmp_path, hear=print)
    # What cannot be sent is a fault as well.
    with pytest.raises(ChildFaultError, match="pickle"):
        child.call(open, os.devnull)
    assert child.call(max, 3, 5) == 5


def test_quick_steps_are_told_in_few_and_neither_rows_nor_the_last_are_lost(child, tmp_path):
    heard = []
    child.call(os.getpid)
    seconds = child.call(merges.hasty, None, tmp_path, hear=heard.append)
    assert len(heard) < 20 + 15 * (1 + seconds)
    assert [told.row for told in heard if told.row] == [("q.post", i, (i * 1000.0,)) for i in range(10)]
    assert heard[-1].done == 19_999 and [told.done for told in heard] == sorted(told.done for told in heard)
    # As fast as work is that tells nobody, but for some microseconds a step.
    assert seconds < 20


def test_one_who_listens_slowly_does_not_hold_it_up(child, tmp_path):
    child.call(os.getpid)
    assert child.call(merges.hasty, None, tmp_path, hear=lambda told: time.sleep(0.2)) < 20


@pytest.mark.parametrize("way", ["hear", "pulse"])
def test_what_its_listener_raises_ends_it(child, tmp_path, way):
    def stop(*told):
        raise TmergeError("enough")

    process = psutil.Process(child.pid)
    began = time.monotonic()
    with pytest.raises(TmergeError, match="enough"):
        child.call(merges.stepping, None, tmp_path, **({"hear": print} | {way: stop}))
    assert not process.is_running() and not child.alive and time.monotonic() - began < 20
    with pytest.raises(ChildLostError):
        child.call(max, 3, 5)


def test_one_that_is_stopped_goes_on_to_the_next_question(child, tmp_path):
    told = []

    def stop_once():
        if len(told) == 1:
            child.stop()
            told.append(None)

    pid = child.pid
    with pytest.raises(Cancelled):
        child.call(merges.stepping, None, tmp_path, hear=lambda step: told or told.append(step), pulse=stop_once)
    assert child.call(os.getpid) == pid

    # One that has answered meanwhile is not told of it later.
    def stop():
        child.stop()

    assert child.call(time.sleep, 0.3, pulse=stop) is None
    heard = []
    assert child.call(merges.hasty, None, tmp_path, hear=heard.append) > 0 and heard


def test_one_that_is_gone_says_how(child, tmp_path):
    with pytest.raises(ChildLostError) as caught:
        child.call(merges.leaving, None, tmp_path, hear=print)
    assert caught.value.status == 7


@pytest.mark.parametrize("at_work", [False, True])
def test_it_does_not_outlive_a_process_that_is_killed(tmp_path, at_work):
    script = f"""
import os, threading, time
from pathlib import Path
from tests.ui import merges
from tmerge.child import Child
child = Child("tmerge-test")
child.call(os.getpid)
ready = lambda *told: print("ready", child.pid, flush=True)
words = (merges.holding, None, Path({str(tmp_path)!r}))
work = (lambda: child.call(*words, hear=ready)) if {at_work} else ready
threading.Thread(target=work, daemon=True).start()
time.sleep(600)
"""
    process = forked.start(script=script)
    until = time.monotonic() + 60
    while "ready" not in process.so_far() and time.monotonic() < until:
        time.sleep(0.05)
    [line] = [line for line in process.so_far().splitlines() if line.startswith("ready")]
    orphan = psutil.Process(int(line.split()[1]))
    assert orphan.is_running()
    process.send_signal(signal.SIGKILL)
    process.communicate(20)
    orphan.wait(20)
