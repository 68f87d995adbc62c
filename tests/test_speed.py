"""The machine's speed: measured once, kept with its date, the same for every process; and what is made of it."""

from __future__ import annotations

import datetime
import json

import pytest
import torch

from tests.pico import save_pico
from tmerge.preflight import speed
from tmerge.preflight.check import check
from tmerge.preflight.estimate import _MOST, Estimate
from tmerge.preflight.speed import SPEED_FILE, Timing, timing_of
from tmerge.recipe import Recipe

CPU = torch.device("cpu")


class Machine:
    """A machine of known speed: what it takes for a call, how busy it is, and how often it was asked."""

    def __init__(self):
        self.seconds, self.busy, self.measured = 0.002, 0.0, 0

    def fastest(self, action):
        self.measured += 1
        action()
        return self.seconds


@pytest.fixture
def machine(monkeypatch, tmp_path):
    machine = Machine()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(speed, "_fastest", machine.fastest)
    monkeypatch.setattr(speed, "_busy_percent", lambda: machine.busy)
    monkeypatch.setattr(speed, "_asked", {})
    return machine


def kept(tmp_path):
    return tmp_path / "cache" / "tmerge" / SPEED_FILE


def ask(what="product", dtype=torch.float32):
    return timing_of(what, lambda: lambda: None, CPU, dtype)


def another_process(monkeypatch):
    monkeypatch.setattr(speed, "_asked", {})


def test_a_calm_measurement_is_taken_once_and_kept_with_its_date(machine, monkeypatch, tmp_path):
    first = ask()
    assert first == Timing(0.002, datetime.datetime.now(datetime.timezone.utc).date().isoformat(), True)
    machine.seconds, machine.busy = 0.5, 100.0
    assert ask() == first
    another_process(monkeypatch)
    assert ask() == first and machine.measured == 1
    # Another dtype, and other work, are other timings; all are in one file, and no part of one is left over.
    ask(dtype=torch.bfloat16), ask("sweeps")
    assert machine.measured == 3 and len(json.loads(kept(tmp_path).read_text())) == 3
    assert [path.name for path in kept(tmp_path).parent.iterdir()] == [SPEED_FILE]


def test_what_was_measured_beside_other_work_is_measured_again_and_the_faster_one_stays(machine, monkeypatch):
    machine.busy = 90.0
    assert not ask().calm
    another_process(monkeypatch)
    machine.seconds = 0.009
    assert (ask().seconds, ask().calm) == (0.002, False)
    another_process(monkeypatch)
    machine.seconds, machine.busy = 0.001, 5.0
    assert (ask().seconds, ask().calm) == (0.001, True)
    another_process(monkeypatch)
    assert ask().seconds == 0.001 and machine.measured == 3


def test_on_a_machine_that_is_never_idle_two_tries_that_agree_settle_it(machine, monkeypatch, tmp_path):
    machine.busy = 90.0
    tries = [0.002, 0.004, 0.0021, 0.5]
    for seconds, settled in zip(tries, (False, False, True, True), strict=True):
        machine.seconds = seconds
        found = ask()
        assert (found.seconds, found.settled, found.calm) == (0.002, settled, False)
        another_process(monkeypatch)
    assert machine.measured == 3
    [entry] = json.loads(kept(tmp_path).read_text()).values()
    assert entry["agreeing"] == 2


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[1, 2]",
        '{"KEY": 3}',
        '{"KEY": {"seconds": "fast", "measured": "2026-01-01", "calm": true}}',
        '{"KEY": {"seconds": -1, "measured": "2026-01-01", "calm": true}}',
        '{"KEY": {"seconds": NaN, "measured": "2026-01-01", "calm": true}}',
        '{"KEY": {"seconds": 1, "measured": "<b>", "calm": true}}',
        '{"KEY": {"seconds": 1, "measured": "2026-01-01", "calm": true, "more": 1}}',
    ],
)
def test_a_file_that_is_no_timings_is_as_none(machine, tmp_path, text):
    kept(tmp_path).parent.mkdir(parents=True)
    kept(tmp_path).write_text(text.replace("KEY", speed._key("product", CPU, torch.float32)))
    assert ask().seconds == 0.002 and machine.measured == 1
    assert speed._read(kept(tmp_path)) == {speed._key("product", CPU, torch.float32): ask()}


def test_a_cache_that_cannot_be_written_is_no_error(machine, tmp_path):
    (tmp_path / "cache").write_text("a file where the folder would be")
    assert ask() == ask() and machine.measured == 1


def test_a_real_measurement_leaves_torch_as_it_was():
    threads = torch.get_num_threads()
    left = torch.ones(64, 64)
    with speed._one_thread():
        seconds = speed._fastest(lambda: left @ left)
        assert torch.get_num_threads() == 1
    assert 0 < seconds < 60 and torch.get_num_threads() == threads


# -- what an estimate makes of it ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def picos(tmp_path_factory):
    root = tmp_path_factory.mktemp("picos")
    return {role: str(save_pico(family, root / role)) for role, family in (("target", "llama"), ("source", "gpt2"))}


@pytest.mark.parametrize("structure", ["none", "shared"])
def test_one_recipe_has_one_answer_whatever_the_machine_does(machine, monkeypatch, picos, structure):
    recipe = Recipe.from_mapping({**picos, "dtype": "float32", "transport": {"structure": structure}})
    first = check(recipe).to_dict()["estimate"]
    machine.seconds, machine.busy = 7.0, 100.0
    another_process(monkeypatch)
    later = check(recipe).to_dict()["estimate"]
    # The process's own memory is another one by now.
    first.pop("memory_bytes"), later.pop("memory_bytes")
    assert later == first and first["seconds"] > 0
    low, high = first["range_seconds"]
    assert low < first["seconds"] < high
    today = datetime.datetime.now(datetime.timezone.utc).date().isoformat()
    assert first["measured"] == [today, today] and f"measured on {today}" in first["assumes"]


def test_operations_are_those_of_the_recipe_and_not_of_the_machine(machine, monkeypatch, picos, tmp_path):
    recipe = Recipe.from_mapping({**picos, "dtype": "float32"})
    fast = check(recipe).estimate
    kept(tmp_path).unlink()
    another_process(monkeypatch)
    machine.seconds *= 1000
    slow = check(recipe).estimate
    assert slow.operations == fast.operations and slow.seconds == pytest.approx(1000 * fast.seconds)
    # Twice the sweeps and the alphas are more work.
    more = Recipe.from_mapping(
        {**picos, "dtype": "float32", "transport": {"max_iterations": 400}, "fusion": {"alpha": 0.1}}
    )
    assert check(more).estimate.solve_operations > fast.solve_operations
    assert check(more).estimate.score_operations < fast.score_operations


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (1, "under 10 s"),
        (40, "about 25 to 60 s"),
        (120, "about 1 to 3 min"),
        (476, "about 5.5 to 12 min"),
        (3600, "about 40 to 90 min"),
        (36000, "about 7 to 15 h"),
    ],
)
def test_the_range_is_rounded_to_what_it_is_worth(seconds, words):
    estimate = Estimate({"read": seconds}, 1, 1, 1, "", 0.0, 0.0, 0.0, 0.0, 0.0, ("", ""))
    assert estimate.time_words == words
    assert estimate.range_seconds[1] == _MOST * seconds
