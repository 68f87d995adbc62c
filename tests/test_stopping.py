"""Ctrl-C and SIGTERM, as real signals: the exit code of each, and one line on what is kept and how to go on."""

import os
import shlex
import signal
import sys
import tempfile
import time
from pathlib import Path

import pytest

from tests import forked
from tests.models.pico_gguf import save_pico_gguf
from tests.pico import save_pico
from tests.stages.test_merge import digest, recipe_for
from tmerge import cli
from tmerge.cli import stopping
from tmerge.stages.merge import merge

ROOT = Path(__file__).parents[1]
CODES = {signal.SIGINT: 130, signal.SIGTERM: 143}
both = pytest.mark.parametrize("number", CODES, ids=["SIGINT", "SIGTERM"])

# A merge that says when it is in the midst of a stage, and stays there. What it does with the interrupt is filled in.
MERGE = """
import sys, time
from pathlib import Path
from tmerge.cli import main
from tmerge.stages.{stage} import {kind}

whole = {kind}.do

def waiting(self, *words):
    try:
        Path({ready!r}).touch()
        time.sleep(120)
    except KeyboardInterrupt:
        {then}
    return whole(self, *words)

{kind}.do = waiting
main()
"""


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    save_pico("llama", folder / "target", layers=2)
    save_pico("gpt2", folder / "source", layers=2, seed=1)
    return folder


