"""Visitors' runs: one at a time, each known by its id, stopped within seconds, and gone when it is old."""

import hashlib
import logging
import os
import shutil
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest

pytest.importorskip("gradio", reason="the app extra is not installed")

import psutil
import torch

from tests.pico import save_pico
from tests.ui import merges
from tmerge.calibration import sample_texts
from tmerge.errors import RunNotFoundError
from tmerge.recipe import Recipe
from tmerge.run import Run
from tmerge.ui.server import room, run_process, runs
from tmerge.ui.server.limits import AppSettings, BusyError, TooManyRunsError
from tmerge.ui.server.pushes import PushUnderWay
from tmerge.ui.server.runs import RunStore
from tmerge.ui.server.uploads import without_paths
from tmerge.ui.server.visitor_run import VisitorRun

RECIPE = Recipe(target="a/b", source="c/d")


@pytest.fixture
def store():
    store = RunStore(AppSettings())
    yield store
    store.close()
    assert not store.root.exists()


def until(condition, seconds=60.0):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():
            return
        time.sleep(0.01)
    raise AssertionError(f"not so after {seconds} s")


def over(store, run_id, seconds=60.0):
    until(lambda: store.get(run_id).over, seconds)
    return store.get(run_id)


def pico_recipe(folder):
    """A real merge of seconds, whose texts are an upload."""
    for role, family, layers in (("target", "llama", 3), ("source", "qwen3", 4)):
        save_pico(family, folder / role, layers=layers)
    (folder / "texts.txt").write_text("\n".join(sample_texts("english")[:80]), encoding="utf-8")
    return Recipe.from_mapping(
        {
            "target": str(folder / "target"),
            "source": str(folder / "source"),
            "dtype": "float32",
            "calibration": {"dataset": "upload:texts.txt", "texts": 80},
            "fusion": {"alpha": 0.1},
            "evaluation": {"bootstrap": 100},
        }
    )


@dataclass
class Plain:
    """A merge that nobody disturbed, and what the app's process was meanwhile."""

    recipe: Recipe
    texts: Path
    run: VisitorRun
    root: Path
    dtypes: set[torch.dtype]
    grown: int


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    folder = tmp_path_factory.mktemp("plain")
    recipe, texts = pico_recipe(folder), folder / "texts.txt"
    store, process, dtypes = RunStore(AppSettings()), psutil.Process(), set()
    before = process.memory_info().rss
    run_id = store.start(recipe, "me", texts)
    while not store.get(run_id).over:
        dtypes.add(torch.get_default_dtype())
        time.sleep(0.01)
    run = store.get(run_id)
    assert run.state == "done", run.error
    yield Plain(recipe, texts, run, store.root, dtypes, process.memory_info().rss - before)
    store.close()


def test_a_merge_runs_to_its_end_and_its_folder_is_a_run(plain):
    run = plain.run
    assert run.report == Run(run.folder).report().model_copy(update={"calibration": run.report.calibration})
    # Six features of three target layers, each against four source layers.
    assert len(run.rows) == 18 and {len(row.costs) for row in run.rows} == {4}
    assert list(run.stages) == ["texts", "target", "source", "transport", "fuse", "evaluate", "save"]
    assert all(stage.ended is not None for stage in run.stages.values())
    # The upload's path on the server is in nothing that can be downloaded or pushed.
    for name in ("README.md", "tmerge/recipe.yaml", "tmerge/report.json"):
        assert str(plain.root) not in (run.folder / name).read_text(encoding="utf-8"), name
    assert "texts.txt" in (run.folder / "tmerge" / "recipe.yaml").read_text(encoding="utf-8")


def test_a_run_leaves_the_apps_process_as_it_was(plain):
    assert plain.dtypes == {torch.float32}
    # A merge needs many times as much, and gave none of it back where others had allocated meanwhile.
    assert plain.grown < 10_000_000
    assert plain.run.report.stages[-1].peak_rss_bytes > 100_000_000


