"""Questions beside the app: several at once, only the last of a page's, and no process longer than it is needed."""

import logging
import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import psutil
import pytest

pytest.importorskip("gradio", reason="the app extra is not installed")

import gradio as gr

from tests.ui import questions
from tmerge.errors import DatasetError
from tmerge.ui.server import aside as asides
from tmerge.ui.server.aside import Aside, TooSlowError
from tmerge.ui.server.changes import Changes, SupersededError, answering_the_last

HANGS = 600.0


@pytest.fixture
def aside(monkeypatch):
    monkeypatch.setattr(asides, "_SOON", 0.0)
    aside = Aside(most=2)
    yield aside
    aside.close()
    assert aside._busy == 0 and aside._free == []


@pytest.fixture
def pool():
    with ThreadPoolExecutor(8) as pool:
        yield pool


def until(condition, seconds=60.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def pid_in(path):
    until(lambda: path.exists() and path.read_text())
    return int(path.read_text())


def test_an_answer_an_error_and_a_fault_come_of_one_process(aside, caplog):
    first = aside.ask(questions.here)
    assert first != os.getpid()
    with pytest.raises(DatasetError, match="no such column"):
        aside.ask(questions.mistaken)
    with caplog.at_level(logging.ERROR), pytest.raises(RuntimeError, match="its traceback is in the log"):
        aside.ask(questions.at_fault)
    assert "secret detail" in caplog.text
    assert aside.ask(questions.here) == first
    with pytest.raises(TooSlowError, match="the answer was lost"):
        aside.ask(questions.lost)
    assert aside.ask(questions.here) != first


def test_one_that_hangs_holds_up_no_other_and_is_ended_when_its_time_is_over(aside, pool, tmp_path):
    aside.patience = 10.0
    hanging = pool.submit(aside.ask, questions.slow, tmp_path / "begun", HANGS)
    process = psutil.Process(pid_in(tmp_path / "begun"))
    others = {aside.ask(questions.here) for _ in range(3)}
    assert len(others) == 1 and process.pid not in others and not hanging.done()
    with pytest.raises(TooSlowError, match="no answer within 10 s"):
        hanging.result(60)
    assert not process.is_running()


def test_where_all_are_busy_one_waits_for_the_first_that_is_free(aside, pool, tmp_path):
    busy = [pool.submit(aside.ask, questions.slow, tmp_path / str(i), 1.0) for i in range(2)]
    pids = {pid_in(tmp_path / str(i)) for i in range(2)}
    assert len(pids) == 2 and aside.ask(questions.here) in pids
    assert {one.result(60) for one in busy} == pids
    aside.patience = 0.3
    aside.most = 0
    with pytest.raises(TooSlowError, match="others are asking"):
        aside._busy += 1
        try:
            aside._free.clear()
            aside.ask(questions.here)
        finally:
            aside._busy -= 1


def test_one_that_is_superseded_is_not_answered_and_its_process_is_freed(aside, pool, tmp_path, monkeypatch):
    monkeypatch.setattr(asides, "_GRACE", 0.2)
    wanted = threading.Event()
    wanted.set()
    asked = [pool.submit(aside.ask, questions.slow, tmp_path / str(i), HANGS, wanted=wanted.is_set) for i in range(2)]
    processes = [psutil.Process(pid_in(tmp_path / str(i))) for i in range(2)]
    # This one waits, and is not asked at all.
    asked.append(pool.submit(aside.ask, questions.slow, tmp_path / "waits", HANGS, wanted=wanted.is_set))
    time.sleep(0.3)
    began = time.monotonic()
    wanted.clear()
    for one in asked:
        with pytest.raises(SupersededError):
            one.result(60)
    assert time.monotonic() - began < 10 and not (tmp_path / "waits").exists()
    assert not any(process.is_running() for process in processes)
    assert aside.ask(questions.here) not in {process.pid for process in processes}


def test_one_that_ends_soon_after_it_was_superseded_keeps_its_process(aside, pool, tmp_path):
    wanted = threading.Event()
    wanted.set()
    asked = pool.submit(aside.ask, questions.slow, tmp_path / "begun", 0.5, wanted=wanted.is_set)
    process = pid_in(tmp_path / "begun")
    wanted.clear()
    asked.exception(60)
    assert aside.ask(questions.here) == process


def test_of_those_that_have_nothing_to_do_one_stays(aside, pool, tmp_path, monkeypatch):
    monkeypatch.setattr(asides, "_IDLE", 0.3)
    busy = [pool.submit(aside.ask, questions.slow, tmp_path / str(i), 0.5) for i in range(2)]
    processes = [psutil.Process(one.result(60)) for one in busy]
    until(lambda: len(aside._free) == 1)
    until(lambda: sum(process.is_running() for process in processes) == 1)


def test_only_the_last_of_quick_changes_on_a_page_is_answered(pool):
    answered = []

    def answer(draft, uploaded, *, wanted):
        answered.append(draft)
        return draft

    follow = answering_the_last(Changes(1.0), answer)
    pages = [SimpleNamespace(session_hash=name) for name in ("one", "two")]
    given = []
    for i in range(3):
        given += [pool.submit(follow, f"{page.session_hash} {i}", None, page) for page in pages]
        time.sleep(0.05)
    kept = [one.result(20) for one in given]
    assert sorted(answered) == ["one 2", "two 2"] and kept[-2:] == ["one 2", "two 2"]
    assert kept[:-2] == [gr.skip()] * 4


def test_an_answer_that_comes_after_a_later_change_is_not_shown(pool):
    began, free = threading.Event(), threading.Event()

    def answer(draft, uploaded, *, wanted):
        if draft == "slow":
            began.set()
            free.wait(20)
            assert not wanted()
        return draft

    follow = answering_the_last(Changes(0.0), answer)
    page = SimpleNamespace(session_hash="one")
    slow = pool.submit(follow, "slow", None, page)
    assert began.wait(20)
    assert follow("quick", None, page) == "quick"
    free.set()
    assert slow.result(20) == gr.skip()
