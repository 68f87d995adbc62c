"""Relatedness: near one where neurons correspond, near chance where they do not."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.meeting import Together
from tests.planted import planted_case, side_of
from tmerge.errors import Cancelled, NoSharedStructureError
from tmerge.processes import ALONE
from tmerge.transport import ASKED_NEURONS, Side, one_thread_each, relatedness
from tmerge.transport.relatedness import _wilson

_ROWS = 400
_KEYS = ("qkv.pre", "o.post", "gate.post", "up.post", "down.pre")
_STREAM = ("qkv.pre", "o.post")


def _features(layers, stream, mlp, seed):
    """(layer, key) -> (T, n), independent of one another."""
    generator = torch.Generator().manual_seed(seed)
    return {
        (layer, key): torch.randn(_ROWS, stream if key in _STREAM else mlp, generator=generator)
        for layer in range(layers)
        for key in _KEYS
    }


def _side(features, keys=_KEYS):
    layers = sorted({layer for layer, _ in features})
    return Side(lambda layer, key: features[layer, key], {layer: list(keys) for layer in layers}, {})


def _copied(features, stream, mlp, noise, seed=9):
    """The same neurons in another order, noisy, and twice as many: the others are strangers."""
    generator = torch.Generator().manual_seed(seed)
    order = {True: torch.randperm(2 * stream, generator=generator), False: torch.randperm(2 * mlp, generator=generator)}
    return {
        (layer, key): torch.cat(
            [
                values + noise * torch.randn(values.shape, generator=generator),
                torch.randn(values.shape, generator=generator),
            ],
            1,
        )[:, order[key in _STREAM]]
        for (layer, key), values in features.items()
    }


def _found(target, source, layers=2, **options):
    pairs = {layer: layer for layer in range(layers)}
    with one_thread_each():
        return relatedness(_side(target), _side(source), pairs, _ROWS, seed=0, **options)


def test_a_noisy_copy_is_related():
    target = _features(2, 40, 60, 0)
    found = _found(target, _copied(target, 40, 60, noise=1.0))
    assert found.value > 0.98 and found.stream > 0.98 and found.mlp > 0.98
    assert found.value == pytest.approx((found.stream + found.mlp) / 2)
    assert found.permuted < 0.06 and found.rows == _ROWS // 2


def test_less_of_a_copy_is_less_related():
    target = _features(2, 40, 60, 0)
    values = [_found(target, _copied(target, 40, 60, noise)).value for noise in (1.0, 4.0, 8.0, 30.0)]
    assert values == sorted(values, reverse=True) and values[0] > 0.9 and values[-1] < 0.15


def test_strangers_agree_no_more_than_by_chance():
    found = _found(_features(2, 40, 60, 0), _features(2, 80, 120, 1))
    # 40 and 120 neurons: shares of 1/80 and 1/120 are expected, and two of forty may well agree.
    assert found.value < 0.06 and found.permuted < 0.06


def test_the_permuted_figure_is_one_in_as_many_as_there_are():
    """Chance, measured: over many draws, 1/n' of the neurons meet the same partner again."""
    target = _features(1, 30, 30, 0)
    source = _copied(target, 30, 30, noise=0.1)
    with one_thread_each():
        figures = [relatedness(_side(target), _side(source), {0: 0}, _ROWS, seed=seed).permuted for seed in range(20)]
    # 20 draws of 30 + 3 * 30 neurons, of which those of the MLP agree together: a deviation of 0.005 at 1/60.
    assert sum(figures) / 20 == pytest.approx(1 / 60, abs=0.012)


def test_planted_models_are_wholly_related():
    case = planted_case("llama")
    target, source = side_of(case.target, case.target_features), side_of(case.planted.model, case.source_features)
    with one_thread_each():
        found = relatedness(target, source, dict(enumerate(case.source_layers)), len(case.tokens), seed=0)
    assert found.value == found.stream == found.mlp == 1.0
    assert found.permuted < 0.1