def test_an_id_is_long_and_not_the_name_of_the_folder(store, monkeypatch):
    monkeypatch.setattr(runs, "merge", merges.stepping)
    ids = [store.start(RECIPE, "me") for _ in range(3)]
    assert len(set(ids)) == 3 and all(len(one) >= 24 for one in ids)
    assert not any(one in str(store.get(one).folder) for one in ids)
    assert store.get("") is None and store.get("x" * 24) is None


def test_the_next_process_is_ready_before_its_run_and_gone_with_the_app(monkeypatch):
    monkeypatch.setattr(runs, "merge", merges.named)
    monkeypatch.setattr(run_process, "_PREPARED", ("tmerge.errors",))
    store = RunStore(AppSettings())
    store.warm()
    ready = store._next.pid
    first, second = (over(store, store.start(RECIPE, "me")).report["process"] for _ in range(2))
    assert first == ready and second != first
    last = psutil.Process(store._next.pid)
    assert last.pid not in (first, second)
    # One that was lost while it waited is no run's.
    last.kill()
    until(lambda: not store._next.alive)
    assert over(store, store.start(RECIPE, "me")).state == "done"
    last = psutil.Process(store._next.pid)
    store.close()
    assert not last.is_running()


def test_the_queue_goes_in_order_and_says_the_place(store, monkeypatch):
    monkeypatch.setattr(runs, "merge", merges.stepping)
    first, second, third = (store.start(RECIPE, "me") for _ in range(3))
    until(lambda: store.get(first).state == "running")
    assert [store.position(one) for one in (first, second, third)] == [0, 1, 2]
    store.cancel(second)
    assert store.get(second).state == "cancelled" and store.position(third) == 1
    store.cancel(first)
    until(lambda: store.get(third).state == "running")
    assert store.get(first).state == "cancelled"


def test_cancel_stops_what_takes_no_steps_and_frees_its_memory(store, monkeypatch):
    monkeypatch.setattr(runs, "merge", merges.holding)
    run_id = store.start(RECIPE, "me")
    until(lambda: store.get(run_id).stages)
    process = psutil.Process(int(store.get(run_id).stages["target"].what))
    assert process.memory_info().rss > merges.HELD and process.pid != os.getpid()
    began = time.monotonic()
    store.cancel(run_id)
    assert over(store, run_id).state == "cancelled"
    until(lambda: not process.is_running())
    assert time.monotonic() - began < 2
    # The one thread that works goes on working.
    monkeypatch.setattr(runs, "merge", merges.done)
    assert over(store, store.start(RECIPE, "me")).state == "done"


def test_a_process_that_the_system_ends_is_one_line(store, monkeypatch):
    monkeypatch.setattr(runs, "merge", merges.holding)
    run_id = store.start(RECIPE, "me")
    until(lambda: store.get(run_id).stages)
    os.kill(int(store.get(run_id).stages["target"].what), signal.SIGKILL)
    run = over(store, run_id)
    assert (run.state, run.fault) == ("failed", False)
    assert run.error.startswith("the system ended this run, as it does where memory runs out; choose smaller models")
    monkeypatch.setattr(runs, "merge", merges.leaving)
    run = over(store, store.start(RECIPE, "me"))
    assert run.state == "failed" and "ended before the run had (exit code 7)" in run.error


def test_a_mistake_is_its_one_line(store, monkeypatch):
    monkeypatch.setattr(runs, "merge", merges.mistaken)
    run = over(store, store.start(RECIPE, "me"))
    assert (run.state, run.fault) == ("failed", False)
    assert run.error == "dataset 'x' in the run's folder is empty; choose another"


def test_what_is_done_with_a_merge_says_no_path_of_its_upload(store, monkeypatch, tmp_path):
    monkeypatch.setattr(runs, "merge", merges.done)
    for refuse in ("refuse_further", "refuse_for_memory"):
        monkeypatch.setattr(runs, refuse, lambda *asked: None)
    monkeypatch.setattr(
        runs, "go_further", lambda further, recipe, folder, call: call(partial(merges.complaining, recipe, folder))
    )
    (tmp_path / "mine.txt").write_text("text")
    recipe = Recipe(target="a/b", source="c/d", calibration={"dataset": "upload:mine.txt"})
    merged = over(store, store.start(recipe, "me", tmp_path / "mine.txt"))
    run = over(store, store.go_on(merged.id, 5, "compare", "me"))
    # The upload is in the merge's folder, which is not the comparison's.
    assert Path(run.read.calibration.dataset).parents[1] == merged.folder.parent != run.folder.parent
    assert run.error == "dataset 'mine.txt' changed; see the run's folder/data.json"
    assert run.stages["target"].what == "reading mine.txt"
    assert any(line.endswith("note: mine.txt has few texts") for line in run.log)
    assert str(store.root) not in "".join(run.log)


