"""Captured features against plain float64 means, and what may not change them."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from tests.pico import pico_model, pico_tokenizer
from tmerge.calibration import FeatureStore, Room, bare_forward, capture
from tmerge.errors import (
    Cancelled,
    CheckpointError,
    DeviceError,
    NotEnoughMemoryError,
    TokenizerError,
    UnsupportedModelError,
)
from tmerge.models import LoadedModel, ModelReference
from tmerge.models.projections import PROJECTIONS, describe

FAMILIES = ["llama", "llama-bias", "gemma3", "gpt2", "gpt_neox", "phi3", "opt", "falcon-new", "mixtral"]
# Lengths from one character to far past the cut, some alike, not in order.
TEXTS = [
    "The cat sat on the mat while the rain fell softly on the old roof.",
    "a",
    "Saya membaca buku tentang sejarah Indonesia.",
    "naïve café 你好",
    "Kucing itu tidur di atas meja ketika hujan turun di kota. " * 8,
    "b c",
    "What is the capital of France?",
    "Saya membaca buku tentang sejarah Malaysia!!",
    "c",
    "El perro corre por el parque y juega con los niños.",
]
MAX_TOKENS = 48
# The package has a function of the same name.
CAPTURE = importlib.import_module("tmerge.calibration.capture")


def loaded_pico(family: str, *, dtype: torch.dtype = torch.float32, **tokenizer: Any) -> LoadedModel:
    reference = ModelReference("pico", "folder", path=Path("pico"))
    model = pico_model(family).to(dtype)
    return LoadedModel(reference, "sha256:0", model, pico_tokenizer(**tokenizer), None, torch.device("cpu"), dtype)


def run(loaded: LoadedModel, folder: Path, texts: Sequence[str] = TEXTS, **options: Any) -> FeatureStore:
    options = {"max_tokens": MAX_TOKENS, "batch_tokens": 128, "key": "k", "projections": PROJECTIONS, **options}
    capture(loaded, describe(loaded.model), texts, folder=folder, **options)
    return FeatureStore(folder)


def everything(store: FeatureStore) -> dict[tuple[int, str], Tensor]:
    return {(layer, key): store.get(layer, key) for layer in store.layers for key in store.keys(layer)}


def reference_means(loaded: LoadedModel, texts: Sequence[str] = TEXTS) -> dict[tuple[int, str], Tensor]:
    """One text at a time, nothing padded, every tap on its own, float64."""
    rows: dict[tuple[int, str], list[Tensor]] = {}
    handles = []
    for tap in describe(loaded.model).taps(PROJECTIONS):

        def hook(module: Any, inputs: Any, output: Any, tap: Any = tap) -> None:
            feature = tap.read(inputs, output, batch=1)
            rows.setdefault((tap.layer, tap.key), []).append(feature.double().mean(1)[0])

        handles.append(tap.module.register_forward_hook(hook))
    with torch.no_grad():
        for text in texts:
            ids = loaded.tokenizer(text)["input_ids"][:MAX_TOKENS]
            loaded.model(input_ids=torch.tensor([ids]), use_cache=False)
    for handle in handles:
        handle.remove()
    return {place: torch.stack(means) for place, means in rows.items()}


@pytest.mark.parametrize("family", FAMILIES)
def test_features_are_the_means_over_real_tokens(family: str, tmp_path: Path) -> None:
    loaded = loaded_pico(family)
    found, expected = everything(run(loaded, tmp_path / "s")), reference_means(loaded)
    assert found.keys() == expected.keys()
    for place, features in found.items():
        assert features.dtype == torch.float32
        # float32 forward passes of other batch shapes differ in their last bits, and layers carry that on.
        assert_close(features.double(), expected[place], rtol=1e-4, atol=2e-5, msg=lambda m, p=place: f"{p}: {m}")


def test_shared_features_are_kept_once(tmp_path: Path) -> None:
    store = run(loaded_pico("llama"), tmp_path / "s")
    posts = {f"{name}.post" for name in PROJECTIONS}
    assert set(store.keys(0)) == {"qkv.pre", "o.pre", "mlp.pre", "down.pre"} | posts
    assert store.layers == (0, 1)
    assert set(run(loaded_pico("llama"), tmp_path / "s", projections=("k", "v")).keys(1)) == {
        "qkv.pre",
        "k.post",
        "v.post",
    }


def test_bfloat16_activations_are_summed_in_float32(tmp_path: Path) -> None:
    loaded = loaded_pico("llama", dtype=torch.bfloat16)
    # One text a batch, so that both compute the very same bfloat16 activations.
    found, expected = everything(run(loaded, tmp_path / "s", batch_tokens=1)), reference_means(loaded)
    for place, features in found.items():
        # 48 tokens: a float32 sum is good to about 1e-6 of the largest term; a bfloat16 one would be to 1e-2.
        assert_close(features.double(), expected[place], rtol=1e-6, atol=5e-6)


def test_the_masked_mean_equals_the_mean_by_runs() -> None:
    class Writer:
        def write(self, *_: Any) -> None: ...

    lengths = [3, 3, 5, 9]
    pool = CAPTURE._Pool(loaded_pico("llama"), [], lengths, Writer())
    pool.begin([0, 1, 2, 3])
    features = torch.randn(4, 9, 7, generator=torch.Generator().manual_seed(0))
    for row, length in enumerate(lengths):
        features[row, length:] = torch.nan  # padding may hold anything
    for dtype in (torch.float32, torch.bfloat16):
        given = features.to(dtype)
        expected = torch.stack([row[:length].double().mean(0) for row, length in zip(given, lengths, strict=True)])
        # Means of at most 9 values near 1.
        assert_close(pool._mean(given).double(), expected, rtol=1e-6, atol=1e-6)
        assert_close(pool._masked_mean(given).double(), expected, rtol=1e-6, atol=1e-6)
        flat = given.flatten(0, 1)
        assert_close(pool._mean(flat).double(), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
def test_padding_batches_and_order_change_nothing(family: str, tmp_path: Path) -> None:
    loaded = loaded_pico(family)
    usual = everything(run(loaded, tmp_path / "a"))
    loaded.tokenizer.padding_side = "left"
    left = everything(run(loaded, tmp_path / "b"))
    order = [7, 2, 9, 0, 4, 1, 8, 3, 6, 5]
    shuffled = everything(run(loaded, tmp_path / "c", [TEXTS[place] for place in order]))
    small = everything(run(loaded, tmp_path / "d", batch_tokens=64))
    large = everything(run(loaded, tmp_path / "e", batch_tokens=100_000))
    for place, features in usual.items():
        assert torch.equal(left[place], features)
        # Other batch shapes, other last bits; as above.
        for other in (small[place], large[place]):
            assert_close(other, features, rtol=1e-4, atol=2e-5)
        assert_close(shuffled[place], features[order], rtol=1e-4, atol=2e-5)


def test_padding_needs_no_padding_token(tmp_path: Path) -> None:
    with_pad = everything(run(loaded_pico("llama"), tmp_path / "a"))
    without = everything(run(loaded_pico("llama", pad=False), tmp_path / "b"))
    assert all(torch.equal(without[place], features) for place, features in with_pad.items())


def test_two_runs_give_the_same_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        run(loaded_pico("llama"), tmp_path / name)
    files = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert len(files) == 1 + 2 * 11 and files[-1] == "store.json"
    assert all((tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes() for name in files)


def test_waiting_rows_are_flushed_within_a_forward_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = everything(run(loaded_pico("llama"), tmp_path / "a"))
    monkeypatch.setattr(CAPTURE, "_PENDING_BYTES", 1)
    pieces = everything(run(loaded_pico("llama"), tmp_path / "b"))
    assert all(torch.equal(pieces[place], features) for place, features in whole.items())


def test_the_report_counts_tokens_and_cuts(tmp_path: Path) -> None:
    loaded = loaded_pico("llama", bos=True)
    architecture = describe(loaded.model)
    report = capture(
        loaded, architecture, TEXTS, ["q"], tmp_path / "s", max_tokens=MAX_TOKENS, batch_tokens=128, key="k"
    )
    lengths = [len(loaded.tokenizer(text)["input_ids"]) for text in TEXTS]
    assert min(lengths) == 2  # the tokenizer's own BOS counts as a token
    assert report.texts == len(TEXTS)
    assert report.tokens == sum(min(length, MAX_TOKENS) for length in lengths)
    assert report.truncated == sum(length > MAX_TOKENS for length in lengths) == 1
    assert report.padded_tokens >= report.tokens
    assert 0 < report.forward_seconds <= report.seconds
    # What calibration asks of the tokenizer is not saved with it.
    assert loaded.tokenizer.backend_tokenizer.truncation is None
    assert loaded.tokenizer.backend_tokenizer.padding is None


def test_texts_are_cut_where_the_model_ends(tmp_path: Path) -> None:
    loaded = loaded_pico("gpt2")
    texts = [*TEXTS, "The rain fell softly. " * 100]
    report = capture(
        loaded, describe(loaded.model), texts, ["q"], tmp_path / "s", max_tokens=10_000, batch_tokens=128, key="k"
    )
    assert report.limit == loaded.model.config.max_position_embeddings == 256
    assert report.truncated == 1


def test_a_text_without_tokens_gets_the_mean_of_the_others(tmp_path: Path) -> None:
    texts = [*TEXTS[:4], "", *TEXTS[4:]]
    loaded = loaded_pico("llama")
    report = capture(
        loaded, describe(loaded.model), texts, ["q"], tmp_path / "s", max_tokens=48, batch_tokens=128, key="k"
    )
    assert report.without_tokens == 1
    features = FeatureStore(tmp_path / "s").get(1, "q.post")
    others = torch.cat([features[:4], features[5:]])
    assert_close(features[4], others.mean(0))
    with pytest.raises(TokenizerError, match="no token for any text"):
        run(loaded, tmp_path / "t", ["", ""])


def test_only_the_base_runs_and_nothing_is_left_behind(tmp_path: Path) -> None:
    loaded = loaded_pico("llama")
    asked: list[dict[str, Any]] = []
    loaded.base.register_forward_pre_hook(lambda module, args, kwargs: asked.append(kwargs), with_kwargs=True)
    loaded.model.lm_head.register_forward_hook(lambda *_: pytest.fail("the head was run"))
    loaded.model.train()
    with torch.inference_mode():
        before = loaded.model.model(torch.tensor([[5, 6, 7]])).last_hidden_state
    asked.clear()
    run(loaded, tmp_path / "s")
    assert asked and all(kwargs["use_cache"] is False for kwargs in asked)
    assert loaded.model.training
    modules = [module for module in loaded.model.modules() if module not in (loaded.base, loaded.model.lm_head)]
    assert not any(module._forward_hooks for module in modules)
    with torch.inference_mode():
        assert torch.equal(loaded.model.model(torch.tensor([[5, 6, 7]])).last_hidden_state, before)


def test_hooks_do_not_change_what_the_model_computes(tmp_path: Path) -> None:
    loaded = loaded_pico("llama")
    ends: list[list[Tensor]] = []
    loaded.base.register_forward_hook(lambda module, args, output: ends[-1].append(output.last_hidden_state))
    ends.append([])
    bare_forward(loaded, TEXTS, max_tokens=MAX_TOKENS, batch_tokens=128)
    ends.append([])
    run(loaded, tmp_path / "s")
    assert len(ends[0]) == len(ends[1]) > 1
    assert all(torch.equal(bare, hooked) for bare, hooked in zip(*ends, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_feature_that_is_not_finite_is_named(dtype: torch.dtype, tmp_path: Path) -> None:
    loaded = loaded_pico("llama", dtype=dtype)
    with torch.no_grad():
        loaded.model.model.layers[1].mlp.up_proj.weight[3, 5] = torch.inf
    error = CheckpointError if dtype == torch.float32 else DeviceError
    remedy = "damaged" if dtype == torch.float32 else "in bfloat16; set dtype: float32"
    with pytest.raises(error, match=rf"^pico: up\.post of layer 1 is not finite for text \d+.*{remedy}.*$"):
        run(loaded, tmp_path / "s")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "error",
    [
        torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB"),
        RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory: you tried"),
        RuntimeError("MPS backend out of memory (MPS allocated: 8.00 GB)"),
    ],
)
def test_running_out_of_memory_names_the_batch(
    error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(**_: Any) -> None:
        raise error

    loaded = loaded_pico("llama")
    monkeypatch.setattr(loaded.base, "forward", full)
    with pytest.raises(NotEnoughMemoryError, match=r"lower calibration\.batch_tokens \(now 128\)"):
        run(loaded, tmp_path / "s")
    assert not list(tmp_path.iterdir())


def test_a_batch_that_does_not_fit_is_read_by_halves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded, notes, sizes = loaded_pico("llama"), list[str](), list[int]()
    forward = loaded.base.forward

    def small(input_ids: Tensor, **named: Any) -> Any:
        sizes.append(len(input_ids))
        result = forward(input_ids=input_ids, **named)
        if len(input_ids) > 1:  # what was read of it by then counts for nothing
            raise torch.OutOfMemoryError
        return result

    wanted = everything(run(loaded, tmp_path / "whole", batch_tokens=10))
    monkeypatch.setattr(loaded.base, "forward", small)
    found = everything(run(loaded, tmp_path / "halves", batch_tokens=1024, note=notes.append))
    assert max(sizes) > 1 and sizes.count(1) == len(TEXTS)
    assert len(notes) == 1 and notes[0].endswith("texts: read by halves")
    # What did not fit once is not tried again, by another reading that is told of it neither.
    tried, room = [size for size in sizes if size > 1], Room()
    sizes.clear()
    for name in ("once", "twice"):
        run(loaded, tmp_path / name, batch_tokens=1024, room=room)
    assert [size for size in sizes if size > 1] == tried and sizes.count(1) == 2 * len(TEXTS)
    assert room.tokens is not None
    for feature, rows in wanted.items():
        torch.testing.assert_close(found[feature], rows)


def test_another_fault_of_a_model_is_not_hidden(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(**_: Any) -> None:
        raise RuntimeError("shapes do not match")

    loaded = loaded_pico("llama")
    monkeypatch.setattr(loaded.base, "forward", broken)
    with pytest.raises(RuntimeError, match="shapes do not match"):
        run(loaded, tmp_path / "s")


def test_a_stopped_capture_leaves_nothing(tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []

    def progress(done: int, total: int) -> None:
        seen.append((done, total))

    with pytest.raises(Cancelled):
        run(loaded_pico("llama"), tmp_path / "s", progress=progress, cancelled=lambda: len(seen) == 2)
    assert len(seen) == 2 and not list(tmp_path.iterdir())
    seen.clear()
    run(loaded_pico("llama"), tmp_path / "s", progress=progress, cancelled=lambda: False)
    assert seen[-1] == (len(TEXTS), len(TEXTS)) and seen == sorted(set(seen))


def test_a_layer_that_runs_twice_or_never_is_refused(tmp_path: Path) -> None:
    loaded = loaded_pico("llama")
    architecture = describe(loaded.model)
    options: dict[str, Any] = {"max_tokens": 48, "batch_tokens": 128, "key": "k"}
    layers = loaded.model.model.layers
    layers[1] = layers[0]
    with pytest.raises(UnsupportedModelError, match=r"of layer 0 ran twice"):
        capture(loaded, architecture, TEXTS, PROJECTIONS, tmp_path / "s", **options)
    loaded.model.model.layers = layers[:1]
    with pytest.raises(UnsupportedModelError, match=r"qkv\.pre of layer 1 did not run"):
        capture(loaded, architecture, TEXTS, PROJECTIONS, tmp_path / "s", **options)


def test_the_store_says_what_was_captured(tmp_path: Path) -> None:
    store = run(loaded_pico("llama"), tmp_path / "s", key="these settings")
    assert store.key == "these settings" and store.texts == len(TEXTS)
    assert store.facts["commit"] == "sha256:0" and store.facts["dtype"] == "float32"
    assert FeatureStore.is_finished(tmp_path / "s", "these settings")
    assert not FeatureStore.is_finished(tmp_path / "s", "other settings")
    # Both models are given the texts by their own tokenizers, and the digest is of the texts.
    other = run(loaded_pico("gpt2", bos=True), tmp_path / "t")
    assert other.facts["texts_sha256"] == store.facts["texts_sha256"]
    assert run(loaded_pico("llama"), tmp_path / "u", TEXTS[::-1]).facts["texts_sha256"] != store.facts["texts_sha256"]
