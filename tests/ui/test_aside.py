"""Questions beside the app: several at once, only the last of a page's, and no process longer than it is needed."""

import asyncio
import itertools
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
from tests.ui.awaited import awaited
from tmerge.errors import DatasetError
from tmerge.ui.parts.following import follow
from tmerge.ui.server import aside as asides
from tmerge.ui.server.aside import Aside, Asked, StillAskingError, TooSlowError, patiently
from tmerge.ui.server.changes import Changes, SupersededError, always
from tmerge.ui.server.faults import FaultError

HANGS = 600.0


@pytest.fixture
def aside(monkeypatch):
    monkeypatch.setattr(asides, "_SOON", 0.0)
    aside = Aside(most=2)
    yield aside
    aside.close()
    assert aside._living == set()


@pytest.fixture
def pool():
    with ThreadPoolExecutor(8) as pool:
        yield pool


def asks(aside, question, *words, wanted=always, seconds=60.0):
    """The answer, waited for."""
    return awaited(patiently(lambda: aside.ask(question, *words, wanted=wanted), wanted, seconds))


_numbers = itertools.count()


def here(aside):
    """Which process answers, asked anew each time."""
    return asks(aside, questions.here, next(_numbers))


def until(condition, seconds=60.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def pid_in(path):
    until(lambda: path.exists() and path.read_text())
    return int(path.read_text())


def test_an_answer_an_error_and_a_fault_come_of_one_process(aside, caplog):
    first = here(aside)
    assert first != os.getpid()
    with pytest.raises(DatasetError, match="no such column"):
        asks(aside, questions.mistaken)
    with caplog.at_level(logging.ERROR), pytest.raises(FaultError, match="the server's log has it under"):
        asks(aside, questions.at_fault)
    assert "secret detail" in caplog.text
    assert here(aside) == first
    with pytest.raises(TooSlowError, match="the answer was lost"):
        asks(aside, questions.lost)
    assert here(aside) != first


def test_one_that_hangs_holds_up_no_other_and_is_ended_when_its_time_is_over(aside, pool, tmp_path):
    aside.patience = 10.0
    hanging = pool.submit(asks, aside, questions.slow, tmp_path / "begun", HANGS)
    process = psutil.Process(pid_in(tmp_path / "begun"))
    others = {here(aside) for _ in range(3)}
    assert len(others) == 1 and process.pid not in others and not hanging.done()
    with pytest.raises(TooSlowError, match="no answer within 10 s"):
        hanging.result(60)
    assert not process.is_running()


def test_where_all_are_busy_one_waits_for_the_first_that_is_free(aside, pool, tmp_path):
    busy = [pool.submit(asks, aside, questions.slow, tmp_path / str(i), 1.0) for i in range(2)]
    pids = {pid_in(tmp_path / str(i)) for i in range(2)}
    assert len(pids) == 2 and here(aside) in pids
    assert {one.result(60) for one in busy} == pids
    busy = [pool.submit(asks, aside, questions.slow, tmp_path / f"again {i}", 1.5) for i in range(2)]
    for i in range(2):
        pid_in(tmp_path / f"again {i}")
    aside.patience = 1.0
    waits = pool.submit(here, aside)
    assert not [one.exception(60) for one in busy if one.exception(60) is None]
    with pytest.raises(TooSlowError, match="others are asking"):
        waits.result(60)


def test_one_that_is_superseded_is_not_answered_and_its_process_is_freed(aside, pool, tmp_path, monkeypatch):
    monkeypatch.setattr(asides, "_GRACE", 0.2)
    wanted = threading.Event()
    wanted.set()
    asked = [pool.submit(asks, aside, questions.slow, tmp_path / str(i), HANGS, wanted=wanted.is_set) for i in range(2)]
    processes = [psutil.Process(pid_in(tmp_path / str(i))) for i in range(2)]
    # This one waits, and is not asked at all.
    asked.append(pool.submit(asks, aside, questions.slow, tmp_path / "waits", HANGS, wanted=wanted.is_set))
    time.sleep(0.3)
    began = time.monotonic()
    wanted.clear()
    for one in asked:
        with pytest.raises(SupersededError):
            one.result(60)
    assert time.monotonic() - began < 1
    until(lambda: not any(process.is_running() for process in processes))
    assert time.monotonic() - began < 10
    assert here(aside) not in {process.pid for process in processes} and not (tmp_path / "waits").exists()


def test_one_that_ends_soon_after_it_was_superseded_keeps_its_process(aside, pool, tmp_path):
    wanted = threading.Event()
    wanted.set()
    asked = pool.submit(asks, aside, questions.slow, tmp_path / "begun", 0.5, wanted=wanted.is_set)
    process = pid_in(tmp_path / "begun")
    wanted.clear()
    assert isinstance(asked.exception(60), SupersededError)
    until(lambda: aside._free == {0})
    assert here(aside) == process


def test_of_those_that_have_nothing_to_do_one_stays(aside, pool, tmp_path, monkeypatch):
    monkeypatch.setattr(asides, "_IDLE", 0.3)
    busy = [pool.submit(asks, aside, questions.slow, tmp_path / str(i), 0.5) for i in range(2)]
    processes = [psutil.Process(one.result(60)) for one in busy]
    until(lambda: aside._living == {0})
    until(lambda: sum(process.is_running() for process in processes) == 1)


def test_of_free_processes_the_first_is_asked_and_each_has_one_thread(aside, pool, tmp_path):
    before = set(threading.enumerate())  # an app of another test may have some
    processes = [pool.submit(asks, aside, questions.slow, tmp_path / str(i), 0.5) for i in range(2)]
    assert len({one.result(60) for one in processes}) == 2
    assert len({here(aside) for _ in range(5)}) == 1
    own = [each for each in threading.enumerate() if each not in before and each.name == "tmerge-aside"]
    assert len(own) == 2


def test_beyond_so_many_unanswered_questions_none_is_taken(aside, tmp_path, monkeypatch):
    monkeypatch.setattr(asides, "_MOST_UNANSWERED", 3)
    wanted = [True]
    before = threading.active_count()
    for i in range(3):
        with pytest.raises(StillAskingError):
            aside.ask(questions.slow, tmp_path / str(i), HANGS, wanted=lambda: wanted[0])
    for i in range(3, 20):
        with pytest.raises(TooSlowError, match="too many questions wait for their answers here; try again"):
            aside.ask(questions.slow, tmp_path / str(i), HANGS)
    assert threading.active_count() <= before + 2
    with pytest.raises(StillAskingError):  # one that was taken is asked for all
        aside.ask(questions.slow, tmp_path / "2", HANGS, wanted=lambda: wanted[0])
    until(lambda: (tmp_path / "0").exists() and (tmp_path / "1").exists())
    # The one that nobody wants any more, and that no process has begun, leaves its room.
    wanted[0] = False
    with pytest.raises(StillAskingError):
        aside.ask(questions.here)
    assert asks(aside, questions.here) and not (tmp_path / "2").exists()


def test_a_question_for_which_there_is_no_thread_is_asked_anew_later(aside, monkeypatch):
    def none(self):
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", none)
        with pytest.raises(TooSlowError, match="too many questions"):
            aside.ask(questions.here)
    assert asks(aside, questions.here)


def test_a_process_that_cannot_be_started_is_said_and_the_next_question_starts_one(aside, monkeypatch):
    def none(*words):
        raise OSError("Cannot allocate memory")

    with monkeypatch.context() as patch:
        patch.setattr(asides, "Child", none)
        with pytest.raises(TooSlowError, match="too many questions"):
            asks(aside, questions.here, 1)
    assert asks(aside, questions.here, 2)


def test_any_number_of_pages_waits_without_a_thread_of_its_own(aside, tmp_path):
    async def wait_all():
        before = threading.active_count()
        waiting = [
            patiently(lambda i=i: aside.ask(questions.slow, tmp_path / str(i), HANGS), seconds=1.0) for i in range(40)
        ]
        began = time.monotonic()
        threads = asyncio.create_task(most_threads())
        answers = await asyncio.gather(*waiting, return_exceptions=True)
        threads.cancel()
        return answers, time.monotonic() - began, max(counted) - before

    async def most_threads():
        while True:
            counted.append(threading.active_count())
            await asyncio.sleep(0.05)

    counted = []
    answers, took, threads = awaited(wait_all())
    assert {type(answer) for answer in answers} == {StillAskingError} and took < 3
    # Those of the two processes.
    assert threads <= 2


def test_who_asks_the_same_gets_the_same_answer_for_a_while(aside, pool, tmp_path, monkeypatch):
    asked = [pool.submit(asks, aside, questions.slow, tmp_path / "begun", 1.0) for _ in range(3)]
    assert len({one.result(60) for one in asked}) == 1 and aside._living == {0}
    (tmp_path / "begun").unlink()
    aside.ask(questions.slow, tmp_path / "begun", 1.0)
    assert not (tmp_path / "begun").exists()
    monkeypatch.setattr(asides, "_ERROR_SECONDS", 0.5)
    for _ in range(2):
        with pytest.raises(DatasetError, match="no such column"):
            asks(aside, questions.mistaken)


def test_no_page_waits_for_a_slow_answer_and_it_is_there_later(aside, tmp_path):
    began = time.monotonic()
    with pytest.raises(StillAskingError, match="still asking"):
        aside.ask(questions.slow, tmp_path / "begun", 2.0)
    assert time.monotonic() - began < 0.5
    with pytest.raises(StillAskingError, match="still asking"):
        asks(aside, questions.slow, tmp_path / "begun", 2.0, seconds=0.3)
    assert time.monotonic() - began < 1.5

    def ask_again():
        try:
            return aside.ask(questions.slow, tmp_path / "begun", 2.0)
        except StillAskingError:
            return None

    until(ask_again)
    assert ask_again() == pid_in(tmp_path / "begun")


def test_slow_questions_do_not_keep_the_next_visitor_waiting(aside, pool, tmp_path, monkeypatch):
    monkeypatch.setattr(asides, "_SHARE", 1.0)
    slow = [pool.submit(asks, aside, questions.slow, tmp_path / str(i), HANGS, seconds=20.0) for i in range(2)]
    for i in range(2):
        pid_in(tmp_path / str(i))
    began = time.monotonic()
    assert here(aside)
    assert time.monotonic() - began < 20
    until(lambda: any(one.done() for one in slow))
    for one in slow:
        if one.done():
            with pytest.raises(TooSlowError, match="no answer within 1 s"):
                one.result()


def test_a_pages_newer_question_ends_its_older_one_if_nobody_else_asks_it(aside, pool, tmp_path, monkeypatch):
    monkeypatch.setattr(asides, "_GRACE", 0.2)
    pages, changes = ("one", "two"), Changes(0.0)
    asked = [
        pool.submit(asks, aside, questions.slow, tmp_path / "begun", HANGS, wanted=changes.begin(page).is_last)
        for page in pages
    ]
    process = psutil.Process(pid_in(tmp_path / "begun"))
    changes.begin("one")
    with pytest.raises(SupersededError):
        asked[0].result(20)
    time.sleep(0.5)
    assert process.is_running() and not asked[1].done()
    changes.begin("two")
    with pytest.raises(SupersededError):
        asked[1].result(20)
    until(lambda: not process.is_running())


@pytest.fixture
def following(monkeypatch):
    """`follow` with an answer of one's own: all that a change has shown, as a coroutine, and the component for it."""

    def following(answer, pause):
        monkeypatch.setattr("tmerge.ui.parts.following._SETTLED_SECONDS", pause)
        with gr.Blocks() as blocks:
            state, shown, button = [gr.State(), gr.State()], gr.HTML(), gr.Button()
            app = SimpleNamespace(page=SimpleNamespace(load=lambda *words, **options: None))
            told = lambda draft, uploaded, wanted: {shown: answer(draft, wanted)}  # noqa: E731
            follow(app, [button.click], told, state, [shown], {shown: "still"})
        [event] = blocks.fns.values()
        # None holds another visitor's up.
        assert event.concurrency_limit is None

        async def change(draft, page):
            return [each async for each in event.fn(draft, None, SimpleNamespace(session_hash=page))]

        return change, shown

    return following


def test_only_the_last_of_quick_changes_on_a_page_is_answered(following):
    answered = []

    def answer(draft, wanted):
        answered.append(draft)
        return draft

    change, shown = following(answer, 1.0)

    async def all_changes():
        return await asyncio.gather(*(change(f"{page} {i}", page) for i in range(3) for page in ("one", "two")))

    kept = awaited(all_changes())
    assert sorted(answered) == ["one 2", "two 2"] and kept[-2:] == [[{shown: "one 2"}], [{shown: "two 2"}]]
    assert kept[:-2] == [[gr.skip()]] * 4


def test_an_answer_that_comes_after_a_later_change_is_not_shown(following):
    slow = Asked(questions.here, ())

    def answer(draft, wanted):
        if draft == "slow":
            raise StillAskingError(slow)
        return draft

    change, shown = following(answer, 0.0)

    async def both():
        first = asyncio.create_task(change("slow", "one"))
        await asyncio.sleep(0.05)
        assert await change("quick", "one") == [{shown: "quick"}]
        return await first

    assert awaited(both()) == [gr.skip()]


def test_what_takes_longer_is_told_and_comes_by_itself(following):
    slow = Asked(questions.here, (), began=0.0)

    def answer(draft, wanted):
        if not slow.answer.done():
            raise StillAskingError(slow)
        return "there"

    change, shown = following(answer, 0.0)
    timer = threading.Timer(0.5, slow.answer.set_result, [None])
    timer.start()
    assert awaited(change("draft", "one")) == [{shown: "still"}, {shown: "there"}]