@pytest.mark.parametrize(
    ("line", "shown"),
    [
        ("{root}/tmpa_b1/texts/my file.txt is empty", "my file.txt is empty"),
        ("see {root}/tmpa_b1/fused/tmerge/x.json", "see the run's folder/tmerge/x.json"),
        ("{root}/tmpa_b1/merge, {root}/tmpc/adapted", "the run's folder, the run's folder"),
        ("'{root}/tmpa_b1' and '{root}/tmpa_b1/merged'", "'the run's folder' and 'the run's folder/merged'"),
        ("no room in {root}", "no room in the app's folder"),
        ("/elsewhere/texts/x.txt", "/elsewhere/texts/x.txt"),
    ],
)
def test_no_path_under_the_folder_of_all_runs_is_shown(line, shown, tmp_path):
    (tmp_path / "runs").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "runs", target_is_directory=True)
    for root in ((tmp_path / "runs").resolve(), tmp_path / "link"):
        assert without_paths(line.format(root=root), tmp_path / "link") == shown


def test_a_fault_of_ours_is_a_number_whose_traceback_is_in_the_log_alone(store, monkeypatch, caplog):
    monkeypatch.setattr(runs, "merge", merges.at_fault)
    with caplog.at_level(logging.ERROR, logger="tmerge.ui.server.faults"):
        run = over(store, store.start(RECIPE, "me"))
    assert run.fault and "fault of ours" in run.error
    assert "secret" not in run.error + " ".join(run.log)
    number = run.error.split()[-1]
    assert f"fault {number}" in caplog.text and "secret detail" in caplog.text


def digests(folder):
    files = [*folder.glob("*.safetensors"), folder / "tmerge/transport.safetensors", folder / "tmerge/recipe.yaml"]
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_a_run_cancelled_in_its_midst_and_continued_gives_the_same_bytes(store, plain):
    run_id = store.start(plain.recipe, "me", plain.texts)
    run = store.get(run_id)
    until(lambda: "transport" in run.stages, 120)
    began = time.monotonic()
    store.cancel(run_id)
    assert over(store, run_id).state == "cancelled" and time.monotonic() - began < 2
    store.resume(run_id)
    assert not run.over and "target" in run.stages
    assert over(store, run_id, 120).state == "done", run.error
    assert digests(run.folder) == digests(plain.run.folder) and len(digests(run.folder)) == 3
    # What had been finished was not done again, and is shown; each row of costs is there once.
    assert list(run.stages) == list(plain.run.stages)
    assert sorted(run.rows, key=str) == sorted(plain.run.rows, key=str)
    before, _, after = "\n".join(run.log).partition("continued")
    assert "  target: " in before and "  target: " not in after and "transporting weights" in after
    with pytest.raises(RunNotFoundError, match="was not cancelled"):
        store.resume(run_id)


def test_a_continued_run_counts_as_one_of_its_visitors(monkeypatch):
    monkeypatch.setattr(runs, "merge", merges.stepping)
    store = RunStore(AppSettings(runs_per_visitor=1))
    first = store.start(RECIPE, "me")
    store.cancel(first)
    over(store, first)
    second = store.start(RECIPE, "me")
    with pytest.raises(TooManyRunsError, match="you have 1 run"):
        store.resume(first)
    store.cancel(second)
    over(store, second)
    store.resume(first)
    until(lambda: store.get(first).stages)
    store.close()


