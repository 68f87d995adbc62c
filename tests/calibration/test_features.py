"""The feature store: what is written, in which order, and what is not a store."""

from __future__ import annotations

import io
import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tmerge.calibration import FeatureStore, FeatureWriter
from tmerge.errors import NotEnoughDiskError, RunNotFoundError

WIDTHS = {(0, "q.post"): 3, (0, "qkv.pre"): 5, (2, "q.post"): 4}


def filled(folder: Path, texts: int = 6, key: str = "k") -> dict[tuple[int, str], torch.Tensor]:
    values = {place: torch.randn(texts, width) for place, width in WIDTHS.items()}
    with FeatureWriter(folder, texts, WIDTHS, key=key, facts={"commit": "c"}) as writer:
        for batch in ([4, 0], [5, 3, 2], [1]):
            writer.write(batch, {place: rows[batch] for place, rows in values.items()})
        writer.finish()
    return values


def test_rows_are_in_the_texts_order(tmp_path: Path) -> None:
    values = filled(tmp_path / "s")
    store = FeatureStore(tmp_path / "s")
    assert (store.texts, store.key, store.facts) == (6, "k", {"commit": "c"})
    assert store.layers == (0, 2)
    assert store.keys(0) == ("q.post", "qkv.pre") and store.keys(1) == ()
    for (layer, key), rows in values.items():
        assert torch.equal(store.get(layer, key), rows)
    with pytest.raises(KeyError, match="there are q.post"):
        store.get(2, "k.post")


def test_numpy_reads_the_files(tmp_path: Path) -> None:
    values = filled(tmp_path / "s")
    assert [path.name for path in sorted((tmp_path / "s").glob("layer-0000.*"))] == [
        "layer-0000.q.post.npy",
        "layer-0000.qkv.pre.npy",
    ]
    stored = np.load(tmp_path / "s" / "layer-0000.qkv.pre.npy")
    assert stored.dtype == np.float32 and np.array_equal(stored, values[0, "qkv.pre"].numpy())


def test_what_is_changed_in_memory_stays_there(tmp_path: Path) -> None:
    values = filled(tmp_path / "s")
    FeatureStore(tmp_path / "s").get(2, "q.post").zero_()
    assert torch.equal(FeatureStore(tmp_path / "s").get(2, "q.post"), values[2, "q.post"])


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.permutations(range(7)), st.integers(1, 7), st.integers(1, 9))
def test_any_order_of_writing_gives_the_same_bytes(tmp_path: Path, order: list[int], step: int, width: int) -> None:
    values = torch.arange(7 * width, dtype=torch.float32).reshape(7, width)
    with FeatureWriter(tmp_path / "s", 7, {(0, "a"): width}, key="") as writer:
        for start in range(0, 7, step):
            batch = order[start : start + step]
            writer.write(batch, {(0, "a"): values[batch]})
        writer.finish()
    assert torch.equal(FeatureStore(tmp_path / "s").get(0, "a"), values)


# Elsewhere a process is not told what it holds for itself apart from the files that it has mapped.
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="resident memory is told apart on Linux only")
def test_neither_writing_nor_opening_holds_the_features_in_memory(tmp_path: Path) -> None:
    texts, width, layers = 500, 4000, 12  # 96 MB
    process = psutil.Process()
    rows = torch.ones(50, width)
    before = peak = process.memory_info().rss
    with FeatureWriter(tmp_path / "s", texts, {(layer, "a"): width for layer in range(layers)}, key="") as writer:
        for start in range(0, texts, 50):
            for layer in range(layers):
                writer.write(range(start, start + 50), {(layer, "a"): rows})
            peak = max(peak, process.memory_info().rss)
        writer.finish()
    store = FeatureStore(tmp_path / "s")
    held = [store.get(layer, "a") for layer in range(layers)]
    assert held[-1][-1, -1] == 1
    assert max(peak, process.memory_info().rss) - before < 24e6


def test_what_is_not_finished_is_no_store(tmp_path: Path) -> None:
    with FeatureWriter(tmp_path / "s", 6, WIDTHS, key="k"):
        pass
    assert not list(tmp_path.iterdir())
    with pytest.raises(RunNotFoundError, match="run the merge again"):
        FeatureStore(tmp_path / "s")
    # What a killed process leaves is replaced.
    killed = FeatureWriter(tmp_path / "s", 6, WIDTHS, key="k")
    assert (tmp_path / "s.partial").exists() and not FeatureStore.is_finished(tmp_path / "s", "k")
    del killed
    filled(tmp_path / "s")
    assert [path.name for path in tmp_path.iterdir()] == ["s"]


