"""A model whose blocks are read from its files at their turn gives what it gives when all of it is in memory."""

import os

import pytest
import torch
from gguf.constants import GGMLQuantizationType
from safetensors.torch import load_file, save_file

from tests.models.pico_gguf import save_pico_gguf
from tests.pico import PICO_FAMILIES, PICO_RARE, pico_model, pico_tokenizer, save_pico
from tmerge.calibration import FeatureStore, capture
from tmerge.errors import CheckpointError
from tmerge.evaluation import score_texts
from tmerge.models import describe, device, find_block_list, load_model
from tmerge.models.blocks import base_pass, stepped
from tmerge.models.gguf import read_header
from tmerge.models.loading import open_by_blocks

TEXTS = ["the cat sat on the mat", "a dog", "hello there, all of you who read", "one two three", "mat cat", "x"]


def features(loaded, folder):
    architecture = describe(loaded.model, rounded_to=loaded.dtype)
    names = architecture.names
    capture(loaded, architecture, TEXTS, names, folder, max_tokens=24, batch_tokens=32, key="k")
    store = FeatureStore(folder)
    return {
        (layer, key): store.get(layer, key) for layer, key in {(tap.layer, tap.key) for tap in architecture.taps(names)}
    }


def in_memory(loaded):
    """Blocks that have weights now."""
    _, blocks = find_block_list(loaded.model)
    return [
        number
        for number, block in enumerate(blocks)
        if any(parameter.device.type != "meta" for parameter in block.parameters())
    ]


def families(names, quick=()):
    return pytest.mark.parametrize(
        "family", [pytest.param(name, marks=[] if name in quick else [pytest.mark.slow]) for name in sorted(names)]
    )


# Tied; two rotary tables, sliding windows and a scaled embedding; learned positions; experts, which are stacked.
@families(PICO_FAMILIES, {"llama-tied", "gemma3", "gpt2", "mixtral"})
def test_features_and_scores_are_the_same_to_the_bit(family, tmp_path):
    save_pico(family, tmp_path / "m", layers=3)
    whole = load_model(str(tmp_path / "m"), widen=True)
    by_blocks = open_by_blocks(str(tmp_path / "m"), widen=True)
    assert by_blocks is not None and by_blocks.block_weights is not None
    assert in_memory(by_blocks) == []
    expected, found = features(whole, tmp_path / "whole"), features(by_blocks, tmp_path / "blocks")
    assert expected.keys() == found.keys()
    for feature, values in expected.items():
        assert torch.equal(found[feature], values), feature
    wanted, scores = (score_texts(loaded, TEXTS, batch_tokens=32) for loaded in (whole, by_blocks))
    assert torch.equal(scores.bits, wanted.bits)
    assert (scores.tokens, by_blocks.dtype, by_blocks.commit) == (wanted.tokens, whole.dtype, whole.commit)
    assert in_memory(by_blocks) == []


