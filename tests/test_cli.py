"""The command line: what it prints where, its exit codes, and one line for every mistake with nothing left behind."""

import errno
import json
import sys

import pytest
import torch

from tests.pico import save_pico
from tmerge import cli
from tmerge.recipe import recipe_page
from tmerge.version import VERSION

PAIR = ("--target", "a", "--source", "b")


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    save_pico("llama", folder / "target", layers=2)
    save_pico("gpt_neox", folder / "source", layers=3, seed=1)
    return folder


@pytest.fixture
def run(monkeypatch, capsys):
    """Call the console script with words; returns (exit code, stdout, stderr)."""

    def call(*words):
        monkeypatch.setattr(sys, "argv", ["tmerge", *map(str, words)])
        code = 0
        try:
            cli.main()
        except SystemExit as ended:
            code = ended.code or 0
        out, err = capsys.readouterr()
        return code, out, err

    return call


def small(pair, out):
    return [
        *("--target", pair / "target", "--source", pair / "source", "--dataset", "samples:english", "--out", out),
        *("--set", "calibration.texts=60", "--set", "calibration.max_tokens=32", "--set", "calibration.held_out=0.3"),
        *("--set", "evaluation.bootstrap=100", "--set", "fusion.top_k=0.25"),
    ]


def test_merge_then_inspect(run, pair, tmp_path):
    out = tmp_path / "fused"
    code, printed, progress = run("merge", *small(pair, out))
    assert code == 0, progress
    assert "bits per byte" in printed and "The merge" in printed
    assert "[transport]" in progress and "[transport]" not in printed
    code, printed, _ = run("inspect", out, "--json")
    assert code == 0
    report = json.loads(printed)
    assert report["schema"] == 1
    page = tmp_path / "page.html"
    code, printed, _ = run("inspect", out, "--html", page)
    assert code == 0 and printed == ""
    assert report["verdict"] in page.read_text()
    # The same command again recognises the finished run; --json prints the report alone.
    code, printed, _ = run("merge", *small(pair, out), "--json", "--resume")
    assert code == 0 and json.loads(printed) == report


@pytest.mark.slow
def test_a_merge_draws_its_page(run, pair, tmp_path):
    out = tmp_path / "fused"
    code, printed, progress = run("merge", *small(pair, out), "--html", out / "tmerge" / "report.html")
    assert code == 0, progress
    drawn = (out / "tmerge" / "report.html").read_text()
    assert json.loads((out / "tmerge" / "report.json").read_text())["verdict"] in drawn
    assert f"its pictures: {out / 'tmerge' / 'report.html'}" in printed.replace("\n", "")
    # Drawn by `inspect` it is the same page.
    code, _, _ = run("inspect", out, "--html", tmp_path / "page.html")
    assert code == 0 and (tmp_path / "page.html").read_text() == drawn


@pytest.mark.parametrize("page", ["absent/page.html", "."])
def test_a_page_that_cannot_be_written_is_said_before_the_run(run, pair, tmp_path, monkeypatch, page):
    monkeypatch.chdir(tmp_path)
    code, printed, said = run("merge", *small(pair, tmp_path / "fused"), "--html", page)
    assert code == 2 and printed == "" and "after --html" in said
    assert list(tmp_path.iterdir()) == []


def test_check_and_dry_run_write_nothing(run, pair, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, printed, _ = run("check", "--target", pair / "target", "--source", pair / "source", "--json")
    assert code == 0
    facts = json.loads(printed)
    assert facts["target"]["architecture"] == "llama" and facts["source"]["architecture"] == "gpt_neox"
    assert list(facts["projections"]["matched"]) == ["q", "k", "v", "o"]
    assert facts["estimate"]["seconds"] > 0 and facts["estimate"]["disk_bytes"] > 0
    code, printed, _ = run("merge", *small(pair, tmp_path / "fused"), "--dry-run")
    assert code == 0 and "expected:" in printed and "alpha: auto" in printed
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_check_asks_whether_the_neurons_correspond(run, pair, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = ("--dataset", "samples:english", "--set", "calibration.texts=90", "--relatedness")
    found = {}
    for name in ("source", "target"):
        code, printed, progress = run("check", "--target", pair / "target", "--source", pair / name, *words, "--json")
        assert code == 0 and "[transport] relatedness" in progress
        found[name] = json.loads(printed)["relatedness"]
    # With itself every neuron is found twice; gpt_neox with random weights of its own has none of them.
    assert found["target"]["value"] == 1.0 and found["source"]["value"] < 0.4
    assert all(item["permuted"] < 0.2 for item in found.values())
    of_weights = {name: item["weights"] for name, item in found.items()}
    assert (
        of_weights["target"]["paired"] > 0.999 and of_weights["target"]["clear"] and not of_weights["source"]["clear"]
    )
    code, printed, _ = run("check", "--target", pair / "target", "--source", pair / "source", *words)
    assert code == 0 and "share no correspondence" in printed and f"{found['source']['value']:.2f}" in printed
    assert list(tmp_path.iterdir()) == []


def _truncated(folder):
    save_pico("llama", folder)
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])
    return folder


