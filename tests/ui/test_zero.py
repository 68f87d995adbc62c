"""Merges whose forward passes run in calls that are lent a GPU: the same bytes, stopped in time, on the right quota."""

import contextvars
import hashlib
import os
import sys
import time

import pytest

pytest.importorskip("gradio", reason="the app extra is not installed")

import torch
from gradio.context import LocalContext

from tests.ui.lent_gpu import LentGpu
from tmerge.errors import RecipeError, TmergeError
from tmerge.models.device import DEVICE_VARIABLE
from tmerge.preflight.check import check
from tmerge.recipe import Recipe
from tmerge.stages.evaluate import Evaluate
from tmerge.stages.fuse import Fuse
from tmerge.stages.merge import merge
from tmerge.stages.save import Save
from tmerge.stages.texts import Texts
from tmerge.stages.transport import SolveTransport
from tmerge.ui.parts import expected
from tmerge.ui.server import zero
from tmerge.ui.server.limits import AppSettings, vetted
from tmerge.ui.server.runs import RunStore

GPU = {"source": 31.0, "evaluate": 23.0}


@pytest.fixture
def lent(monkeypatch):
    """A ZeroGPU Space, as the app sees it: torch says that there is a GPU, and the environment knows better."""
    lent = LentGpu()
    monkeypatch.setitem(sys.modules, "spaces", lent)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv(DEVICE_VARIABLE, "cpu")
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    zero.lent.cache_clear()
    yield lent
    zero.lent.cache_clear()


@pytest.fixture
def store(lent):
    store = RunStore(AppSettings())
    yield store
    store.close()


@pytest.fixture
def recipe(models):
    return Recipe.from_mapping(
        {
            "target": str(models / "target"),
            "source": str(models / "source"),
            "dtype": "float32",
            "calibration": {"dataset": str(models / "texts.txt"), "texts": 80},
            "evaluation": {"bootstrap": 100, "descent": 8},
            "fusion": {"alpha": "auto", "alphas": [0.1, 0.3]},
        }
    )


def over(store, run_id, seconds=120.0):
    end = time.monotonic() + seconds
    while not store.get(run_id).over:
        assert time.monotonic() < end, list(store.get(run_id).log)
        time.sleep(0.05)
    return store.get(run_id)