def test_a_new_store_replaces_the_old_one_and_nothing_else(tmp_path: Path) -> None:
    filled(tmp_path / "s", key="old")
    values = filled(tmp_path / "s", key="new")
    assert FeatureStore.is_finished(tmp_path / "s", "new") and not FeatureStore.is_finished(tmp_path / "s", "old")
    assert torch.equal(FeatureStore(tmp_path / "s").get(2, "q.post"), values[2, "q.post"])
    (tmp_path / "s" / "thesis.txt").write_text("dear")
    with pytest.raises(ValueError, match=r"thesis\.txt"):
        filled(tmp_path / "s")
    assert (tmp_path / "s" / "thesis.txt").read_text() == "dear"


def test_texts_without_features_get_the_mean(tmp_path: Path) -> None:
    with FeatureWriter(tmp_path / "s", 3, {(0, "a"): 2}, key="") as writer:
        writer.write([0, 2], {(0, "a"): torch.tensor([[1.0, 2.0], [3.0, 6.0]])})
        writer.fill_with_mean([1])
        writer.finish()
    assert FeatureStore(tmp_path / "s").get(0, "a").tolist() == [[1, 2], [2, 4], [3, 6]]


@pytest.mark.parametrize(
    "note", ["", "{", "[]", "{}", json.dumps({"key": "k", "texts": "many", "layers": {}, "facts": {}})]
)
def test_a_damaged_note_is_no_store(tmp_path: Path, note: str) -> None:
    filled(tmp_path / "s")
    (tmp_path / "s" / "store.json").write_text(note)
    with pytest.raises(RunNotFoundError, match="'s' holds no captured features"):
        FeatureStore(tmp_path / "s")


def test_a_damaged_feature_is_named(tmp_path: Path) -> None:
    filled(tmp_path / "s")
    path = tmp_path / "s" / "layer-0002.q.post.npy"
    os.truncate(path, path.stat().st_size - 4)
    with pytest.raises(RunNotFoundError, match=r"layer-0002\.q\.post\.npy are damaged"):
        FeatureStore(tmp_path / "s").get(2, "q.post")


def test_a_full_disk_is_an_error_before_anything_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(100, 90, 10))
        with pytest.raises(NotEnoughDiskError, match=r"of 6 texts need .* lower calibration\.texts"):
            filled(tmp_path / "s")


def test_a_disk_that_fills_up_later_is_an_error_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Full(io.FileIO):
        def write(self, data: Any) -> int:
            # What a full disk does: first less than all is written, then nothing and an error.
            return super().write(bytes(data)[:8])

    monkeypatch.setattr(
        Path, "open", lambda path, mode, buffering=-1: Full(path, mode) if buffering == 0 else open(path, mode)
    )
    with pytest.raises(NotEnoughDiskError, match=r"lower calibration\.texts"):
        filled(tmp_path / "s")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_what_has_16_bits_is_stored_in_them(tmp_path, dtype):
    rows = torch.randn(5, 7, generator=torch.Generator().manual_seed(0)).to(dtype).float()
    rows[0, 0] = 1e4
    rows = rows.to(dtype).float()
    widths, features = {(0, "a"): 7, (0, "b"): 7}, {(0, "a"): rows, (0, "b"): rows}
    with FeatureWriter(tmp_path / "s", 5, widths, key="", dtypes={(0, "a"): dtype}) as writer:
        writer.write([3, 4, 1], {name: values[[3, 4, 1]] for name, values in features.items()})
        writer.write([0, 2], {name: values[[0, 2]] for name, values in features.items()})
        writer.finish()
    store = FeatureStore(tmp_path / "s")
    for key in ("a", "b"):
        assert store.get(0, key).dtype == torch.float32 and store.get(0, key).equal(rows)
    sizes = [(tmp_path / "s" / f"layer-0000.{key}.npy").stat().st_size - 128 for key in ("a", "b")]
    assert sizes == [2 * 35, 4 * 35]


def test_what_16_bits_do_not_hold_is_not_rounded_in_silence(tmp_path):
    with FeatureWriter(tmp_path / "s", 1, {(0, "a"): 1}, key="", dtypes={(0, "a"): torch.float16}) as writer:
        for value in (1.0001, 7e4):
            with pytest.raises(ValueError, match="float16 does not hold"):
                writer.write([0], {(0, "a"): torch.tensor([[value]])})
