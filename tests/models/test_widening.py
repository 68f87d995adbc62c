"""On a CPU that multiplies bfloat16 slowly the weights are held in float32, and stay what they are."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

from tests.pico import save_pico
from tmerge.models import describe, load_model, multiplies_fast
from tmerge.recipe import Recipe
from tmerge.stages.merge import merge


@pytest.fixture
def slow(monkeypatch):
    monkeypatch.setattr("tmerge.models.device.multiplies_fast", lambda dtype, device: dtype == torch.float32)
    monkeypatch.setattr("tmerge.preflight.memory.multiplies_fast", lambda dtype, device: dtype == torch.float32)


def test_the_same_values_in_float32(slow, tmp_path):
    save_pico("llama", tmp_path / "model", dtype=torch.bfloat16)
    wide, narrow = (load_model(str(tmp_path / "model"), device="cpu", widen=widen) for widen in (True, False))
    assert (wide.dtype, wide.model.dtype, narrow.model.dtype) == (torch.bfloat16, torch.float32, torch.bfloat16)
    for (name, mine), theirs in zip(wide.model.named_parameters(), narrow.model.parameters(), strict=True):
        assert torch.equal(mine, theirs.float()), name
    asked = load_model(str(tmp_path / "model"), device="cpu", dtype="bfloat16", widen=True)
    assert asked.model.dtype == torch.bfloat16


def test_what_is_written_is_what_will_be_saved(slow, tmp_path):
    save_pico("llama", tmp_path / "model", dtype=torch.bfloat16)
    loaded = load_model(str(tmp_path / "model"), device="cpu", widen=True)
    view = describe(loaded.model, rounded_to=loaded.dtype).layers[0]["q"]
    value = torch.randn(view.out_features, view.in_features)
    view.write(value)
    assert torch.equal(view.weight(), value.bfloat16().float())


def test_a_merge_is_saved_in_the_targets_own_dtype(slow, tmp_path):
    save_pico("llama", tmp_path / "target", dtype=torch.bfloat16)
    save_pico("qwen2", tmp_path / "source", seed=1, dtype=torch.bfloat16)
    recipe = Recipe(
        target=str(tmp_path / "target"),
        source=str(tmp_path / "source"),
        calibration={"dataset": "samples:english", "texts": 90},
        fusion={"top_k": 16, "alpha": 0.5},
    )
    report = merge(recipe, tmp_path / "fused").to_dict()
    # Writing it compared the checkpoint's logits, in float32 again, with those of the model that was scored: equal.
    assert (report["dtype"], report["computed_in"]) == ("bfloat16", "float32")
    fused, target = (load_file(tmp_path / name / "model.safetensors") for name in ("fused", "target"))
    assert {tensor.dtype for tensor in fused.values()} == {torch.bfloat16}
    changed = {name for name in fused if not torch.equal(fused[name], target[name])}
    assert changed and all("self_attn" in name for name in changed)
    assert json.loads((tmp_path / "fused/config.json").read_text())["dtype"] == "bfloat16"


def test_float32_and_accelerators_are_never_slow():
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert multiplies_fast(dtype, torch.device("cuda"))
    assert multiplies_fast(torch.float32, torch.device("cpu"))
