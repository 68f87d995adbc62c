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


def test_among_rows_that_choose_the_kept_ones_have_the_same_share():
    rows = Rows(10, 4, 0.25, 6, 3)
    weights = rows.weights(torch.arange(23)).double()
    assert (rows.fitted, rows.count) == (14, 23)
    assert (weights[:10] == 1).all() and (weights[14:20] == 1).all()
    for kept, drawn in ((weights[10:14], 10), (weights[20:], 6)):
        squares = float(kept.square().sum())
        assert squares / (squares + drawn) == pytest.approx(0.25, rel=1e-6)
