"""Weights that are not finite: found when a model is read, named as its file names them."""

from __future__ import annotations

import time
import warnings

import pytest
import torch
from gguf.constants import GGMLQuantizationType
from safetensors.torch import load_file, save_file

from tests.models import pico_gguf
from tests.pico import pico_model, save_pico
from tmerge.errors import CheckpointError, DeviceError
from tmerge.models import Model, ModelReference, load_model
from tmerge.models.finite import check_finite

_UP = "model.layers.1.mlp.up_proj.weight"


def _spoil(folder, values, name=_UP):
    tensors = load_file(folder / "model.safetensors")
    tensors[name].view(-1)[: len(values)] = torch.tensor(values, dtype=tensors[name].dtype)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bad", ["nan", "inf", "-inf"])
def test_what_is_not_finite_in_the_file_is_named(tmp_path, stored, bad):
    folder = save_pico("llama", tmp_path / "pico", dtype=stored)
    _spoil(folder, [float(bad)] * 3)
    with pytest.raises(CheckpointError) as caught:
        load_model(str(folder), device="cpu", widen=True)
    assert str(caught.value) == (
        f"{str(folder)!r}: 3 of the 6,144 values of {_UP} are not finite (NaN or infinity); the weights are damaged: "
        "download or convert the model again"
    )


def test_what_is_read_from_the_file_and_never_loaded_is_held_to_it_too(tmp_path):
    folder = save_pico("llama", tmp_path / "pico")
    _spoil(folder, [float("nan"), float("inf")])
    weights = Model(str(folder), device="cpu").weights
    assert torch.isfinite(weights[_UP.replace("1", "0")]).all()
    for _ in range(2):
        with pytest.raises(CheckpointError) as caught:
            weights[_UP]
        assert f"{str(folder)!r}: 2 of the 6,144 values of {_UP} are not finite" in str(caught.value)
    _spoil(folder, [1e5, 1.0])
    with pytest.raises(DeviceError, match="beyond the range of float16"):
        Model(str(folder), device="cpu", dtype="float16").weights[_UP]


def test_a_stacked_expert_is_named_as_in_the_file(tmp_path):
    folder = save_pico("mixtral", tmp_path / "pico")
    name = next(name for name in load_file(folder / "model.safetensors") if ".experts.2." in name)
    _spoil(folder, [float("nan")], name)
    with pytest.raises(CheckpointError, match=f"1 of the 6,144 values of {name} are not finite"):
        load_model(str(folder), device="cpu")


def test_all_spoilt_tensors_are_counted(tmp_path):
    folder = save_pico("llama", tmp_path / "pico")
    for name in (_UP, "model.norm.weight", "model.layers.0.mlp.up_proj.weight"):
        _spoil(folder, [float("nan")], name)
    with pytest.raises(CheckpointError, match="and so are some of 2 other tensors; the weights"):
        load_model(str(folder), device="cpu")


@pytest.mark.parametrize(
    ("asked", "value", "words"),
    [
        ("float16", 1e5, r"2 of the 6,144 values of .*up_proj.weight are beyond the range of float16 \(up to 65504\); "
         "set dtype: bfloat16 or float32"),
        ("bfloat16", 3.4e38, r"beyond the range of bfloat16 .*; set dtype: float32"),
    ],
)  # fmt: skip
def test_what_the_dtype_cannot_hold_is_not_called_damaged(tmp_path, asked, value, words):
    folder = save_pico("llama", tmp_path / "pico")
    _spoil(folder, [value, -value])
    with pytest.raises(DeviceError, match=words):
        load_model(str(folder), dtype=asked, device="cpu")
    load_model(str(folder), dtype="float32", device="cpu")


def test_what_has_no_place_in_the_model_is_not_to_blame(tmp_path):
    folder = save_pico("gpt2", tmp_path / "pico")
    tensors = load_file(folder / "model.safetensors")
    name = "transformer.h.1.mlp.c_fc.weight"
    tensors[name].view(-1)[0] = 1e5
    tensors["transformer.h.0.attn.bias"] = torch.full((1, 1, 8, 8), float("-inf"))
    tensors["v_head.summary.weight"] = torch.full((1, 64), float("nan"))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(DeviceError, match=f"1 of the .* values of {name} are beyond the range of float16"):
        load_model(str(folder), dtype="float16", device="cpu")
    tensors[name].view(-1)[0] = float("nan")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=f"1 of the .* values of {name} are not finite .*; the weights"):
        load_model(str(folder), dtype="float16", device="cpu")


@pytest.mark.parametrize("kind", [GGMLQuantizationType.F32, GGMLQuantizationType.Q8_0])
def test_gguf(tmp_path, monkeypatch, kind):
    def spoilt(*args, **options):
        model = pico_model(*args, **options)
        model.model.layers[1].mlp.up_proj.weight.data[0, 0] = float("nan")
        return model

    monkeypatch.setattr(pico_gguf, "pico_model", spoilt)
    # Packing NaN is what numpy warns of here.
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        path = pico_gguf.save_pico_gguf(tmp_path / "pico.gguf", kind=kind)
    with pytest.raises(CheckpointError, match=r"values of blk\.1\.ffn_up\.weight are not finite.*damaged") as caught:
        load_model(str(path), device="cpu")
    assert "\n" not in str(caught.value)


def test_gguf_beyond_the_dtype(tmp_path, monkeypatch):
    def large(*args, **options):
        model = pico_model(*args, **options)
        model.model.layers[1].mlp.up_proj.weight.data[0, 0] = 1e6
        return model

    monkeypatch.setattr(pico_gguf, "pico_model", large)
    path = pico_gguf.save_pico_gguf(tmp_path / "pico.gguf", kind=GGMLQuantizationType.F32)
    with pytest.raises(DeviceError, match="1 of the 6,144 values of .* beyond the range of float16"):
        load_model(str(path), dtype="float16", device="cpu")


def test_a_large_model_is_looked_through_quickly_and_its_file_not_opened():
    model = pico_model("llama")
    # 64 million values, a quarter of Gemma 3 270M.
    model.lm_head.weight = torch.nn.Parameter(torch.zeros(100_000, 640, dtype=torch.bfloat16))
    began = time.perf_counter()
    check_finite(ModelReference.parse("user/model"), model.named_parameters(), lambda: pytest.fail("was read"))
    # It takes 0.04 s on one core; a copy to float32 alone takes longer than this allows on a busy machine.
    assert time.perf_counter() - began < 0.5
