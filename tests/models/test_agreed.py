"""What several processes agree on where each of their machines would have it otherwise; threads are the processes."""

import os
import threading
from types import SimpleNamespace

import pytest
import torch

from tests.meeting import Together
from tests.pico import save_pico
from tmerge.errors import DeviceError
from tmerge.models import Model, agreed, device, multiplies_fast
from tmerge.models import model as handles
from tmerge.models.agreed import computing_alike, least_share
from tmerge.models.device import SLOW_VARIABLE
from tmerge.processes import ALONE
from tmerge.stages.scoring import opened
from tmerge.stages.step import Progress

CPU = torch.device("cpu")
here = threading.local()


def by_rank(values):
    """A function that gives each process its own."""
    return lambda *_: values[here.rank]


def together(work, count=2):
    """What each process has from `work`."""

    def remembered(processes):
        here.rank = processes.rank
        return work(processes)

    return Together(count).run(remembered)


def test_all_have_the_share_of_the_one_with_the_least(monkeypatch):
    monkeypatch.setattr(agreed, "available_memory", by_rank([900, 600, 800]))
    assert together(lambda processes: least_share(CPU, processes), 3) == [600] * 3
    assert least_share(CPU, ALONE) is None
    # Three on one machine: what is free is for all of them.
    monkeypatch.setenv("WORLD_SIZE", "3")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    assert together(lambda processes: least_share(CPU, processes), 3) == [200] * 3
    # A card each, and where there are fewer two on one.
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert together(lambda processes: least_share(torch.device("cuda"), processes), 3) == [300] * 3


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Of a model, of which nothing is loaded: transformers loads none in two threads at once."""
    by_blocks = SimpleNamespace(close=lambda: None)
    monkeypatch.setattr(handles, "load_model", lambda *_, **__: SimpleNamespace(block_weights=None))
    monkeypatch.setattr(handles, "open_by_blocks", lambda *_, **__: SimpleNamespace(block_weights=by_blocks))
    return save_pico("llama", tmp_path / "source")


def test_where_one_has_no_room_all_read_by_blocks(folder, monkeypatch):
    enough = 10 * Model(str(folder), device="cpu").held_bytes

    def is_by_blocks(processes):
        # Of what the machine itself has free there is enough in either.
        model = Model(str(folder), device="cpu")
        return opened(model, Progress("source", lambda step: None, processes)).block_weights is not None

    monkeypatch.setattr(agreed, "available_memory", by_rank([enough, enough]))
    assert together(is_by_blocks) == [False, False]
    for short in (0, 1):
        free = [enough, enough]
        free[short] //= 10
        monkeypatch.setattr(agreed, "available_memory", by_rank(free))
        assert together(is_by_blocks) == [True, True]


def test_one_that_is_open_already_in_one_of_them_is_waited_for(folder):
    def twice(processes):
        model = Model(str(folder), device="cpu")
        if not processes.rank:
            model.open()
        return opened(model, Progress("source", lambda step: None, processes)) is model.open()

    assert together(twice) == [True, True]


def test_a_dtype_that_one_is_slow_in_is_slow_in_all(monkeypatch):
    monkeypatch.delenv(SLOW_VARIABLE, raising=False)
    flags = {"avx512_bf16": True, "avx512_fp16": True}
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: flags, raising=False)
    for name in ("_is_mkldnn_bf16_supported", "_is_mkldnn_fp16_supported"):
        monkeypatch.setattr(torch.ops.mkldnn, name, lambda: True, raising=False)
    assert multiplies_fast(torch.bfloat16, CPU) and multiplies_fast(torch.float16, CPU)
    slow = [set(), {torch.bfloat16}]
    monkeypatch.setattr(agreed, "multiplies_fast", lambda dtype, there: dtype not in slow[here.rank])

    def held(processes):
        with computing_alike("cpu", processes):
            found = [device.held_dtype("auto", dtype, CPU) for dtype in (torch.bfloat16, torch.float16)]
            processes.wait()
        return found

    assert together(held) == [[torch.float32, torch.float16]] * 2
    assert SLOW_VARIABLE not in os.environ
    # What was asked for is had, however slowly.
    monkeypatch.setenv(SLOW_VARIABLE, "bfloat16")
    assert device.held_dtype("bfloat16", torch.bfloat16, CPU) == torch.bfloat16
    with computing_alike("cpu", ALONE):
        assert os.environ[SLOW_VARIABLE] == "bfloat16"


def test_devices_of_several_kinds_are_refused(monkeypatch):
    monkeypatch.setattr(agreed, "pick_device", by_rank([torch.device("cuda"), CPU]))

    def refused(processes):
        with pytest.raises(DeviceError, match="'auto' is cuda in process 0 and cpu in process 1 of 2; set device: cpu"):
            computing_alike("auto", processes).__enter__()

    together(refused)
