"""Whether what was found is the order that was there already."""

from __future__ import annotations

import pytest
import torch

from tmerge.report import in_place_words
from tmerge.transport.matching import Correspondence


def test_the_strongest_of_each_row_counts():
    plan = torch.tensor([[0.9, 0.1, 0.0], [0.6, 0.5, 0.0], [0.0, 0.0, -1.0]])
    assert Correspondence.of(plan).in_place == 2
    assert Correspondence.of(torch.eye(3)[[1, 2, 0]]).in_place == 0


@pytest.mark.parametrize(
    ("share", "words"),
    [
        (None, None),
        (0.2, None),
        (0.9996, "99.9 % of the neurons are matched with the source's of the same number: what is carried is nearly"),
        (1.0, "every neuron is matched with the source's of the same number: what is carried is the plain copy"),
    ],
)
def test_it_is_said_where_it_is_so(share, words):
    said = in_place_words(share)
    assert said is None if words is None else said.startswith(words)
