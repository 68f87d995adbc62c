"""What is written is read by the last release before 5 as by today's: settings by their older names, and really."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch

from tests.pico import PICO_FAMILIES, PICO_RARE, pico_config, save_pico
from tmerge.models import least_release, load_model, save_checkpoint
from tmerge.models.settings import READ_BY_BOTH

TEXT = "Saya membaca buku. The cat sat on the mat, naïve café."
_RELEASE = ["transformers==4.57.6", "tokenizers==0.22.2", "huggingface_hub==0.36.2"]
_READ = """
import json, sys, torch
from pathlib import Path
from transformers import AutoModelForCausalLM, AutoTokenizer, __version__, logging
logging.set_verbosity_error()
assert __version__.startswith("4.57."), __version__
found = {}
for folder in map(Path, sys.argv[1:]):
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
        expected = torch.load(folder / "expected.pt")
        ids = tokenizer(expected["text"], return_tensors="pt")["input_ids"]
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        with torch.no_grad():
            apart = (model(expected["ids"]).logits - expected["logits"]).abs().max().item()
        same = torch.equal(ids, expected["ids"]) and bool(tokenizer.chat_template) == expected["chat"]
        found[folder.name] = [apart / expected["logits"].abs().max().item(), same]
    except Exception as error:
        found[folder.name] = f"{type(error).__name__}: {error}"[:200]
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def older(tmp_path_factory):
    """Reads folders with the last release before 5."""
    packages = tmp_path_factory.mktemp("older")
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", packages, *_RELEASE]
    installed = subprocess.run(install, capture_output=True, text=True)
    if installed.returncode:
        pytest.skip(f"transformers 4.57 cannot be installed here: {installed.stderr.strip().splitlines()[-1][:200]}")

    def read(folders):
        environment = os.environ | {"PYTHONPATH": str(packages), "HF_HUB_OFFLINE": "1"}
        command = [sys.executable, "-c", _READ, *map(str, folders)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stderr[-2000:]
        return json.loads(done.stdout.splitlines()[-1])

    return read


def _saved(reference, folder, place=True):
    loaded = load_model(str(reference), device="cpu", dtype="float32")
    if not place:
        loaded.place = None
    save_checkpoint(loaded, folder)
    ids = loaded.tokenizer(TEXT, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        logits = loaded.model(ids).logits
    chat = bool(loaded.tokenizer.chat_template)
    torch.save({"text": TEXT, "ids": ids, "logits": logits, "chat": chat}, folder / "expected.pt")
    return loaded


def _types():
    return {family: pico_config(family).model_type for family in PICO_FAMILIES | PICO_RARE}


@pytest.mark.slow
@pytest.mark.parametrize("place", [True, False], ids=["copied", "written"])
def test_all_that_are_said_to_are_read_alike(older, tmp_path, place):
    families = [family for family, kind in _types().items() if kind in READ_BY_BOTH]
    for family in families:
        assert least_release(_saved(save_pico(family, tmp_path / "in" / family, chat=True), tmp_path / family)) is None
    read = older([tmp_path / family for family in families])
    wrong = {name: value for name, value in read.items() if not (value[1] is True and value[0] < 1e-4)}
    assert not wrong and set(read) == set(families)


@pytest.mark.slow
def test_of_others_the_least_release_is_said(tmp_path):
    for family, kind in _types().items():
        if kind not in READ_BY_BOTH:
            loaded = load_model(str(save_pico(family, tmp_path / family)), device="cpu")
            assert least_release(loaded) == "5.0", family


@pytest.mark.slow
@pytest.mark.parametrize("name", ["demo:smollm2-135m-instruct", "demo:gemma-3-270m"])
def test_the_demos_models_unpacked_are_read_alike(older, tmp_path, name):
    loaded = _saved(name, tmp_path / "unpacked")
    assert least_release(loaded) is None
    assert older([tmp_path / "unpacked"]) == {"unpacked": [pytest.approx(0, abs=1e-4), True]}


def test_of_files_of_before_nothing_is_said(tmp_path):
    folder = save_pico("apertus", tmp_path / "in")
    _edit(folder / "config.json", transformers_version="4.56.1")
    assert least_release(load_model(str(folder), device="cpu")) is None


def test_rotary_positions_are_written_under_both_names(tmp_path):
    scaled = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    scaled["original_max_position_embeddings"] = 64
    folder = save_pico("llama", tmp_path / "in", rope_parameters=scaled)
    before = json.loads((folder / "config.json").read_text())
    assert "rope_theta" not in before
    save_checkpoint(load_model(str(folder), device="cpu"), tmp_path / "out")
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written["rope_theta"] == 5e5
    assert written["rope_scaling"] == {key: value for key, value in scaled.items() if key != "rope_theta"}
    assert {key: written[key] for key in before} == before
    assert load_model(str(tmp_path / "out"), device="cpu").model.config.rope_parameters == scaled


def test_both_rotary_tables_are_written_under_both_names(tmp_path):
    loaded = load_model(str(save_pico("gemma3", tmp_path / "in")), device="cpu")
    loaded.place = None  # as of a GGUF file
    save_checkpoint(loaded, tmp_path / "out")
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    kinds = loaded.model.config.rope_parameters
    assert written["rope_theta"] == kinds["full_attention"]["rope_theta"]
    assert written["rope_local_base_freq"] == kinds["sliding_attention"]["rope_theta"]
    assert written["torch_dtype"] == written["dtype"] == "float32"
    assert load_model(str(tmp_path / "out"), device="cpu").model.config.rope_parameters == kinds


def test_a_tokenizer_of_today_is_named_as_before(tmp_path):
    folder = save_pico("llama", tmp_path / "in")
    _edit(folder / "tokenizer_config.json", extra_special_tokens=["<s>", "</s>"])
    assert json.loads((folder / "tokenizer_config.json").read_text())["tokenizer_class"] == "TokenizersBackend"
    loaded = load_model(str(folder), device="cpu")
    save_checkpoint(loaded, tmp_path / "out")
    written = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert written["tokenizer_class"] == "PreTrainedTokenizerFast" and "extra_special_tokens" not in written
    assert written["additional_special_tokens"] == ["<s>", "</s>"]
    again = load_model(str(tmp_path / "out"), device="cpu").tokenizer
    assert again.extra_special_tokens == loaded.tokenizer.extra_special_tokens == ["<s>", "</s>"]


def _edit(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