@families(PICO_RARE)
def test_rare_ones_are_the_same(family, tmp_path):
    save_pico(family, tmp_path / "m")
    whole = load_model(str(tmp_path / "m"))
    by_blocks = open_by_blocks(str(tmp_path / "m"))
    assert by_blocks is not None
    wanted = score_texts(whole, TEXTS, batch_tokens=32, finite=False)
    scores = score_texts(by_blocks, TEXTS, batch_tokens=32, finite=False)
    torch.testing.assert_close(scores.bits, wanted.bits, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", ["Q8_0", "F16"])
def test_a_gguf_file_is_unpacked_a_block_at_a_time(kind, tied, tmp_path):
    path = save_pico_gguf(tmp_path / "m.gguf", kind=GGMLQuantizationType[kind], tied=tied)
    whole, by_blocks = load_model(str(path), widen=True), open_by_blocks(str(path), widen=True)
    assert by_blocks is not None
    expected, found = features(whole, tmp_path / "whole"), features(by_blocks, tmp_path / "blocks")
    for feature, values in expected.items():
        assert torch.equal(found[feature], values), feature
    wanted, scores = (score_texts(loaded, TEXTS, batch_tokens=32) for loaded in (whole, by_blocks))
    assert torch.equal(scores.bits, wanted.bits)
    assert (by_blocks.dtype, by_blocks.commit, in_memory(by_blocks)) == (whole.dtype, whole.commit, [])


def test_two_blocks_at_most_are_in_memory(tmp_path):
    save_pico("llama", tmp_path / "m", layers=6)
    loaded = open_by_blocks(str(tmp_path / "m"))
    works = [base_pass(loaded, (torch.tensor([[5, 9, 40]]), None)), base_pass(loaded, (torch.tensor([[7]]), None))]
    with stepped(loaded, works) as steps, torch.no_grad():
        embedding = loaded.model.get_input_embeddings().weight
        assert embedding.device.type == "meta"  # all passes are past it
        for block in range(len(steps)):
            for number, call in enumerate(steps.calls(block)):
                result = call.run()
                there = in_memory(loaded)
                assert block in there and set(there) <= {block, block + 1}
                steps.go_on(number, result)
    assert in_memory(loaded) == []


def test_values_are_held_in_float32_where_the_processor_is_slow_in_theirs(tmp_path, monkeypatch):
    pico_model("llama").bfloat16().save_pretrained(tmp_path / "m")
    pico_tokenizer().save_pretrained(tmp_path / "m")
    monkeypatch.setattr(device, "multiplies_fast", lambda dtype, there: dtype == torch.float32)
    whole, by_blocks = (read(str(tmp_path / "m"), widen=True) for read in (load_model, open_by_blocks))
    assert by_blocks.dtype == whole.dtype == torch.bfloat16
    wanted, scores = (score_texts(loaded, TEXTS, batch_tokens=32) for loaded in (whole, by_blocks))
    assert torch.equal(scores.bits, wanted.bits)
    seen = []
    with stepped(by_blocks, [base_pass(by_blocks, (torch.tensor([[5, 9]]), None))]) as steps:
        steps.calls(0)
        seen += [parameter.dtype for parameter in find_block_list(by_blocks.model)[1][0].parameters()]
    assert set(seen) == {torch.float32}


def test_what_is_wrong_with_a_block_is_said_when_it_is_read(tmp_path):
    folder = save_pico("llama", tmp_path / "m", layers=3)
    path = folder / "model.safetensors"
    tensors = load_file(path)
    tensors["model.layers.1.mlp.up_proj.weight"][3, 2] = float("nan")
    save_file(tensors, path, {"format": "pt"})
    loaded = open_by_blocks(str(folder))
    with pytest.raises(CheckpointError, match=r"1 of the .* of model.layers.1.mlp.up_proj.weight are not finite"):
        score_texts(loaded, TEXTS)
    assert in_memory(loaded) == []


def test_files_that_change_while_they_are_read_are_refused(tmp_path):
    folder = save_pico("llama", tmp_path / "m", layers=3)
    loaded = open_by_blocks(str(folder))
    tensors = load_file(folder / "model.safetensors")
    save_file(tensors, folder / "new.safetensors", {"format": "pt"})
    os.replace(folder / "new.safetensors", folder / "model.safetensors")
    with pytest.raises(CheckpointError, match="changed while it was read"):
        score_texts(loaded, TEXTS)


def test_a_packed_file_that_changes_is_refused_too(tmp_path):
    path = save_pico_gguf(tmp_path / "m.gguf")
    loaded = open_by_blocks(str(path))
    os.replace(save_pico_gguf(tmp_path / "other.gguf", seed=1), path)
    with pytest.raises(CheckpointError, match="changed while it was read"):
        score_texts(loaded, TEXTS)


def test_a_packed_block_that_is_beyond_the_model_is_passed_over(tmp_path):
    path = save_pico_gguf(tmp_path / "m.gguf", beyond=True)
    assert "blk.2.attn_norm.weight" in {tensor.name for tensor in read_header(path).tensors}
    wanted, scores = (score_texts(read(str(path)), TEXTS) for read in (load_model, open_by_blocks))
    assert torch.equal(scores.bits, wanted.bits)


def test_a_weight_that_is_missing_is_refused_at_once(tmp_path):
    folder = save_pico("llama", tmp_path / "m")
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match="up_proj"):
        open_by_blocks(str(folder))
