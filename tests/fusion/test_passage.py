"""What texts that are to be kept weigh in a fit."""

from __future__ import annotations

import pytest
import torch

from tmerge.fusion.passage import Rows


@pytest.mark.parametrize(("texts", "kept"), [(100, 7), (3, 900)])
@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_kept_rows_have_their_share_of_the_squares_however_many_they_are(texts, kept, share):
    weights = Rows(texts, kept, share).weights(torch.arange(texts + kept)).double()
    assert (weights[:texts] == 1).all()
    assert float(weights[texts:].square().sum() / weights.square().sum()) == pytest.approx(share, rel=1e-6)


@pytest.mark.parametrize(("texts", "kept"), [(5, 0), (0, 5)])
def test_alone_all_rows_are_alike(texts, kept):
    assert Rows(texts, kept, 0.5).weights(torch.arange(5)) is None


def test_rows_that_choose_weigh_what_the_drawn_ones_do():
    rows = Rows(10, 4, 0.5, 6)
    weights = rows.weights(torch.arange(20))
    assert (rows.fitted, rows.count) == (14, 20)
    assert (weights[:10] == 1).all() and (weights[14:] == 1).all() and (weights[10:14] > 1).all()
