"""Visitors' runs: one at a time, each known by its id, stopped within seconds, and gone when it is old."""

import gc
import logging
import time
import weakref
from pathlib import Path

import pytest

pytest.importorskip("gradio", reason="the app extra is not installed")

import torch

from tests.pico import save_pico
from tmerge.calibration import sample_texts
from tmerge.errors import DatasetError
from tmerge.recipe import Recipe
from tmerge.run import Run
from tmerge.stages.step import Step
from tmerge.ui.server import runs
from tmerge.ui.server.limits import AppSettings, BusyError, TooManyRunsError
from tmerge.ui.server.runs import RunStore

RECIPE = Recipe(target="a/b", source="c/d")


@pytest.fixture
def store():
    store = RunStore(AppSettings())
    yield store
    store.close()
    assert not store.root.exists()


def until(condition, seconds=20.0):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():
            return
        time.sleep(0.01)
    raise AssertionError(f"not so after {seconds} s")


def over(store, run_id, seconds=20.0):
    until(lambda: store.get(run_id).over, seconds)
    return store.get(run_id)


def stepping(recipe, folder, *, listener):
    """A merge that never ends and asks often."""
    folder.mkdir(parents=True)
    while True:
        listener(Step("target", "reading", 1, 2, "texts"))
        time.sleep(0.01)


def test_a_merge_runs_to_its_end_and_its_folder_is_a_run(store, tmp_path):
    for role, family, layers in (("target", "llama", 3), ("source", "qwen3", 4)):
        save_pico(family, tmp_path / role, layers=layers)
    (tmp_path / "texts.txt").write_text("\n".join(sample_texts("english")[:80]), encoding="utf-8")
    recipe = Recipe.from_mapping(
        {
            "target": str(tmp_path / "target"),
            "source": str(tmp_path / "source"),
            "dtype": "float32",
            "calibration": {"dataset": "upload:texts.txt", "texts": 80},
            "fusion": {"alpha": 0.1},
            "evaluation": {"bootstrap": 100},
        }
    )
    run_id = store.start(recipe, "me", tmp_path / "texts.txt")
    run = over(store, run_id, 120)
    assert run.state == "done", run.error
    assert run.report == Run(run.folder).report().model_copy(update={"calibration": run.report.calibration})
    # Six features of three target layers, each against four source layers.
    assert len(run.rows) == 18 and {len(row.costs) for row in run.rows} == {4}
    assert list(run.stages) == ["texts", "target", "source", "transport", "fuse", "evaluate", "save"]
    assert all(stage.ended is not None for stage in run.stages.values())
    # The upload's path on the server is in nothing that can be downloaded or pushed.
    for name in ("README.md", "tmerge/recipe.yaml", "tmerge/report.json"):
        assert str(store.root) not in (run.folder / name).read_text(encoding="utf-8"), name
    assert "texts.txt" in (run.folder / "tmerge" / "recipe.yaml").read_text(encoding="utf-8")


def test_an_id_is_long_and_not_the_name_of_the_folder(store, monkeypatch):
    monkeypatch.setattr(runs, "merge", stepping)
    ids = [store.start(RECIPE, "me") for _ in range(3)]
    assert len(set(ids)) == 3 and all(len(one) >= 24 for one in ids)
    assert not any(one in str(store.get(one).folder) for one in ids)
    assert store.get("") is None and store.get("x" * 24) is None


def test_the_queue_goes_in_order_and_says_the_place(store, monkeypatch):
    monkeypatch.setattr(runs, "merge", stepping)
    first, second, third = (store.start(RECIPE, "me") for _ in range(3))
    until(lambda: store.get(first).state == "running")
    assert [store.position(one) for one in (first, second, third)] == [0, 1, 2]
    store.cancel(second)
    assert store.get(second).state == "cancelled" and store.position(third) == 1
    store.cancel(first)
    until(lambda: store.get(third).state == "running")
    assert store.get(first).state == "cancelled" and not store.get(first).folder.exists()


