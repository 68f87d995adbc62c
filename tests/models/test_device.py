"""Memory that is really there."""

from __future__ import annotations

import types

import psutil
import pytest
import torch

from tmerge.errors import NotEnoughMemoryError
from tmerge.models import available_memory, multiplies_fast, pick_device
from tmerge.models import device as device_module
from tmerge.models.device import check_memory, memory_errors

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("own", "folder", "names"),
    [
        ("0::/\n", "", ("memory.max", "memory.current")),
        # Version 1, in a group that a scheduler made, within another whose limit it is.
        ("4:memory:/slurm/job_7\n3:cpu:/other\n", "memory/slurm", ("memory.limit_in_bytes", "memory.usage_in_bytes")),
        ("0::/user/scope\n", "user/scope", ("memory.max", "memory.current")),
    ],
)
def test_the_limit_of_a_group_counts_and_cached_files_do_not(own, folder, names, tmp_path, monkeypatch):
    (tmp_path / "own").write_text(own)
    group = tmp_path / "groups" / folder
    group.mkdir(parents=True)
    (group / names[0]).write_text("5000")
    (group / names[1]).write_text("4000")
    (group / "memory.stat").write_text("anon 1500\nactive_file 500\ninactive_file 2000")
    monkeypatch.setattr(device_module, "_CGROUP", tmp_path / "groups")
    monkeypatch.setattr(device_module, "_OWN_GROUPS", tmp_path / "own")
    assert available_memory(CPU) == 5000 - 4000 + 2500
    # Of the groups inside it too.
    (group / "memory.stat").write_text("active_file 0\ninactive_file 0\ntotal_active_file 300\ntotal_inactive_file 200")
    assert available_memory(CPU) == 5000 - 4000 + 500
    (group / names[0]).write_text("max")
    assert available_memory(CPU) == pytest.approx(psutil.virtual_memory().available, rel=0.2)


def test_what_fits_is_let_pass():
    check_memory("a model", 1, CPU)
    with pytest.raises(NotEnoughMemoryError, match="a model needs 1000000 GB on cpu"):
        check_memory("a model", 10**15, CPU)


def test_running_out_is_one_line_with_a_remedy():
    with pytest.raises(NotEnoughMemoryError, match="a model does not fit .* use a smaller model"):
        with memory_errors("a model", CPU):
            raise MemoryError
    with pytest.raises(RuntimeError, match="something else"):
        with memory_errors("a model", CPU):
            raise RuntimeError("something else")


def test_auto_is_an_accelerator_where_there_is_one():
    kind = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    assert pick_device("auto").type == kind
    assert pick_device("cpu") == CPU


def test_the_environment_says_what_auto_is_where_torch_cannot_be_believed(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert pick_device("auto").type == "cuda"
    monkeypatch.setenv(device_module.DEVICE_VARIABLE, "cpu")
    assert pick_device("auto") == CPU and pick_device("cuda").type == "cuda"
    monkeypatch.setenv(device_module.DEVICE_VARIABLE, "auto")
    assert pick_device("auto").type == "cuda"


def processor(monkeypatch, onednn, **flags):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: flags)
    names = ("_is_mkldnn_bf16_supported", "_is_mkldnn_fp16_supported")
    monkeypatch.setattr(torch.ops, "mkldnn", types.SimpleNamespace(**dict.fromkeys(names, lambda: onednn)))


@pytest.mark.parametrize(
    ("flags", "bfloat16", "float16"),
    [
        # oneDNN emulates bfloat16 on every AVX-512 and says that it supports it.
        ({"avx512_f": True, "avx512_bw": True, "avx512_bf16": False, "amx_bf16": False}, False, False),
        ({"avx512_f": True, "avx512_bf16": True}, True, False),
        ({"avx512_f": True, "amx_bf16": True, "avx512_fp16": True}, True, True),
        ({"neon": True, "bf16": False, "fp16_arith": True}, False, True),
        ({"neon": True, "bf16": True, "fp16_arith": False}, True, False),
        ({"avx2": True}, False, False),
    ],
)
def test_a_processors_own_flags_say_what_it_multiplies_fast(monkeypatch, flags, bfloat16, float16):
    processor(monkeypatch, onednn=True, **flags)
    assert multiplies_fast(torch.bfloat16, CPU) is bfloat16
    assert multiplies_fast(torch.float16, CPU) is float16
    assert multiplies_fast(torch.float32, CPU) and multiplies_fast(torch.bfloat16, torch.device("cuda"))


def test_instructions_that_onednn_does_not_use_are_none(monkeypatch):
    processor(monkeypatch, onednn=False, avx512_bf16=True, avx512_fp16=True)
    assert not multiplies_fast(torch.bfloat16, CPU) and not multiplies_fast(torch.float16, CPU)


def test_a_torch_that_does_not_tell_the_flags_counts_as_having_none(monkeypatch):
    monkeypatch.delattr(torch.cpu, "get_capabilities")
    assert not multiplies_fast(torch.bfloat16, CPU)