@pytest.fixture(scope="module")
def finished(pair, tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished") / "fused"
    merge(recipe_for(pair, adaptation={"steps": 2, "batch_size": 2}), folder)
    return folder


def start(words, script=None, **environment):
    """The command line, or a script that runs it, in a process of its own that hears Ctrl-C."""
    path = os.pathsep.join([*filter(None, [environment.pop("before", "")]), str(ROOT)])
    env = {**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", **environment}
    return forked.start(words, script, env=env)


def stopped(process, number, ready):
    """Send the signal when the process is ready: (exit code, lines on stderr)."""
    until = time.monotonic() + 200
    while not ready.exists():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < until
        time.sleep(0.02)
    process.send_signal(number)
    _, said = process.communicate(timeout=100)
    assert "Traceback" not in said
    return process.returncode, said.strip().splitlines()


def merging(pair, tmp_path, stage, then="raise"):
    recipe, ready = tmp_path / "recipe.yaml", tmp_path / "ready"
    recipe.write_text(recipe_for(pair, adaptation={"steps": 2, "batch_size": 2}).to_yaml())
    script = MERGE.format(kind=stage.capitalize(), stage=stage, ready=str(ready), then=then)
    words = ["merge", str(recipe), "--out", str(tmp_path / "fused")]
    return start(words, script), ready, shlex.join(["tmerge", *words])


@pytest.mark.parametrize(
    "number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)], ids=["SIGINT", "SIGTERM"]
)
def test_in_the_midst_of_a_merge(pair, finished, tmp_path, number):
    process, ready, _ = merging(pair, tmp_path, "fuse")
    code, lines = stopped(process, number, ready)
    assert code == CODES[number]
    kept = f"stopped; the finished stages (texts, target, source, transport) are kept in {tmp_path / 'fused'}; "
    assert lines[-1].startswith(kept)
    assert [line for line in lines if line.startswith("stopped")] == lines[-1:]
    # The command that it names is the one that continues, to the same bytes.
    command = lines[-1].partition("to continue: ")[2]
    again = start(shlex.split(command)[1:])
    _, said = again.communicate(timeout=200)
    assert again.returncode == 0 and "reading features" not in said, said
    assert digest(tmp_path / "fused") == digest(finished)


@pytest.mark.slow
def test_before_any_stage_has_finished(pair, tmp_path):
    process, ready, command = merging(pair, tmp_path, "texts")
    code, lines = stopped(process, signal.SIGINT, ready)
    assert code == 130
    assert lines[-1] == f"stopped; no stage had finished, and nothing is kept; to start again: {command}"
    assert not (tmp_path / "fused").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    "then",
    [pytest.param("pass", marks=pytest.mark.slow), "raise RuntimeError('wrapped') from None"],
    ids=["swallowed", "wrapped"],
)
def test_a_stop_that_a_library_loses_is_a_stop(pair, tmp_path, then):
    process, ready, _ = merging(pair, tmp_path, "evaluate", then)
    code, lines = stopped(process, signal.SIGTERM, ready)
    assert code == 143 and "to continue:" in lines[-1]
    assert not (tmp_path / "fused/config.json").exists()


@both
@pytest.mark.parametrize("module", ["typer", "transformers"])
def test_while_libraries_are_imported(pair, tmp_path, module, number):
    # In the place of a library lies a module that sends the signal, and then loses the interrupt.
    (tmp_path / f"{module}.py").write_text(
        f"import os, time\ntry:\n    os.kill(os.getpid(), {int(number)})\n    time.sleep(60)\n"
        "except BaseException:\n    pass\n"
    )
    words = ["merge", "--target", pair / "target", "--source", pair / "source", "--out", tmp_path / "fused"]
    process = start(words, before=str(tmp_path))
    printed, said = process.communicate(timeout=200)
    assert process.returncode == CODES[number], said
    again = shlex.join(["tmerge", *map(str, words)])
    line = f"stopped before anything was begun; nothing was changed; to start again: {again}"
    assert said.splitlines() == [line] and printed == ""
    assert not (tmp_path / "fused").exists()


@pytest.fixture
def command(monkeypatch, capsys):
    """Call the console script with words in this process: (exit code, last line on stderr)."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)

    def call(*words):
        monkeypatch.setattr(sys, "argv", ["/usr/bin/tmerge", *map(str, words)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        return ended.value.code, capsys.readouterr().err.strip().splitlines()[-1]

    yield call
    signal.signal(signal.SIGINT, before)


def send(number):
    def sending(*words, **options):
        os.kill(os.getpid(), number)
        time.sleep(60)

    return sending


@pytest.mark.slow
@both
def test_a_comparison(command, pair, tmp_path, monkeypatch, number):
    path = tmp_path / "recipe.yaml"
    path.write_text(recipe_for(pair, evaluation={"descent": 4}, compare={"rows": [], "alphas": []}).to_yaml())
    monkeypatch.setattr("tmerge.comparison.compare._Comparison._source", send(number))
    code, line = command("compare", path, "--out", tmp_path / "c")
    assert code == CODES[number]
    # base, fused, shrink, noise and permuted come before the source.
    assert line.startswith(f"stopped; the merge and 5 finished rows are kept in {tmp_path / 'c'}; to continue: tmerge ")
    assert len(list((tmp_path / "c/rows").iterdir())) == 5


@both
def test_a_training(command, finished, tmp_path, monkeypatch, number):
    pytest.importorskip("trl", reason="the adapt extra is not installed")
    out = tmp_path / "trained"
    with monkeypatch.context() as patched:
        patched.setattr("tmerge.adaptation.adapt", send(number))
        code, line = command("adapt", finished, "--out", out)
    assert code == CODES[number]
    again = f"to start again: tmerge adapt {finished} --out {out}"
    assert line == f"stopped; no checkpoint of the training had been saved; {again}"
    assert not out.exists()
    kept = {
        "teacher.safetensors": f"what the source predicts is kept in {out}, and no step yet",
        "checkpoint-1/trainer_state.json": f"the training's last checkpoint is kept in {out}",
    }
    for name, words in kept.items():

        def keeping(*asked, work, name=name, **options):
            (work / name).parent.mkdir(parents=True, exist_ok=True)
            (work / name).write_text("{}")
            send(number)()

        with monkeypatch.context() as patched:
            patched.setattr("tmerge.adaptation.adapt", keeping)
            code, line = command("adapt", finished, "--out", out)
        assert code == CODES[number]
        assert line.startswith(f"stopped; {words}; to continue: tmerge adapt ")


@both
def test_a_push(command, finished, monkeypatch, number):
    monkeypatch.setattr("tmerge.hub.push", send(number))
    code, line = command("push", finished, "--repo", "user/fused", "--even-if-worse")
    assert code == CODES[number]
    assert line == (
        f"stopped; {finished} is kept, and user/fused has all of it or nothing of it; to push it: "
        f"tmerge push {finished} --repo user/fused --even-if-worse"
    )


@both
def test_a_second_signal_does_not_wait(tmp_path, number):
    ready, script = (
        tmp_path / "ready",
        (
            "import os, sys, time\nfrom pathlib import Path\nfrom tmerge.cli import stopping\n"
            "with stopping.signals_heard():\n"
            "    stopping.when_stopped(lambda: 'never said')\n"
            "    try:\n        os.kill(os.getpid(), 2)\n        time.sleep(60)\n"
            "    finally:\n        Path(sys.argv[1]).touch()\n        time.sleep(60)\n"
        ),
    )
    code, lines = stopped(start([ready, "merge", "x.yaml"], script), number, ready)
    assert code == CODES[number]
    assert lines == [f"stopped at once; to go on: tmerge {ready} merge x.yaml"]


@both
@pytest.mark.parametrize("name", ["check", "merge"])
def test_what_is_read_of_a_gguf_file_is_put_away(command, pair, tmp_path, monkeypatch, number, name):
    # A GGUF file is read through a folder of its own, which a stop must not leave behind.
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr("tmerge.models.place.load_config", send(number), raising=True)
    save_pico_gguf(tmp_path / "source.gguf")
    words = ["--target", tmp_path / "source.gguf", "--source", pair / "source"]
    code, line = command(name, *words, *(["--dry-run"] if name == "merge" else []))
    assert code == CODES[number]
    assert line.startswith(f"stopped; nothing was changed; to start again: tmerge {name} ")
    assert not list(tmp_path.glob("tmerge-*"))


@pytest.mark.parametrize("words", [["inspect", "nowhere"], ["push", "nowhere", "--repo", "user/x", "--dry-run"]])
def test_commands_that_keep_nothing_unwind(command, monkeypatch, words):
    unwound = []

    def reading(*_, **options):
        try:
            send(signal.SIGTERM)()
        finally:
            unwound.append(True)

    monkeypatch.setattr("tmerge.hub.find_run", reading)
    monkeypatch.setattr("tmerge.hub.plan_push", reading)
    code, line = command(*words)
    assert code == 143 and unwound
    assert line.startswith("stopped; nothing was changed; to start again: tmerge ")


def test_stages_of_an_earlier_call_are_not_named(tmp_path, monkeypatch):
    # They may be of a dataset or a model that has changed since.
    monkeypatch.setattr(sys, "argv", ["tmerge", "merge"])
    cache = tmp_path / "tmerge/cache"
    cache.mkdir(parents=True)
    (cache / "texts.json").touch()
    os.utime(cache / "texts.json", (1, 1))
    with stopping.signals_heard():
        assert stopping.stages_kept(tmp_path) == f"what is finished is kept in {tmp_path}; to continue: tmerge merge"
        os.utime(cache / "texts.json", (time.time() + 1, time.time() + 1))
        assert stopping.stages_kept(tmp_path).startswith("the finished stages (texts) are kept in ")


def test_a_handler_that_python_did_not_set_is_left_alone(monkeypatch):
    before = {number: signal.getsignal(number) for number in CODES}
    try:
        with monkeypatch.context() as patched:
            patched.setattr(signal, "getsignal", lambda number: None)
            with stopping.signals_heard():
                pass
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def test_a_signal_after_the_end_changes_nothing(command, monkeypatch):
    ended = cli.stopping.finished

    def too_late():
        ended()
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr("tmerge.cli.stopping.finished", too_late)
    assert command("inspect", "nowhere")[0] == 2


def test_how_signals_were_heard_before_is_how_they_are_heard_after(command):
    before = [signal.getsignal(number) for number in CODES]
    assert command("inspect", "nowhere")[0] == 2
    assert [signal.getsignal(number) for number in CODES] == before