def until(condition, seconds=60.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def digests(folder):
    files = [*folder.glob("*.safetensors"), folder / "tmerge/transport.safetensors", folder / "tmerge/recipe.yaml"]
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def is_gone(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return False


@pytest.mark.slow
def test_the_result_is_that_of_a_plain_merge_to_the_byte(store, lent, recipe, tmp_path, monkeypatch):
    run_id = contextvars.copy_context().run(_start_as, "the visitor's request", store, recipe)
    run = over(store, run_id)
    assert run.state == "done", (run.error, list(run.log))
    # Two calls, each in a process of its own, with the seconds and the request of who started the run.
    assert lent.asked == [("the visitor's request", 31.0), ("the visitor's request", 23.0)]
    assert len(set(lent.pids)) == 2 and os.getpid() not in lent.pids and all(map(is_gone, lent.pids))
    # The page sees what it sees of a run that is not taken in turns.
    assert list(run.stages) == ["texts", "target", "source", "transport", "fuse", "choose", "evaluate", "save"]
    assert len(run.rows) == 18
    # What the check notes, and whether the neurons correspond.
    assert sum("note: " in line for line in run.log) == len(set(check(recipe).notes)) + 1
    monkeypatch.undo()
    report = merge(recipe, tmp_path / "plain")
    assert digests(run.folder) == digests(tmp_path / "plain")
    for key in ("verdict", "evaluation", "fusion", "calibration", "device", "weights"):
        assert getattr(run.report, key) == getattr(report, key), key


def test_what_is_tried_speaks_without_a_gpu(store, lent, recipe, models):
    from tmerge.answers import Question
    from tmerge.ui.server.speaking import ROLES, Speaker

    *_, said = Speaker(store).ask("me", recipe, models / "target", Question("Kota", tokens=2))
    assert [said[role].state for role in ROLES] == ["done"] * 3, said
    assert lent.asked == []


def _start_as(request, store, recipe):
    LocalContext.request.set(request)
    return store.start(recipe, "me", gpu=GPU)


@pytest.mark.slow
def test_only_the_reading_and_the_scoring_are_in_lent_calls_and_nothing_is_in_the_apps_process(
    store, lent, recipe, monkeypatch, tmp_path
):
    def noting(stage):
        plain = stage.do

        def note(self, *words):
            (tmp_path / stage.name).write_text(str(os.getpid()))
            return plain(self, *words)

        return note

    # A lent call is a fork of the app, where this holds too; the run's own process begins anew, where it does not.
    for stage in (Texts, SolveTransport, Fuse, Evaluate, Save):
        monkeypatch.setattr(stage, "do", noting(stage))
    assert over(store, store.start(recipe, "me", gpu=GPU)).state == "done"
    assert {path.name: int(path.read_text()) for path in tmp_path.iterdir()} == {"evaluate": lent.pids[1]}


@pytest.mark.parametrize("stuck", [False, True])
def test_cancel_ends_the_lent_process_too(store, lent, recipe, monkeypatch, stuck):
    def slow(model, *words, progress, **options):
        while True:
            if not stuck:
                progress(1, 2)
            time.sleep(0.1)

    monkeypatch.setattr("tmerge.stages.read.capture", slow)
    monkeypatch.setattr(zero, "_PATIENCE", 1.0)
    run_id = store.start(recipe, "me", gpu=GPU)
    until(lambda: "target" in store.get(run_id).stages)
    began = time.monotonic()
    store.cancel(run_id)
    run = over(store, run_id)
    assert run.state == "cancelled" and time.monotonic() - began < 6
    assert is_gone(lent.pids[0])


def test_what_a_user_can_mend_arrives_with_its_words(store, lent, recipe, monkeypatch):
    def refuse(*words, **options):
        raise RecipeError("the value is wrong; take another")

    monkeypatch.setattr("tmerge.stages.read.capture", refuse)
    run = over(store, store.start(recipe, "me", gpu=GPU))
    assert (run.state, run.fault, run.error) == ("failed", False, "the value is wrong; take another")


def test_a_fault_in_the_lent_call_is_a_fault_of_ours(store, lent, recipe, monkeypatch):
    def fail(*words, **options):
        raise ZeroDivisionError

    monkeypatch.setattr("tmerge.stages.read.capture", fail)
    run = over(store, store.start(recipe, "me", gpu=GPU))
    assert run.state == "failed" and run.fault


def test_a_quota_that_is_used_up_is_one_line(store, lent, recipe):
    lent.refuse = "You have exceeded your free ZeroGPU quota (31s requested vs. 3s left). Try again in 3:00:00. "
    run = over(store, store.start(recipe, "me", gpu=GPU))
    assert (run.state, run.fault) == ("failed", False)
    assert run.error.startswith("ZeroGPU: You have exceeded your free ZeroGPU quota (31s requested vs. 3s left)")
    assert "as a job on your own account" in run.error


def test_a_gpu_that_is_taken_back_is_one_line(store, lent, recipe, monkeypatch):
    monkeypatch.setattr("tmerge.stages.read.capture", lambda *words, **options: time.sleep(60))
    lent.take_back = True
    run = over(store, store.start(recipe, "me", gpu=GPU))
    assert (run.state, run.fault) == ("failed", False)
    assert "the GPU was taken back, perhaps after the 31 s" in run.error


def test_the_seconds_asked_for_are_a_bound_made_of_the_checks_operations(models, recipe):
    found = check(recipe)
    least = zero.gpu_seconds(found, recipe)
    assert set(least) == set(zero.GPU_TURNS)
    # Longer texts, a larger pair: more is asked for, in proportion to the operations.
    import dataclasses

    more = dataclasses.replace(
        found, estimate=dataclasses.replace(found.estimate, read_operations=4e13, score_operations=2e13)
    )
    seconds = zero.gpu_seconds(more, recipe)
    assert seconds["source"] - 20 == pytest.approx(4e13 * 256 / 64 / 5e12, abs=1.5)
    assert seconds["evaluate"] - 20 == pytest.approx(2e13 * 256 / 64 / 5e12, abs=1.5)
    # And it bounds what the run's own forward passes count: every text at its longest, and the descent control.
    assert found.estimate.score_operations > 0 and found.estimate.read_operations > 0


def test_a_run_beyond_what_is_lent_is_refused_before_anything_is_fetched(recipe):
    here = expected._check(recipe, AppSettings(zero_gpu=True, max_gpu_seconds=30))
    assert here.gpu is None and "s of a GPU, where this app asks for 30 s" in here.refused
    here = expected._check(recipe, AppSettings(zero_gpu=True, max_gpu_seconds=300))
    assert here.refused is None and set(here.gpu) == set(zero.GPU_TURNS)
    assert "not measured" in here.found.estimate.assumes
    assert expected._check(recipe, AppSettings()).gpu is None


def test_the_device_is_the_spaces_to_choose():
    recipe = Recipe(target="a/b", source="c/d", device="cuda")
    with pytest.raises(RecipeError, match="takes auto alone"):
        vetted(recipe, AppSettings(zero_gpu=True))
    assert vetted(recipe, AppSettings()).device == "cuda"


def test_a_folder_named_spaces_is_not_taken_for_the_package(monkeypatch):
    import types

    monkeypatch.setitem(sys.modules, "spaces", types.ModuleType("spaces"))
    zero.lent.cache_clear()
    with pytest.raises(TmergeError, match=r"add spaces to requirements\.txt"):
        zero.lent()
