"""How heads divide, with the frequencies that the models themselves turn by."""

from __future__ import annotations

import json

import pytest

from tests.pico import pico_model
from tmerge.models import describe, head_facts


def _facts(family, **options):
    model = pico_model(family, **options)
    return head_facts(model, describe(model))


def _powers(base, dimensions):
    """The frequencies of the paper on rotary embeddings (arXiv 2104.09864)."""
    return [base ** (-2 * pair / dimensions) for pair in range(dimensions // 2)]


@pytest.mark.parametrize(
    ("family", "heads", "rotated"),
    # gpt_neox rotates a quarter of its 16 dimensions, stablelm likewise.
    [("llama", (4, 2, 12), 12), ("qwen2", (4, 2, 16), 16), ("gpt_neox", (4, 4, 16), 4), ("stablelm", (4, 2, 16), 4)],
)
def test_halves_turn_together(family, heads, rotated):
    facts = _facts(family, layers=3)
    assert list(facts) == ["0", "1", "2"]
    for layer in facts.values():
        assert (layer["heads"], layer["kv_heads"], layer["head_dim"]) == heads
        assert layer["pairs"] == [[pair, pair + rotated // 2] for pair in range(rotated // 2)]
        # float32 buffers.
        assert layer["frequencies"] == pytest.approx(_powers(10_000, rotated), rel=1e-6)


def test_frequencies_are_read_from_the_model_and_not_from_its_config():
    model = pico_model("llama")
    model.model.rotary_emb.inv_freq = model.model.rotary_emb.inv_freq.flip(0)
    frequencies = head_facts(model, describe(model))["0"]["frequencies"]
    assert frequencies == sorted(frequencies) and frequencies[-1] == 1.0


def test_each_kind_of_layer_has_its_own_table():
    facts = _facts("gemma3", layers=2, layer_types=["sliding_attention", "full_attention"])
    assert facts["0"]["frequencies"] == pytest.approx(_powers(10_000, 12), rel=1e-6)
    assert facts["1"]["frequencies"] == pytest.approx(_powers(1_000_000, 12), rel=1e-6)


def test_neighbours_turn_together_where_a_model_turns_neighbours():
    facts = _facts("gptj")["0"]
    assert facts["pairs"] == [[0, 1], [2, 3], [4, 5], [6, 7]]
    # It keeps no table of frequencies: its pairs meet in their order.
    assert facts["frequencies"] is None


@pytest.mark.parametrize("family", ["gpt2", "opt", "bloom", "mpt"])
def test_learned_and_relative_positions_turn_nothing(family):
    facts = _facts(family)["0"]
    assert facts["pairs"] == [] and not facts["frequencies"]


def test_layers_without_rotation_among_others():
    facts = _facts("smollm3", layers=2)
    assert [bool(layer["pairs"]) for layer in facts.values()] == [True, False]


def test_layers_without_attention_are_passed_over():
    assert list(_facts("qwen3_5")) == ["1"]


@pytest.mark.parametrize("family", ["llama", "gemma3", "gptj", "gpt2", "falcon-new", "phi3"])
def test_facts_outlive_the_model_as_json(family):
    facts = _facts(family)
    assert json.loads(json.dumps(facts)) == facts
