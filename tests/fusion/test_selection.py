"""Which neurons are fused."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tmerge.fusion import COLUMN_PROJECTIONS, neuron_count, neuron_side, select_neurons
from tmerge.models import PROJECTIONS, feature_key


def test_neurons_are_outputs_of_q_k_v_gate_up_and_inputs_of_o_down():
    assert {name for name in PROJECTIONS if neuron_side(name) == "pre"} == COLUMN_PROJECTIONS == {"o", "down"}
    # So that the same hidden units are seen from both ends of an MLP, and of attention.
    assert feature_key("down", neuron_side("down")) == "down.pre"
    assert feature_key("gate", neuron_side("gate")) == "gate.post"


@pytest.mark.parametrize(
    ("top_k", "neurons", "expected"),
    [
        (128, 576, 128),
        (128, 128, 128),
        (128, 64, 64),
        (1, 576, 1),
        (0.1, 576, 58),
        (0.5, 7, 4),
        (1.0, 576, 576),
        (1, 1, 1),
        (0.0001, 576, 1),
        (0.25, 576, 144),
    ],
)
def test_a_count_is_a_count_and_a_fraction_a_fraction(top_k, neurons, expected):
    assert neuron_count(top_k, neurons) == expected


@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    st.lists(st.integers(0, 4), min_size=1, max_size=20),
    st.one_of(st.integers(1, 25), st.floats(0.01, 1.0)),
)
def test_the_most_active_are_taken_and_of_equals_the_first(scores, top_k):
    score = torch.tensor(scores, dtype=torch.float32)
    chosen = select_neurons(score, top_k)
    expected = sorted(sorted(range(len(scores)), key=lambda j: (-scores[j], j))[: neuron_count(top_k, len(scores))])
    assert chosen.tolist() == expected
    assert chosen.dtype == torch.int64


def test_ties_are_broken_alike_however_many_there_are():
    """An unstable sort starts to move equal scores at some sixteen of them."""
    assert select_neurons(torch.ones(5000), 3).tolist() == [0, 1, 2]
    score = torch.zeros(5000)
    score[[4000, 17]] = 1.0
    assert select_neurons(score, 4).tolist() == [0, 1, 17, 4000]


def test_scores_stay_as_they_were():
    score = torch.rand(50, generator=torch.Generator().manual_seed(0))
    before = score.clone()
    assert len(select_neurons(score, 1.0)) == 50
    assert score.equal(before)
