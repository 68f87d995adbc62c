"""``--adapter`` on the command line: what is said of it, and one line with exit code 2 for what is none."""

import json
import shutil

import pytest

from tests.pico import save_pico
from tests.pico_adapter import save_adapter
from tests.test_cli import run  # noqa: F401 - a fixture


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    save_pico("llama", folder / "small")
    save_pico("phi3", folder / "big", layers=3, seed=1)
    save_adapter(folder / "big", folder / "lora", target_modules=["qkv_proj", "gate_up_proj"])
    (folder / "pickles").mkdir()
    shutil.copy(folder / "lora/adapter_config.json", folder / "pickles")
    (folder / "pickles/adapter_model.bin").write_bytes(b"")
    return folder


@pytest.mark.parametrize("named", ["--source", "--source-base"])
def test_an_adapter_of_fused_projections_is_checked(run, models, named, monkeypatch):  # noqa: F811
    monkeypatch.chdir(models)
    words = ("--target", "small", named, "big", "--adapter", "lora")
    code, printed, said = run("check", *words, "--json")
    assert code == 0, said
    facts = json.loads(printed)
    assert set(facts["projections"]["matched"]) == {"q", "k", "v", "gate", "up"}
    assert facts["source"]["adapter"]["ref"] == "lora" and facts["source"]["adapter"]["rank"] == 4
    assert facts["source_base"]["ref"] == facts["source"]["ref"] == "big"
    code, printed, _ = run("check", *words)
    assert code == 0 and "│ big + lora" in printed


@pytest.mark.parametrize(
    ("adapter", "words"),
    [
        ("pickles", "has its weights as pickles only"),
        ("big", "has no adapter_config.json, so it is no PEFT adapter"),
        ("nowhere/at/all", "is neither a folder or .gguf file here nor a Hub id"),
    ],
)
def test_what_is_no_adapter_is_one_line(run, models, adapter, words, tmp_path, monkeypatch):  # noqa: F811
    named = models / adapter if (models / adapter).is_dir() else adapter
    monkeypatch.chdir(tmp_path)
    pair = ("--target", models / "small", "--source-base", models / "big")
    code, printed, said = run("merge", *pair, "--adapter", named)
    assert code == 2 and printed == "" and words in said and said.startswith("error: ") and said.count("\n") == 1
    assert list(tmp_path.iterdir()) == []
