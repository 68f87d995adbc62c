"""Paired bootstrap intervals, held against a plain loop and against what they must do."""

import numpy as np
import pytest
import torch
from scipy import stats

from tmerge.evaluation import Interval, Scores, difference, resamples, score, verdict


def scores(bits, sizes):
    return Scores(torch.tensor(bits, dtype=torch.float64), torch.tensor(sizes, dtype=torch.float64), 0, 0.0)


@pytest.fixture
def two():
    random = np.random.default_rng(0)
    sizes = random.integers(20, 200, 60).astype(float)
    base = sizes * random.normal(3.0, 0.3, 60)
    return scores(base + sizes * random.normal(0.05, 0.02, 60), sizes), scores(base, sizes)


def test_resamples_draw_every_text_count_times_in_the_mean():
    counts = resamples(40, 4000, seed=1)
    assert torch.equal(counts.sum(1), torch.full((4000,), 40.0, dtype=torch.float64))
    torch.testing.assert_close(counts.mean(0), torch.ones(40, dtype=torch.float64), atol=0.08, rtol=0)  # 5 sigma
    assert torch.equal(counts, resamples(40, 4000, seed=1))
    assert not torch.equal(counts, resamples(40, 4000, seed=2))


def test_values_are_ratios_of_sums(two):
    fused, base = two
    counts = resamples(60, 500, 0)
    assert score(base, counts).value == pytest.approx(float(base.bits.sum() / base.bytes.sum()), rel=1e-12)
    change = difference(fused, base, counts)
    assert change.value == pytest.approx(fused.bits_per_byte - base.bits_per_byte, rel=1e-9)


def test_interval_agrees_with_scipy(two):
    fused, base = two
    ours = difference(fused, base, resamples(60, 8000, 0))
    bits, sizes = (fused.bits - base.bits).numpy(), base.bytes.numpy()
    theirs = stats.bootstrap(
        (bits, sizes),
        lambda b, s: b.sum() / s.sum(),
        paired=True,
        vectorized=False,
        n_resamples=4000,
        method="percentile",
        random_state=0,
    ).confidence_interval
    width = theirs.high - theirs.low
    # Two bootstraps of thousands of resamples differ by a few per cent of the interval's width.
    assert abs(ours.low - theirs.low) < 0.08 * width and abs(ours.high - theirs.high) < 0.08 * width


def test_pairing_takes_out_what_the_texts_share(two):
    fused, base = two
    counts = resamples(60, 2000, 0)
    paired, alone = difference(fused, base, counts), score(base, counts)
    assert paired.high - paired.low < 0.2 * (alone.high - alone.low)


def test_a_model_against_itself_is_exactly_no_difference(two):
    change = difference(two[1], two[1], resamples(60, 200, 0))
    assert (change.value, change.low, change.high) == (0.0, 0.0, 0.0)
    assert verdict(change) == "no difference"


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [(-0.2, -0.1, "helps"), (0.1, 0.2, "hurts"), (-0.1, 0.1, "no difference"), (-0.1, 0.0, "no difference")],
)
def test_verdict(low, high, expected):
    assert verdict(Interval((low + high) / 2, low, high)) == expected


def test_other_texts_are_refused(two):
    other = scores([1.0] * 60, [2.0] * 60)
    with pytest.raises(ValueError, match="same texts"):
        difference(other, two[1], resamples(60, 200, 0))