def _pickled(folder):
    save_pico("llama", folder)
    (folder / "model.safetensors").unlink()
    torch.save({}, folder / "pytorch_model.bin")
    return folder


def _without_tokenizer(folder):
    save_pico("llama", folder)
    for path in folder.glob("tokenizer*"):
        path.unlink()
    return folder


def _wrong_gguf(folder):
    folder.mkdir()
    path = folder / "model.gguf"
    path.write_bytes(b"GGML" + bytes(100))
    return path


def _encoder_decoder(folder):
    from transformers import T5Config

    T5Config(d_model=16, num_layers=1, d_kv=4, d_ff=16, num_heads=2, vocab_size=64).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda folder: folder / "missing", ["missing"]),
        (lambda folder: "./nowhere", ["nowhere"]),
        (_truncated, ["model.safetensors"]),
        (_pickled, ["safetensors"]),
        (_without_tokenizer, ["tokenizer"]),
        (_wrong_gguf, ["model.gguf"]),
        (_encoder_decoder, ["t5"]),
    ],
)
@pytest.mark.parametrize("side", ["target", "source"])
def test_bad_models_are_one_line_and_leave_nothing(run, pair, tmp_path, make, words, side):
    reference = make(tmp_path / "model")
    words_of = {"target": pair / "target", "source": pair / "source"} | {side: reference}
    out = tmp_path / "fused"
    code, printed, said = run("merge", "--target", words_of["target"], "--source", words_of["source"], "--out", out)
    error = [line for line in said.splitlines() if line.startswith("error: ")]
    assert code == 2, said
    assert len(error) == 1 and said.rstrip().endswith(error[0])
    assert all(word in error[0] for word in words), error
    assert "Traceback" not in said and printed == ""
    assert not out.exists()


@pytest.mark.parametrize(
    ("lines", "settings", "words"),
    [
        (None, [], ["texts.jsonl"]),
        ([], [], ["texts.jsonl"]),
        (['{"text": "one"}'] * 3, [], ["16"]),
        (['{"text": "a", "title": "b"}'] * 40, ["calibration.column=titel"], ["titel", "title"]),
        (['{"text": "a"}', "{nope"], [], ["line 2"]),
    ],
)
def test_bad_datasets_are_one_line_and_leave_nothing(run, pair, tmp_path, lines, settings, words):
    path = tmp_path / "texts.jsonl"
    if lines is not None:
        path.write_text("\n".join(lines))
    out = tmp_path / "fused"
    words_given = ["--target", pair / "target", "--source", pair / "source", "--dataset", path, "--out", out]
    for setting in settings:
        words_given += ["--set", setting]
    code, _, said = run("merge", *words_given)
    error = [line for line in said.splitlines() if line.startswith("error: ")]
    assert code == 2 and len(error) == 1 and "Traceback" not in said
    assert all(word in error[0] for word in words), error
    assert not out.exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["merge"], "'target' is missing"),
        (["merge", "nope.yaml"], "no such file"),
        (["merge", "--target", "a", "--source", "b", "--set", "fusion.alpha=2"], "in [0, 1]"),
        (["merge", "--target", "a", "--source", "b", "--set", "fusion.alhpa=0.2"], "did you mean 'alpha'"),
        (["merge", "--target", "a", "--source", "b", "--resume", "--out", "nowhere"], "no run in nowhere"),
        (["inspect", "nowhere"], "not a run of tmerge"),
        (["merge", "--target", "demo:nothing", "--source", "demo:gemma-3-270m"], "demo:nothing"),
        (["merge", "--target", "a" * 300, "--source", "b"], "is no model: File name too long; give a Hub id"),
        (["merge", "--target", "~nobody-of-this-name/a", "--source", "b"], "is no model: Could not determine home"),
        (["merge", "--target", "a\0b", "--source", "b"], "neither a folder or .gguf file here nor a Hub id"),
        (["merge", "--target", "a", "--source", "b", "--seed", str(2**64)], "seed"),
        (["merge", "--target", "a", "--source", "b", "--out", "o" * 300], "File name too long; give another path"),
        (["merge", "r" * 300], "File name too long"),
        (["inspect", "r" * 300], "File name too long"),
    ],
)
def test_bad_words_exit_2(run, tmp_path, monkeypatch, words, said):
    monkeypatch.chdir(tmp_path)
    code, printed, err = run(*words)
    assert code == 2 and said in err and "Traceback" not in err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--nonsense"], "no such option: --nonsense; see tmerge --help"),
        (["nonsense"], "no such command 'nonsense'; see tmerge --help"),
        (["mrge"], "no such command 'mrge'. Did you mean 'merge'? see tmerge --help"),
        (["merge", "--xyz"], "no such option: --xyz; see tmerge merge --help"),
        (
            ["merge", "--sett", "a=1"],
            "no such option: --sett (Possible options: --save, --seed, --set); see tmerge mer",
        ),
        (["merge", "--out"], "option '--out' requires an argument; see tmerge merge --help"),
        (["merge", "--json=5"], "option '--json' does not take a value; see tmerge merge --help"),
        (["merge", "a", "b"], "got unexpected extra argument(s) (b); see tmerge merge --help"),
        (["evaluate"], "missing argument 'models'; see tmerge evaluate --help"),
        (["evaluate", "a", "--texts", "x"], "invalid value for '--texts': give a whole number; see tmerge evaluate"),
        (["evaluate", "a", "--texts", "3"], "invalid value for '--texts': give 8 or more; see tmerge evaluate --help"),
        (["evaluate", "a", "--seed", str(2**64)], "invalid value for '--seed': give"),
        (["merge", *PAIR, "--even-if-worse"], "--even-if-worse: nothing comes of it without --push; add that, or lea"),
        (
            ["merge", *PAIR, "--remote-timeout", "1h", "--remote-package", "x"],
            "--remote-package and --remote-timeout: n",
        ),
        (["merge", "--non\nsense"], "--non"),
        (["check"], "recipe: 'target' is missing; name it in the recipe or as --target REF"),
        (["merge", "--target", "a", "--source", "b", "--what", "nonsense"], "recipe: fusion.what is 'nonsense': it ta"),
    ],
)
def test_words_that_are_amiss_are_one_line_with_what_to_do(run, tmp_path, monkeypatch, words, said):
    monkeypatch.chdir(tmp_path)
    code, printed, err = run(*words)
    assert (code, printed) == (2, "") and err.startswith("error: ") and said in err
    assert err.count("\n") == 1 and err.endswith("\n")
    assert list(tmp_path.iterdir()) == []


