"""A model whose blocks are read from its files at their turn gives what it gives when all of it is in memory."""

import pytest
import torch

from tests.pico import PICO_FAMILIES, save_pico
from tmerge.calibration import FeatureStore, capture
from tmerge.evaluation import score_texts
from tmerge.models import describe, find_block_list, load_model
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


@pytest.mark.parametrize("family", sorted(PICO_FAMILIES))
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