def test_runs_of_one_visitor_and_of_all_are_counted(monkeypatch):
    monkeypatch.setattr(runs, "merge", merges.stepping)
    store = RunStore(AppSettings(runs_per_visitor=1, total_runs=2))
    mine = store.start(RECIPE, "me")
    with pytest.raises(TooManyRunsError, match="you have 1 run"):
        store.start(RECIPE, "me")
    store.start(RECIPE, "you")
    with pytest.raises(TooManyRunsError, match="2 runs are waiting"):
        store.start(RECIPE, "someone else")
    store.cancel(mine)
    over(store, mine)
    store.start(RECIPE, "me")
    store.close()


def test_a_run_that_goes_while_its_files_are_counted_is_no_fault(tmp_path):
    def files():
        for folder in range(40):
            (tmp_path / f"run/out/{folder}").mkdir(parents=True)
            (tmp_path / f"run/out/{folder}/weights").write_bytes(b"1234")

    run = SimpleNamespace(folder=tmp_path / "run/out")
    files()
    assert room._bytes_of([run, run]) == 160
    with ThreadPoolExecutor(1) as pool:
        for _ in range(40):
            going = pool.submit(shutil.rmtree, tmp_path / "run")
            while not going.done():
                assert room._bytes_of([run]) <= 160
            files()


def test_an_old_run_is_removed_and_one_that_is_looked_at_is_not(monkeypatch):
    monkeypatch.setattr(runs, "merge", merges.done)
    store = RunStore(AppSettings(runs_kept_seconds=100))
    old, looked_at = store.start(RECIPE, "me"), store.start(RECIPE, "me")
    folders = [Path(over(store, one).folder) for one in (old, looked_at)]
    store.get(old).ended = store.get(looked_at).ended = time.time() - 1000
    store._runs[old].looked_at = time.time() - 1000
    store.sweep()
    assert store.get(old) is None and not folders[0].exists()
    assert store.get(looked_at) is not None and folders[1].exists()
    store.close()


def test_ended_runs_take_so_much_of_the_disk_and_what_goes_is_told(monkeypatch):
    monkeypatch.setattr(runs, "merge", merges.done)
    free = 1000
    monkeypatch.setattr(room.shutil, "disk_usage", lambda folder: SimpleNamespace(free=free))
    store = RunStore(AppSettings())
    ids = [store.start(RECIPE, "me") for _ in range(5)]
    ended = [over(store, each) for each in ids]
    for place, run in enumerate(ended):
        (run.folder / "weights").write_bytes(b"0" * 100)
        run.ended = time.time() - 1000 + place
        run.looked_at = time.time() - 900
    # The oldest has a file of the newest, which is there once; the second is read, and the third is being pushed.
    os.link(ended[4].folder / "weights", ended[0].folder / "the same")
    ended[1].looked_at, ended[2].push = time.time(), PushUnderWay("user/fused")
    monkeypatch.setattr(runs, "merge", merges.stepping)
    running = store.start(RECIPE, "me")
    until(lambda: store.get(running).stages)
    (store.get(running).folder.parent / "large").write_bytes(b"0" * 10_000)

    def left():
        store.sweep()
        return [place for place, each in enumerate(ids) if store.get(each, looks=False) is not None]

    # Four of them, not the one that is being pushed, are 400 bytes: no more than half of what is free without them.
    free = 400
    assert left() == [0, 1, 2, 3, 4]
    free = 399
    assert left() == [1, 2, 3, 4] and not ended[0].folder.parent.exists()
    free = 100
    assert left() == [1, 2, 4]
    free = 0
    for _ in range(2):  # the last one stays
        assert left() == [1, 2]
    assert not store.get(running).over
    assert [bool(store.why_gone(each)) for each in ids] == [True, False, False, True, True]
    assert "room" in store.why_gone(ids[0]) and store.why_gone("no such run") == ""
    store.close()


def test_other_heavy_work_waits_for_a_merge_and_a_merge_for_it(store, monkeypatch):
    monkeypatch.setattr(runs, "merge", merges.stepping)
    with store.alone():
        run_id = store.start(RECIPE, "me")
        time.sleep(0.3)
        assert store.get(run_id).state == "waiting" and store.position(run_id) == 0
    until(lambda: store.get(run_id).stages)
    with pytest.raises(BusyError, match="one heavy thing at a time"), store.alone():
        pass
    store.cancel(run_id)
    over(store, run_id)
    with store.alone(5):
        pass
