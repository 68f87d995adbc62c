"""What a model takes while it is read: all of it, or two of its blocks."""

from dataclasses import replace

import pytest
import torch

from tests.pico import save_pico
from tmerge.models import describe, load_model, read_facts
from tmerge.preflight import holding
from tmerge.preflight.holding import Place, read_bytes
from tmerge.recipe import Recipe

CPU = Place(torch.device("cpu"))


@pytest.fixture(scope="module")
def deep(tmp_path_factory):
    """A model of twenty layers."""
    return save_pico("llama", tmp_path_factory.mktemp("models") / "deep", layers=20)


def asked(deep, memory="auto", **words):
    return Recipe(target=str(deep), source=str(deep), dtype="float32", memory=memory, **words)


def test_by_blocks_it_does_not_grow_with_the_layers(deep, monkeypatch):
    facts, layout = read_facts(str(deep)), describe(load_model(str(deep)).model)
    words = (torch.float32, CPU, 0)
    whole = read_bytes(facts, layout, asked(deep, "resident"), *words)
    assert whole == 4 * facts.parameters
    blocks = read_bytes(facts, layout, asked(deep, "blocks"), *words)
    # Two of twenty blocks, or one of the two embeddings.
    assert blocks < whole / 3
    twice = replace(facts, parameters=2 * facts.parameters)
    deeper = replace(layout, layers=layout.layers * 2)
    assert read_bytes(twice, deeper, asked(deep, "blocks"), *words) < 1.3 * blocks
    # By itself, where it does not fit.
    assert read_bytes(facts, layout, asked(deep), *words) == whole
    monkeypatch.setattr(holding, "fits", lambda *words: False)
    assert read_bytes(facts, layout, asked(deep), *words) == blocks
    # Code of its own may read itself in ways of its own.
    trusted = asked(deep, trust_remote_code=(str(deep),))
    assert read_bytes(facts, layout, trusted, *words) == whole


def test_the_stream_of_all_texts_counts_up_to_a_group_of_them(deep):
    facts, layout = read_facts(str(deep)), describe(load_model(str(deep)).model)
    recipe = asked(deep, "blocks")
    none, some, many = (read_bytes(facts, layout, recipe, torch.float32, CPU, size) for size in (0, 1000, 10**12))
    # As it entered the first block, and as it stands.
    assert some == none + 2000
    assert many == none + holding.STREAM_BYTES
