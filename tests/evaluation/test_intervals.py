"""Paired bootstrap intervals, held against a plain loop and against what they must do."""

import math

import numpy as np
import pytest
import torch
from scipy import stats

from tmerge.evaluation import Interval, Scores, detectable, difference, resamples, score, verdict
from tmerge.evaluation.intervals import chance_to_gain, clearly_gains, upper_bound


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


@pytest.mark.parametrize(
    ("change", "controls", "expected"),
    [
        ((-0.2, -0.1), [(-0.2, -0.05), (-0.3, -0.01)], "helps"),
        ((-0.2, -0.1), [(-0.2, -0.05), (-0.1, 0.0)], "better, but not by the source"),
        ((-0.2, -0.1), [(0.01, 0.02)], "better, but not by the source"),
        ((-0.2, -0.1), [(-math.inf, math.nan)], "better, but not by the source"),
        ((-0.2, 0.1), [(-0.2, -0.1)], "no difference"),
        ((0.1, 0.2), [(-0.2, -0.1)], "hurts"),
    ],
)
def test_a_gain_is_the_merges_own_only_where_it_is_better_than_every_control(change, controls, expected):
    found = verdict(Interval(sum(change) / 2, *change), [Interval(0.0, *control) for control in controls])
    assert found == expected


def test_other_texts_are_refused(two):
    other = scores([1.0] * 60, [2.0] * 60)
    with pytest.raises(ValueError, match="same texts"):
        difference(other, two[1], resamples(60, 200, 0))


def test_the_studentised_bound_agrees_with_a_plain_loop(two):
    fused, base = two
    change, sizes = (fused.bits - base.bits).numpy(), base.bytes.numpy()

    def ratio(rows):
        gain = change[rows].sum() / sizes[rows].sum()
        left = change[rows] - gain * sizes[rows]
        return gain, np.std(left, ddof=0) * np.sqrt(60 * 60 / 59) / sizes[rows].sum()

    random = np.random.default_rng(1)
    gain, error = ratio(np.arange(60))
    drawn = [ratio(random.integers(60, size=60)) for _ in range(20_000)]
    quantile = np.quantile([(other - gain) / spread for other, spread in drawn], 0.01)
    ours = upper_bound(fused, base, level=0.01, seed=0)
    assert ours == pytest.approx(gain - quantile * error, abs=0.1 * error)  # 2500 resamples scatter by 0.05 of it
    assert upper_bound(fused, base, level=0.01, seed=0) == ours


def test_a_bound_takes_the_resamples_that_its_level_needs():
    # Most texts gain a little and a few lose much, as where a merge breaks some texts. All of a hundred resamples lie
    # below zero, though the level is for one of eight hundred.
    random = np.random.default_rng(0)
    sizes = np.full(60, 100.0)
    change = random.normal(-1.0, 0.3, 60)
    change[:3] = 4.0
    base = scores(sizes * 3, sizes)
    fused = scores(sizes * 3 + change, sizes)
    assert float((resamples(60, 100, 0) @ (fused.bits - base.bits)).max()) < 0
    assert upper_bound(fused, base, level=0.025 / 20, seed=0) > 0
    assert not clearly_gains(fused, base, chances=20, seed=0)
    change[:3] = -1.0
    assert clearly_gains(scores(sizes * 3 + change, sizes), base, chances=20, seed=0)


def test_a_gain_that_all_texts_share_is_clear_at_any_level(two):
    _, base = two
    fused = scores((base.bits * 0.99).numpy(), base.bytes.numpy())
    assert clearly_gains(fused, base, chances=40, seed=0)
    assert not clearly_gains(base, fused, chances=1, seed=0)
    assert not clearly_gains(base, base, chances=1, seed=0)


def test_the_chance_to_gain_is_how_often_it_comes_true():
    # 4000 models of 80 texts each, of which 20 are seen: among those given a chance of about p, a share p does gain.
    random = np.random.default_rng(0)
    sizes = np.full(80, 100.0)
    base = scores(3 * sizes, sizes)
    told, came = [], []
    for _ in range(4000):
        change = random.normal(random.normal(0, 1.0), 3.0, 80)  # bits: an effect of its own, and the texts about it
        model = scores(3 * sizes + change, sizes)
        told.append(chance_to_gain(model.first(20), base.first(20), of=80, level=0.025))
        came.append(change.mean() < -1.96 * change.std(ddof=1) / 80**0.5)
    told, came = np.array(told), np.array(came)
    for low, high in ((0, 0.025), (0.025, 0.2), (0.2, 0.8), (0.8, 1.0)):
        inside = (told >= low) & (told < high)
        assert inside.sum() > 100
        # The prediction takes no account of how rare large effects are, so it is too sure by some of it.
        assert came[inside].mean() == pytest.approx(told[inside].mean(), abs=0.12)
    assert came[told < 0.025].mean() < 0.01  # what drops out would hardly have won


@pytest.mark.parametrize("seed", range(3))
def test_a_gain_that_is_clear_in_the_end_was_likely_all_along(seed):
    random = np.random.default_rng(seed)
    sizes = random.integers(50, 200, 160).astype(float)
    base = scores(3 * sizes, sizes)
    fused = scores(sizes * (3 + random.normal(-0.03, 0.05, 160)), sizes)
    assert clearly_gains(fused, base, chances=20, seed=0)
    for seen in (20, 40, 80):
        assert chance_to_gain(fused.first(seen), base.first(seen), of=160, level=0.025 / 20) > 0.5
    worse = scores(sizes * (3 + random.normal(0.03, 0.05, 160)), sizes)
    assert chance_to_gain(worse.first(40), base.first(40), of=160, level=0.025 / 20) < 0.025
    assert chance_to_gain(worse.first(40), fused.first(40), of=160, level=0.5) < 0.025
    assert chance_to_gain(base.first(40), base.first(40), of=160, level=0.5) == 0


def test_a_detectable_difference_is_shown_four_times_in_five():
    """Drawn anew often: a t-test of scipy finds a true difference of that size at the power it was given for."""
    generator = np.random.default_rng(0)
    texts, spread = 200, 0.7
    zeros, ones = torch.zeros(texts, dtype=torch.float64), torch.ones(texts, dtype=torch.float64)
    seen = torch.tensor(generator.normal(0.3, spread, texts))
    found = detectable(Scores(seen, ones, 0, 0.0), Scores(zeros, ones, 0, 0.0))
    assert found == pytest.approx(2.8016 * float(seen.std()) / texts**0.5, rel=1e-4)
    draws = generator.normal(found, float(seen.std()), (4000, texts))
    shown = (stats.ttest_1samp(draws, 0, axis=1).pvalue < 0.05) & (draws.mean(1) > 0)
    assert shown.mean() == pytest.approx(0.8, abs=0.03)


def test_texts_that_all_say_the_same_tell_nothing_of_how_texts_vary():
    generator = np.random.default_rng(0)
    sizes = torch.tensor(generator.integers(10, 90, 30), dtype=torch.float64)
    base = Scores(torch.tensor(generator.normal(300, 9, 30)), sizes, 0, 0.0)
    assert detectable(base, base) is None
    assert detectable(Scores(base.bits - 0.1 * sizes, sizes, 0, 0.0), base) is None