def test_without_a_word_and_when_asked_there_is_help(run):
    code, printed, err = run()
    assert code == 2 and printed == "" and err.startswith("Usage: ") and "Commands:" in err
    code, printed, err = run("--help")
    assert code == 0 and err == "" and printed.startswith("Usage: ") and "Commands:" in printed
    assert run("merge", "--help")[1].startswith("Usage: ")


def test_the_version(run):
    assert run("--version") == (0, f"tmerge {VERSION}\n", "")


def test_all_keys_of_a_recipe(run):
    code, printed, _ = run("recipe")
    assert code == 0 and printed == recipe_page()
    assert "`tmerge recipe`" in run("merge", "--help")[1]


def test_settings_of_a_training_are_read_as_a_recipes_are(run):
    code, _, said = run("adapt", "nowhere", "--set", "adaptation.steps=[")
    assert code == 2 and "--set 'adaptation.steps=['" in said and "Traceback" not in said


def test_an_output_folder_that_is_something_else_is_left_alone(run, pair, tmp_path):
    out = tmp_path / "thesis"
    out.mkdir()
    (out / "chapter1.txt").write_text("precious")
    code, _, said = run("merge", *small(pair, out))
    assert code == 2 and "not a run of tmerge" in said
    assert [path.name for path in out.iterdir()] == ["chapter1.txt"]


def test_a_run_that_cannot_fit_is_refused_with_what_to_change(run, pair, tmp_path, monkeypatch):
    from tmerge.preflight import check

    monkeypatch.setattr(check, "available_memory", lambda device: 1000)
    code, _, said = run("merge", *small(pair, tmp_path / "fused"))
    assert code == 2 and "free" in said and "batch_tokens" in said
    monkeypatch.undo()
    assert not (tmp_path / "fused").exists()


def test_no_disk_is_refused_with_what_to_change(run, pair, tmp_path, monkeypatch):
    import shutil

    from tmerge.preflight import check

    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(check.shutil, "disk_usage", lambda path: usage._replace(free=1000))
    code, _, said = run("merge", *small(pair, tmp_path / "fused"))
    assert code == 2 and "of disk" in said and "--out" in said
    assert not (tmp_path / "fused").exists()


def test_a_device_that_is_not_there(run, pair, tmp_path):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU here, so the error cannot be seen")
    code, _, said = run("merge", *small(pair, tmp_path / "fused"), "--device", "cuda")
    assert code == 2 and "cuda" in said and not (tmp_path / "fused").exists()


def test_a_fault_of_ours_keeps_its_traceback_and_exits_1(run, pair, tmp_path, monkeypatch):
    def broken(*_, **__):
        raise RuntimeError("a bug")

    monkeypatch.setattr("tmerge.stages.transport.solve_apart", broken)
    with pytest.raises(RuntimeError, match="a bug"):
        run("merge", *small(pair, tmp_path / "fused"))


@pytest.mark.slow
@pytest.mark.parametrize(
    "fault",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        # As safetensors says it.
        RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)"),
    ],
)
def test_a_disk_that_fills_meanwhile_is_one_line(run, pair, tmp_path, monkeypatch, fault):
    from tmerge.fusion import stored

    def broken(*_, **__):
        raise fault

    with monkeypatch.context() as patched:
        patched.setattr(stored, "write_tensors", broken)
        code, _, said = run("merge", *small(pair, tmp_path / "fused"))
    assert code == 2 and said.strip().splitlines()[-1].startswith("error: the disk is full; make room")
    assert run("merge", *small(pair, tmp_path / "fused"))[0] == 0
