"""One run by several processes: the same bytes as by one, one voice, and an end within seconds where one is lost.

The processes are real: `torchrun` begins them, they meet over gloo, and the command line runs in each.
"""

import itertools
import re
import time

import pytest
import torch
from safetensors.torch import load_file

from tests.launched import begun, begun_on_nodes, kill_second
from tests.meeting import Together
from tests.pico import pico_model, save_pico
from tests.stages.test_reconstruct import recipe_for as reconstruction_of
from tests.stages.test_task_vector import _deeper, _shaken, save_all
from tmerge.errors import EndedElsewhereError, ProcessLostError, RecipeError
from tmerge.fusion import StoredNeurons
from tmerge.processes import ALONE, LackedElsewhereError, Processes, _Member
from tmerge.recipe import load_recipe
from tmerge.stages.merge import merge

BESIDE = [
    "calibration.texts=70",
    "calibration.max_tokens=48",
    "calibration.held_out=0.3",
    "calibration.token_rows=200",
    "evaluation.texts=12",
    "evaluation.bootstrap=200",
    "dtype=float32",
    "fusion.alpha=0.5",
]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A target, a deeper relative, what that has become, and a stranger of another family."""
    folder = tmp_path_factory.mktemp("models")
    target = pico_model("llama")
    base = _deeper(target)
    save_all(folder, target=target, base=base, source=_shaken(base, 0.05, 2), other=_shaken(base, 0.05, 3))
    save_pico("qwen2", folder / "stranger", layers=3)
    return folder


def words_of(models, what, settings=()):
    """The command line's, but for --out: a task vector along one structure, or the paper's plans of strangers."""
    words = ["merge", "--target", models / "target", "--dataset", "samples:indonesian"]
    if what == "task vector":
        words += ["--source", models / "source", "--source-base", models / "base"]
    elif what == "several sources":
        words += ["--source", models / "source", "--source", models / "other", "--source-base", models / "base"]
    else:
        words += ["--source", models / "stranger"]
    return [str(word) for word in words] + [word for key in [*BESIDE, *settings] for word in ("--set", key)]


def recipe_of(models, what):
    pair = {"source": str(models / "stranger")}
    if what == "task vector":
        pair = {"source": str(models / "source"), "source_base": str(models / "base")}
    elif what == "several sources":
        sources = [{"source": str(models / name)} for name in ("source", "other")]
        pair = {"sources": sources, "source_base": str(models / "base")}
    return load_recipe(
        None, {"target": str(models / "target"), "calibration.dataset": "samples:indonesian", **pair}, BESIDE
    )


@pytest.mark.parametrize(
    "what",
    [
        "task vector",
        pytest.param("the paper's plans", marks=pytest.mark.slow),
        pytest.param("several sources", marks=pytest.mark.slow),
    ],
)
def test_two_processes_write_what_one_writes(models, tmp_path, what):
    alone = merge(recipe_of(models, what), tmp_path / "alone")
    launcher = begun([*words_of(models, what), "--out", str(tmp_path / "together")])
    output, said = launcher.communicate(timeout=300)
    assert launcher.returncode == 0, said
    # Batches and layers are worked on as one process works on them, so not a bit is another.
    for name in ("model.safetensors", "tmerge/transport.safetensors", "tmerge/recipe.yaml"):
        assert (tmp_path / "alone" / name).read_bytes() == (tmp_path / "together" / name).read_bytes(), name
    together = merge(recipe_of(models, what), tmp_path / "together")  # finished: read again
    assert together.evaluation == alone.evaluation
    assert together.fusion == alone.fusion
    # One of them speaks.
    assert output.count("The model is in") == 1
    assert len(re.findall(r"source: held-out texts: (\d+)/\1 texts", said)) == 1


def test_processes_reconstruct_what_one_does(models, tmp_path):
    kept = {"keep": "samples:english", "keep_texts": 45}
    recipe = reconstruction_of(models, fusion=kept, evaluation={"controls": ["permuted", "texts"]})
    (tmp_path / "recipe.yaml").write_text(recipe.to_yaml())
    alone = merge(recipe, tmp_path / "alone")
    # Three, so that two of them wait for what the first begins.
    launcher = begun(["merge", str(tmp_path / "recipe.yaml"), "--out", str(tmp_path / "together")], 3)
    said = launcher.communicate(timeout=300)[1]
    assert launcher.returncode == 0, said
    together = merge(recipe, tmp_path / "together")  # finished: read again
    assert together.fusion.fit.rows == alone.fusion.fit.rows
    # Sums are added up in another order; of what that changes each later block makes more.
    for name in ("model.safetensors", "tmerge/cache/permuted", "tmerge/cache/texts"):
        one, two = (weights_of(tmp_path / folder / name) for folder in ("alone", "together"))
        assert one.keys() == two.keys()
        for key, weight in one.items():
            torch.testing.assert_close(two[key], weight, rtol=0, atol=2e-3 * float(weight.abs().max()))
    assert together.fusion.fit.ridges == alone.fusion.fit.ridges
    assert len(re.findall(r"reconstructing: (\d+)/\1 layers", said)) == 3


def weights_of(path):
    """Of a file, or of what a stage kept in a folder."""
    if path.is_file():
        return load_file(path)
    return {(item.layer, item.projection): item.weight for item in StoredNeurons(path)}


@pytest.mark.slow
def test_several_machines_write_what_one_process_writes(models, tmp_path):
    words = [*words_of(models, "task vector"), "--out", str(tmp_path / "together")]
    launchers = begun_on_nodes(words)
    said = [launcher.communicate(timeout=300) for launcher in launchers]
    assert [launcher.returncode for launcher in launchers] == [0, 0], said
    merge(recipe_of(models, "task vector"), tmp_path / "alone")
    alone, together = (tmp_path / name / "model.safetensors" for name in ("alone", "together"))
    assert alone.read_bytes() == together.read_bytes()
    # Each has a rank 0 of its own machine; one of all of them speaks.
    assert [output.count("The model is in") for output, _ in said] == [1, 0]


@pytest.mark.slow
def test_a_lost_process_ends_the_run_and_the_same_command_goes_on(models, tmp_path):
    words = [*words_of(models, "task vector"), "--out", str(tmp_path / "together")]
    launcher = begun(words)
    heard = []
    for line in launcher.stderr:
        heard.append(line)
        if line.startswith("[source]"):
            break
    kill_second(launcher)
    began = time.monotonic()
    said = "".join(heard) + launcher.communicate(timeout=120)[1]
    assert time.monotonic() - began < 30
    assert launcher.returncode == 1
    assert re.search(r"rank\s*: 1 \(local_rank: 1\)\s+exitcode\s*: -9", said)
    assert not (tmp_path / "together/model.safetensors").exists()
    launcher = begun(words)
    said = launcher.communicate(timeout=300)[1]
    assert launcher.returncode == 0, said
    assert "[target]" not in said  # that stage had finished
    merge(recipe_of(models, "task vector"), tmp_path / "alone")
    alone, together = (tmp_path / name / "model.safetensors" for name in ("alone", "together"))
    assert alone.read_bytes() == together.read_bytes()


@pytest.mark.slow
def test_a_mistake_is_said_once(models, tmp_path):
    launcher = begun([*words_of(models, "task vector", ["calibration.texts=0"]), "--out", str(tmp_path / "none")])
    said = launcher.communicate(timeout=120)[1]
    assert launcher.returncode == 1 and said.count("error: ") == 1
    assert re.search(r"^error: .*calibration\.texts", said, re.MULTILINE)
    assert not (tmp_path / "none").exists()


@pytest.mark.slow
def test_other_commands_say_that_they_run_in_one(models):
    launcher = begun(["check", "--target", str(models / "target"), "--source", str(models / "source")])
    said = launcher.communicate(timeout=120)[1]
    assert said.count("error: tmerge check runs in one process, and 2 were begun; leave out torchrun") == 1
    assert "accelerate launch, which are for adapt, compare, demo and merge" in said


# -- what they tell each other, with threads in the place of processes ----------------------------------------------


@pytest.mark.parametrize("items", [0, 1, 2, 3, 7, 12])
@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_what_comes_of_all_items_is_in_their_order(count, items):
    def work(processes):
        return processes.of_all([item * item for item in processes.mine(range(items))])

    assert Together(count).run(work) == [[item * item for item in range(items)]] * count
    assert ALONE.of_all(ALONE.mine(range(items))) == list(range(items))


@pytest.mark.parametrize("count", [2, 3])
def test_no_process_has_the_longest_of_every_round(count):
    lengths = [100 - 7 * place for place in range(2 * count * 2)]
    shares = [sum(Processes(rank, count).mine(lengths)) for rank in range(count)]
    assert len(set(shares)) == 1, shares


@pytest.mark.parametrize("work", [[], [5], [3, 3, 3], [9, 1, 1, 1, 6, 2], [1, 2, 3, 4, 5, 6, 7, 8, 9, 10]])
def test_work_of_known_size_is_given_to_who_has_least(work):
    items = [f"{place}" for place in range(len(work))]
    shares = [Processes(rank, 2).mine(items, work) for rank in range(2)]
    assert sorted(sum(shares, [])) == sorted(items) and all(share == sorted(share, key=int) for share in shares)
    loads = [sum(work[int(item)] for item in share) for share in shares]
    assert abs(loads[0] - loads[1]) <= max([*work, 0]) and ALONE.mine(items, work) == items
    # At the most a sixth more than the most even division of all (Graham's bound for two).
    halves = [sum(part) for size in range(len(work) + 1) for part in itertools.combinations(work, size)]
    assert max(loads) <= 7 / 6 * min(max(half, sum(work) - half) for half in halves)


@pytest.mark.parametrize(
    ("hosts", "named"),
    [
        (["here", "there"], "process 1 of 2 (rank 1) has ended"),
        (["here", "there", "there"], "a process on there (one of ranks 1, 2) has ended"),
        (["here", "there", "beyond"], "a process on there, beyond (one of ranks 1, 2) has ended"),
        (["here", "here"], "another process has ended"),
    ],
)
def test_of_a_process_that_is_lost_elsewhere_what_is_known_is_said(monkeypatch, hosts, named):
    monkeypatch.setattr("socket.gethostname", lambda: "here")
    members = tuple(_Member(host, 1) for host in hosts)
    lost = Processes(0, len(hosts), None, members)._of_lost(None, RuntimeError("Connection closed by peer\nand more"))
    assert str(lost) == f"{named} before the run had (Connection closed by peer); the same command goes on"


def test_what_the_first_makes_all_have():
    made = []

    def work(processes):
        return processes.from_first(lambda: made.append(processes.rank) or "made")

    assert Together(3).run(work) == ["made"] * 3 and made == [0]


@pytest.mark.parametrize("count", [2, 3])
def test_sums_are_of_all_and_the_same_in_all(count):
    def work(processes):
        sums = torch.full((2, 2), float(10**processes.rank)), torch.tensor([processes.rank])
        processes.summed(*sums)
        return sums

    for total, ranks in Together(count).run(work):
        assert total.equal(torch.full((2, 2), float(sum(10**rank for rank in range(count)))))
        assert ranks.item() == sum(range(count))


@pytest.mark.parametrize("failing", [0, 1])
def test_an_error_of_one_ends_all_wherever_they_wait(failing):
    def work(processes):
        try:
            with processes.failing_together():
                if processes.rank == failing:
                    raise RecipeError("no such key")
                # The others have gone on to other meetings.
                return processes.from_first(lambda: processes.rank) if processes.rank else processes.gathered(1)
        except (RecipeError, EndedElsewhereError) as error:
            return type(error), str(error)

    told = Together(3).run(work)
    assert told[failing] == (RecipeError, "no such key")
    others = [outcome for rank, outcome in enumerate(told) if rank != failing]
    assert others == [(EndedElsewhereError, f"process {failing} of 3: no such key")] * 2


@pytest.mark.parametrize("lacking", [{0}, {1}, {0, 2}, {0, 1, 2}])
def test_where_some_run_out_of_memory_all_break_off_and_meet_again(lacking):
    def work(processes):
        sums = torch.ones(1)
        with processes.failing_together():
            try:
                processes.wait()
                if processes.rank in lacking:
                    raise torch.OutOfMemoryError("CUDA out of memory")
                processes.summed(sums)
                processes.wait()
            except (MemoryError, RuntimeError) as error:
                processes.lack_together(error)
                return type(error), processes.gathered(processes.rank)

    outcomes = Together(3).run(work)
    for rank, outcome in enumerate(outcomes):
        assert outcome == (torch.OutOfMemoryError if rank in lacking else LackedElsewhereError, [0, 1, 2])


def one_fails(processes):
    if processes.rank:
        raise RecipeError("no such key")
    processes.wait()


def told_by_two(work):
    """What ends each of two processes that do this together."""

    def ended(processes):
        try:
            with processes.failing_together():
                work(processes)
        except (RecipeError, EndedElsewhereError) as error:
            return type(error)

    return Together(2).run(ended)


def test_one_within_another_tells_an_error_once():
    def work(processes):
        with processes.failing_together():
            one_fails(processes)

    # A second telling would wait for processes that are gone.
    assert told_by_two(work) == [EndedElsewhereError, RecipeError]


@pytest.mark.parametrize(("rank", "told"), [(0, RecipeError), (1, ProcessLostError)])
def test_where_a_library_waits_nothing_is_told_and_who_is_not_heard_speaks(rank, told):
    # No meeting: whoever tried to tell would wait for the other process here.
    alone = Together(2).of(rank)
    with pytest.raises(told, match="no such key"), alone.failing_together(), alone.meeting_elsewhere("the training"):
        raise RecipeError("no such key")


def test_after_a_librarys_meetings_ours_tell_again():
    def work(processes):
        with processes.meeting_elsewhere("the training"):
            pass
        one_fails(processes)

    assert told_by_two(work) == [EndedElsewhereError, RecipeError]


def test_the_others_find_what_the_first_has_kept():
    kept = []

    def work(processes):
        return processes.after_first(lambda: (kept.append(processes.rank), list(kept))[1])

    found = Together(3).run(work)
    assert found[0] == [0] and all(before[0] == 0 for before in found)