def test_cancel_stops_a_forward_pass_between_its_modules(store, monkeypatch):
    class Slow(torch.nn.Module):
        def forward(self, x):
            time.sleep(0.05)
            return x

    def merge(recipe, folder, *, listener):
        listener(Step("target", "one long batch", 0, 1, "texts"))
        torch.nn.Sequential(*[Slow()] * 2000)(torch.zeros(1))

    monkeypatch.setattr(runs, "merge", merge)
    # Nothing else stops it: the thread is not interrupted before the whole pass would be over.
    monkeypatch.setattr(runs, "_GRACE", 1000.0)
    run_id = store.start(RECIPE, "me")
    until(lambda: store.get(run_id).stages)
    store.cancel(run_id)
    assert over(store, run_id).state == "cancelled"


def test_cancel_interrupts_what_takes_no_steps_and_frees_its_memory(store, monkeypatch):
    held = []

    def merge(recipe, folder, *, listener):
        weights = torch.zeros(1000)
        held.append(weakref.ref(weights))
        listener(Step("target", "loading", 0, 1, "models"))
        while True:
            try:
                time.sleep(0.01)
            except Exception:  # noqa: BLE001 - as libraries do: the interruption has to pass it
                weights += 1

    monkeypatch.setattr(runs, "merge", merge)
    run_id = store.start(RECIPE, "me")
    until(lambda: store.get(run_id).stages)
    began = time.monotonic()
    store.cancel(run_id)
    assert over(store, run_id).state == "cancelled"
    assert time.monotonic() - began < 6
    until(lambda: gc.collect() >= 0 and held[0]() is None)
    # The one thread that works goes on working.
    monkeypatch.setattr(runs, "merge", lambda recipe, folder, *, listener: {"verdict": "helps"})
    assert over(store, store.start(RECIPE, "me")).state == "done"


def test_a_mistake_is_its_one_line(store, monkeypatch):
    def merge(recipe, folder, *, listener):
        raise DatasetError(f"dataset 'x' in {folder} is empty; choose another")

    monkeypatch.setattr(runs, "merge", merge)
    run = over(store, store.start(RECIPE, "me"))
    assert (run.state, run.fault) == ("failed", False)
    assert run.error == "dataset 'x' in the run's folder is empty; choose another"


def test_a_fault_of_ours_is_a_number_whose_traceback_is_in_the_log_alone(store, monkeypatch, caplog):
    def merge(recipe, folder, *, listener):
        raise ZeroDivisionError("secret detail")

    monkeypatch.setattr(runs, "merge", merge)
    with caplog.at_level(logging.ERROR, logger="tmerge.ui.server.runs"):
        run = over(store, store.start(RECIPE, "me"))
    assert run.fault and "fault of ours" in run.error
    assert "secret" not in run.error + " ".join(run.log)
    number = run.error.split()[-1]
    assert f"fault {number}" in caplog.text and "secret detail" in caplog.text


def test_runs_of_one_visitor_and_of_all_are_counted(monkeypatch):
    monkeypatch.setattr(runs, "merge", stepping)
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


def test_an_old_run_is_removed_and_one_that_is_looked_at_is_not(monkeypatch):
    def merge(recipe, folder, *, listener):
        folder.mkdir(parents=True)
        return {"verdict": "helps"}

    monkeypatch.setattr(runs, "merge", merge)
    store = RunStore(AppSettings(runs_kept_seconds=100))
    old, looked_at = store.start(RECIPE, "me"), store.start(RECIPE, "me")
    folders = [Path(over(store, one).folder) for one in (old, looked_at)]
    store.get(old).ended = store.get(looked_at).ended = time.time() - 1000
    store._runs[old].looked_at = time.time() - 1000
    store.sweep()
    assert store.get(old) is None and not folders[0].exists()
    assert store.get(looked_at) is not None and folders[1].exists()
    store.close()


def test_other_heavy_work_waits_for_a_merge_and_a_merge_for_it(store, monkeypatch):
    monkeypatch.setattr(runs, "merge", stepping)
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
