"""Several sources on the command line: options given again, a recipe, one line with exit code 2 for what is none."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.pico import pico_model, save_pico
from tests.pico_adapter import save_adapter
from tests.stages.test_task_vector import _deeper, _shaken, save_all
from tests.test_cli import run  # noqa: F401 - a fixture

SMALL = [
    word
    for key in (
        *(
            "calibration.texts=60",
            "calibration.max_tokens=48",
            "calibration.held_out=0.3",
            "calibration.token_rows=200",
        ),
        *("evaluation.texts=12", "evaluation.bootstrap=200", "dtype=float32", "fusion.alpha=0.5"),
    )
    for word in ("--set", key)
]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    target = pico_model("llama")
    base = _shaken(_deeper(target), 0.02, 1)
    save_all(folder, target=target, base=base, tuned=_shaken(base, 0.05, 2))
    for seed, name in enumerate(("one", "two")):
        save_adapter(folder / "base", folder / name, seed=seed, target_modules=["q_proj", "up_proj"], size=0.05)
    save_pico("phi3", folder / "stranger", layers=3)
    return folder


def test_two_adapters_are_checked_merged_and_shown(run, models, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.chdir(models)
    monkeypatch.setenv("COLUMNS", "250")  # so that no cell is broken
    words = ["--target", "target", "--source-base", "base", "--adapter", "one", "--adapter", "two"]
    code, printed, said = run("check", *words, "--json")
    assert code == 0, said
    facts = json.loads(printed)
    assert [source["adapter"]["ref"] for source in facts["sources"]] == ["one", "two"]
    assert facts["source"]["ref"] == facts["source_base"]["ref"] == "base"
    assert set(facts["projections"]["matched"]) == {"q", "up"}
    code, printed, _ = run("check", *words)
    assert code == 0 and "source 2" in printed and "source_base" in printed and "base + two" in printed
    out = tmp_path / "fused"
    words += ["--dataset", "samples:english", *SMALL, "--set", "fusion.join=ties", "--out", out]
    code, printed, said = run("merge", *words)
    assert code == 0, said
    assert "source 1 alone, one at strength 0.5" in printed and "joined by TIES, the largest 50 % of each" in printed
    assert "transporting weights of source 2" in said
    code, printed, _ = run("inspect", out, "--json")
    report = json.loads(printed)
    assert [source["model"]["adapter"]["ref"] for source in report["sources"]] == ["one", "two"]
    assert set(report["evaluation"]["alone"]) == {"source 1", "source 2"}
    # The resolved recipe is the run's: the same command on it finds everything done.
    code, _, said = run("merge", out / "tmerge/recipe.yaml", "--out", out)
    assert code == 0 and "[fuse]" not in said and "[target]" not in said


def test_a_recipe_of_models_and_adapters_runs_dry(run, models, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.chdir(models)
    path = tmp_path / "recipe.yaml"
    path.write_text("target: target\nsource_base: base\nsources:\n  - source: tuned\n  - {adapter: one, weight: 0.5}\n")
    code, printed, said = run("merge", path, "--dry-run", "--json")
    assert code == 0, said
    assert json.loads(printed)["recipe"]["sources"][1] == {"source": None, "adapter": "one", "weight": 0.5}


@pytest.mark.parametrize(
    ("words", "said_words"),
    [
        (["--source", "tuned", "--source", "stranger"], "source 2 stranger is not of source_base base's shape"),
        (["--adapter", "one", "--adapter", "tuned"], "has no adapter_config.json"),
        (["--adapter", "one", "--adapter", "one"], "source 2 is one, as source 1 is"),
        (["--source", "tuned", "--source", "nowhere/at/all"], "nowhere/at/all"),
        (["--adapter", "one", "--adapter", "two", "--what", "weights"], "sources are joined as task vectors"),
    ],
)
def test_what_cannot_be_joined_is_one_line(run, models, words, said_words, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.chdir(models)
    pair = ("--target", "target", "--source-base", "base", "--out", tmp_path / "out")
    code, printed, said = run("merge", *pair, *words)
    assert code == 2 and printed == "" and said_words in said and said.startswith("error: ") and said.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_several_without_their_base_say_so(run, models, monkeypatch):  # noqa: F811
    monkeypatch.chdir(models)
    code, _, said = run("merge", "--target", "target", "--source", "tuned", "--source", "one")
    assert code == 2 and "'source_base' is missing" in said and said.count("\n") == 1


def test_an_adapter_of_another_model_is_named(run, models, tmp_path, monkeypatch):  # noqa: F811
    shutil.copytree(models, tmp_path / "models")
    monkeypatch.chdir(tmp_path / "models")
    save_adapter(save_pico("llama", tmp_path / "deep", layers=5), tmp_path / "models/far", target_modules=["q_proj"])
    code, _, said = run("check", "--target", "target", "--source-base", "base", "--adapter", "one", "--adapter", "far")
    assert code == 2 and "far" in said and "which 'base' has not" in said and said.count("\n") == 1


@pytest.mark.parametrize("role", ["target", "base", "again"])
def test_a_weight_that_is_not_finite_is_one_line_whichever_model_has_it(run, models, tmp_path, monkeypatch, role):  # noqa: F811
    """The base and each of several sources are fused from, and never run: nobody else would find it."""
    for name in ("target", "base", "tuned"):
        shutil.copytree(models / name, tmp_path / name)
    shutil.copytree(models / "tuned", tmp_path / "again")
    path, name = tmp_path / role / "model.safetensors", "model.layers.0.self_attn.q_proj.weight"
    tensors = load_file(path)
    tensors[name][0, :2] = torch.tensor([float("nan"), float("inf")])
    save_file(tensors, path, metadata={"format": "pt"})
    monkeypatch.chdir(tmp_path)
    words = ["--target", "target", "--source-base", "base", "--source", "tuned", "--source", "again"]
    code, printed, said = run("merge", *words, "--dataset", "samples:english", *SMALL, "--out", "out")
    errors = [line for line in said.splitlines() if line.startswith("error: ")]
    assert code == 2 and printed == "" and "Traceback" not in said and len(errors) == 1 == said.count("error: ")
    assert f"'{role}': 2 of the 3,072 values of {name} are not finite" in errors[0] and "download" in errors[0]
    assert not (tmp_path / "out" / "config.json").exists()