def test_without_an_mlp_the_stream_says_it_all():
    target = _features(2, 40, 60, 0)
    source = _copied(target, 40, 60, noise=0.5)
    found = relatedness(_side(target, _STREAM), _side(source, _STREAM), {0: 0, 1: 1}, _ROWS, seed=0)
    assert found.mlp is None and found.value == found.stream == 1.0
    assert found.to_dict() == {
        "value": 1.0,
        "ci95": (1.0, 1.0),
        "permuted": found.permuted,
        "stream": 1.0,
        "mlp": None,
        "rows": _ROWS // 2,
        "neurons": 40,
    }


def test_of_wide_layers_some_neurons_are_asked_and_the_interval_says_what_that_costs():
    """Half of the neurons are copies and half are strangers: about half agree, whichever are drawn."""
    width = 3 * ASKED_NEURONS
    target = _features(1, 60, width, 0)
    noise = torch.randn(_ROWS, width // 2, generator=torch.Generator().manual_seed(3))
    source = {
        (layer, key): values if key in _STREAM else torch.cat([values[:, : width // 2], noise], 1)
        for (layer, key), values in target.items()
    }
    sides, covered = (_side(target), _side(source)), 0
    with one_thread_each():
        for seed in range(20):
            found = relatedness(*sides, {0: 0}, _ROWS, seed=seed)
            assert found.neurons == 60 + ASKED_NEURONS and found.stream == 1.0
            low, high = found.ci95
            assert low < found.value < high and 0.01 < high - low < 0.06
            covered += low <= 0.75 + 0.002 <= high  # strangers agree by chance too
    assert covered >= 17


@given(st.integers(1, 400), st.integers(0, 400), st.floats(0, 1))
def test_limits_of_a_share(asked, more, share):
    """Wider for fewer that were asked, nothing where all were, and never beyond 0 and 1."""
    share = round(share * asked) / asked
    low, high = _wilson(share, asked, asked + more)
    assert 0 <= low <= share <= high <= 1 + 1e-12
    assert (low, high) == (share, share) if not more else high > low
    wider = _wilson(share, asked, asked + more + 1)
    assert wider[0] <= low + 1e-12 and wider[1] >= high - 1e-12


def test_the_same_seed_gives_the_same_figures_and_a_listener_may_stop():
    target, source = _features(1, 20, 20, 0), _features(1, 20, 20, 1)
    assert _found(target, source, 1) == _found(target, source, 1)
    seen = []
    _found(target, source, 1, progress=lambda *step: seen.append(step))
    assert seen == [(1, 4), (2, 4), (3, 4), (4, 4)]

    def stop(done, total):
        raise Cancelled("stopped by the test")

    with pytest.raises(Cancelled):
        _found(target, source, 1, progress=stop)


def test_of_a_deep_model_some_layers_are_looked_at():
    target = _features(12, 10, 10, 0)
    read = set()

    def watched(layer, key):
        read.add(layer)
        return target[layer, key]

    side = Side(watched, {layer: list(_KEYS) for layer in range(12)}, {})
    found = relatedness(side, _side(target), {layer: layer for layer in range(12)}, _ROWS, seed=0)
    assert len(read) == 8 and {0, 11} <= read
    assert found.value == 1.0


@pytest.mark.parametrize("count", [1, 2, 4, 5])
def test_processes_learn_alike_that_there_is_no_stream_to_match(count):
    """There are four matchings: a fifth process has none, and waits for what the others found."""
    draw, keys = torch.Generator().manual_seed(0), ("mlp.pre", "qkv.pre")
    features = {
        (layer, key): torch.randn(60, width, generator=draw)
        for layer in range(3)
        for key, width in zip(keys, (24, 32), strict=True)
    }
    side = Side(lambda layer, key: features[layer, key], dict.fromkeys(range(3), keys), {})

    def work(processes):
        try:
            return relatedness(side, side, {0: 0, 1: 1, 2: 2}, 60, seed=0, processes=processes)
        except NoSharedStructureError:
            return processes.gathered("none")

    told = Together(count).run(work) if count > 1 else [work(ALONE)]
    assert told == [["none"] * count] * count
