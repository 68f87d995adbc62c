"""Sum, TIES and DARE against the papers' own definitions, in float64 and entry by entry."""

from __future__ import annotations

import math
import sys
from itertools import permutations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests import forked
from tmerge.errors import FusionError
from tmerge.fusion import Join, JoinedNeurons, NeuronSequence, SourcePart, TransportedNeurons, trimmed


def item(weight, bias=None, layer=0, projection="q", neurons=None):
    chosen = torch.arange(len(weight)) if neurons is None else neurons
    return TransportedNeurons(layer, projection, chosen, weight, bias, True)


class Items(NeuronSequence):
    def __init__(self, *items):
        self._items = items

    def __len__(self):
        return len(self._items)

    def _item(self, index):
        return self._items[index]


def parts_of(*tensors, weights=None, biases=None):
    weights = weights or [1.0] * len(tensors)
    biases = biases or [None] * len(tensors)
    return [
        SourcePart(f"source {number}", f"sha256:{number}", weight, Items(item(tensor, bias)))
        for number, (tensor, weight, bias) in enumerate(zip(tensors, weights, biases, strict=True), start=1)
    ]


def joined(parts, how, strengths, density=1.0, seed=0):
    named = {part.name: strength for part, strength in zip(parts, strengths, strict=True)}
    return JoinedNeurons(parts, Join(how, density, seed), named)[0].weight


def random(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def ties_by_the_paper(tensors, weights, strengths, density):
    """Algorithm 1 of arXiv 2306.01708 with weights, as mergekit has them, in Python's own floats."""
    there = [each for each in zip(tensors, weights, strengths, strict=True) if each[2]]
    shape = tensors[0].shape
    lists, trims = [tensor.double().flatten().tolist() for tensor, _, _ in there], []
    for values in lists:
        count = max(1, math.floor(density * len(values)))
        stay = sorted(range(len(values)), key=lambda index: (-abs(values[index]), index))[:count]
        trims.append([value if index in stay else 0.0 for index, value in enumerate(values)])
    merged = []
    for entry in zip(*trims, strict=True):
        votes = sum(strength * weight * value for value, (_, weight, strength) in zip(entry, there, strict=True))
        sign = 1 if votes >= 0 else -1
        agree = [
            (value, weight, strength)
            for value, (_, weight, strength) in zip(entry, there, strict=True)
            if value and math.copysign(1, value) == sign
        ]
        above = sum(strength * weight * value for value, weight, strength in agree)
        merged.append(above / sum(weight for _, weight, _ in agree) if agree else 0.0)
    return torch.tensor(merged, dtype=torch.float64).view(shape)


@pytest.mark.parametrize("density", [0.05, 0.3, 0.5, 1.0])
@pytest.mark.parametrize("strengths", [(1.0, 1.0, 1.0), (0.5, 1.5, 1.0), (1.0, 0.0, 0.3)])
def test_ties_is_the_papers(density, strengths):
    tensors = [random(7, 5, seed=seed) for seed in range(3)]
    weights = [1.0, 0.7, 2.0]
    found = joined(parts_of(*tensors, weights=weights), "ties", strengths, density)
    expected = ties_by_the_paper(tensors, weights, strengths, density)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-7)
    assert found.dtype == torch.float32


_VALUES = st.integers(-3, 3).map(float)  # small whole numbers: ties of magnitude and votes of exactly zero


@settings(deadline=None, max_examples=150)
@given(
    tensors=st.integers(1, 12).flatmap(
        lambda size: st.lists(st.lists(_VALUES, min_size=size, max_size=size), min_size=1, max_size=4)
    ),
    density=st.sampled_from([0.2, 0.5, 0.9, 1.0]),
    data=st.data(),
)
def test_ties_with_equal_entries_and_votes_of_zero(tensors, density, data):
    rows = [torch.tensor(values).view(-1, 1) for values in tensors]
    some = st.lists(st.sampled_from([0.0, 0.5, 1.0, 2.0]), min_size=len(rows), max_size=len(rows))
    strengths = data.draw(some.filter(any))
    weights = data.draw(st.lists(st.sampled_from([0.5, 1.0, 4.0]), min_size=len(rows), max_size=len(rows)))
    found = joined(parts_of(*rows, weights=weights), "ties", strengths, density)
    expected = ties_by_the_paper(rows, weights, strengths, density)
    torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=1e-9)


def test_ties_of_one_size_for_all_is_that_size_of_ties():
    tensors = [random(6, 6, seed=seed) for seed in range(3)]
    once, half = (joined(parts_of(*tensors), "ties", [size] * 3, 0.4) for size in (1.0, 0.5))
    assert torch.equal(half, 0.5 * once)  # a power of two rounds nothing


def test_a_source_of_strength_zero_elects_and_divides_nothing():
    small, large = random(6, 6, seed=1), 100 * random(6, 6, seed=2)
    for how in ("sum", "ties", "dare"):
        both = joined(parts_of(small, large), how, [0.7, 0.0], 0.5)
        assert torch.equal(both, joined(parts_of(small), how, [0.7], 0.5)), how


def test_trimming_keeps_the_largest_and_of_equal_ones_the_first():
    tensor = torch.tensor([[3.0, -1.0, 2.0], [-2.0, 2.0, 0.5]])
    assert trimmed(tensor, 0.5).tolist() == [[3.0, 0.0, 2.0], [-2.0, 0.0, 0.0]]
    assert trimmed(tensor, 0.01).tolist() == [[3.0, 0.0, 0.0], [0.0, 0.0, 0.0]]  # one stays at least
    assert torch.equal(trimmed(tensor, 1.0), tensor) and trimmed(tensor, 1.0) is not tensor


def test_sum_is_the_sum():
    tensors, weights, strengths = [random(7, 5, seed=seed) for seed in range(3)], [1.0, 0.5, 2.0], [0.3, 1.0, 0.0]
    found = joined(parts_of(*tensors, weights=weights), "sum", strengths)
    expected = sum(w * s * t.double() for t, w, s in zip(tensors, weights, strengths, strict=True))
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-7)


def test_dare_drops_a_share_and_rescales_what_stays():
    tensor, density = random(300, 200, seed=3).abs() + 0.1, 0.3
    found = joined(parts_of(tensor), "dare", [1.0], density)
    kept = found != 0
    torch.testing.assert_close(found[kept].double(), tensor[kept].double() / density, rtol=1e-6, atol=0)
    # A share of 60,000 draws: four standard deviations are 0.0075.
    assert abs(kept.double().mean().item() - density) < 4 * math.sqrt(density * (1 - density) / tensor.numel())
    # What is expected of it is what was there: over many seeds the mean comes near.
    small = random(4, 4, seed=4)
    mean = torch.stack([joined(parts_of(small), "dare", [1.0], 0.5, seed) for seed in range(2000)]).mean(0)
    # Each entry is 0 or twice itself: its mean over 2000 has the standard deviation |t| / sqrt(2000).
    assert bool(((mean - small).abs() <= 5 * small.abs() / math.sqrt(2000)).all())


def test_dare_is_the_sum_of_what_it_drops_of_each_source_and_drops_by_seed_place_and_source():
    tensors = [random(20, 10, seed=seed) for seed in range(2)]
    parts = parts_of(*tensors, weights=[1.0, 0.5])
    alone = [joined([part], "dare", [strength], 0.5) for part, strength in zip(parts, (1.0, 0.4), strict=True)]
    torch.testing.assert_close(joined(parts, "dare", [1.0, 0.4], 0.5), alone[0] + alone[1])
    same = parts_of(tensors[0], tensors[0])
    first, second = (joined([part], "dare", [1.0], 0.5) for part in same)
    assert not torch.equal(first, second)  # another source, another mask
    assert not torch.equal(first, joined(same[:1], "dare", [1.0], 0.5, seed=1))
    other = [SourcePart("source 1", "sha256:1", 1.0, Items(item(tensors[0], layer=1)))]
    assert not torch.equal(first, joined(other, "dare", [1.0], 0.5))
    assert torch.equal(first, joined(same[:1], "dare", [1.0], 0.5))


@pytest.mark.parametrize("how", ["sum", "ties", "dare"])
def test_the_order_in_which_sources_are_named_changes_no_bit(how):
    tensors = [random(9, 8, seed=seed) for seed in range(3)]
    parts = parts_of(*tensors, weights=[1.0, 0.3, 1.7], biases=[random(9, seed=9), None, random(9, seed=8)])
    strengths = {"source 1": 0.9, "source 2": 0.4, "source 3": 1.1}
    found = [JoinedNeurons(order, Join(how, 0.6, 5), strengths)[0] for order in permutations(parts)]
    for other in found[1:]:
        assert torch.equal(found[0].weight, other.weight) and torch.equal(found[0].bias, other.bias)


@pytest.mark.parametrize("how", ["sum", "ties", "dare"])
def test_one_source_whole_is_itself_to_the_bit(how):
    tensor, bias = random(9, 8, seed=1), random(9, seed=2)
    (found,) = JoinedNeurons(parts_of(tensor, biases=[bias]), Join(how, 1.0, 0), {"source 1": 0.3})
    assert torch.equal(found.weight, 0.3 * tensor) and torch.equal(found.bias, 0.3 * bias) and found.is_difference


def test_biases_are_joined_of_those_that_have_one():
    tensors, bias = [random(4, 3, seed=seed) for seed in range(2)], random(4, seed=5)
    parts = parts_of(*tensors, biases=[None, bias])
    (found,) = JoinedNeurons(parts, Join("sum", 1.0, 0), {"source 1": 1.0, "source 2": 0.5})
    assert torch.equal(found.bias, 0.5 * bias)
    (none,) = JoinedNeurons(parts, Join("sum", 1.0, 0), {"source 1": 1.0})
    assert none.bias is None


_JOINING = """
import sys, tempfile
from pathlib import Path
import torch
from tests.peak import Peak, return_what_is_freed
from tmerge.fusion import Join, JoinedNeurons, NeuronWriter, SourcePart, StoredNeurons, TransportedNeurons

return_what_is_freed()
torch.set_num_threads(1)
how, count, side = sys.argv[1], int(sys.argv[2]), 2048
with tempfile.TemporaryDirectory() as folder:
    parts = []
    for number in range(count):
        writer = NeuronWriter(Path(folder) / str(number), "key")
        writer.add([TransportedNeurons(0, "q", torch.arange(side), torch.randn(side, side), None, True)])
        writer.finish()
        parts.append(SourcePart(str(number), str(number), 1.0, StoredNeurons(Path(folder) / str(number))))
    joined = JoinedNeurons(parts, Join(how, 0.3, 0), {part.name: 0.5 for part in parts})

    peak = Peak()
    item = joined[0]
    print(peak.grown() / item.weight.nbytes)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux for the peak of a process")
@pytest.mark.parametrize(("how", "most"), [("sum", 3), ("dare", 5), ("ties", 8)])
def test_joining_takes_no_more_for_more_sources(how, most):
    peaks = []
    for count in (3, 24):
        process = forked.run([how, count], _JOINING)
        assert process.returncode == 0, process.stderr
        peaks.append(float(process.stdout))
    # In tensors of the item's size: what `check` counts with, and what is small.
    assert max(peaks) < most + 0.3, peaks
    assert abs(peaks[1] - peaks[0]) < 0.3, peaks


def test_no_strength_no_items():
    assert list(JoinedNeurons(parts_of(random(3, 3, seed=0)), Join("sum", 1.0, 0), {"source 1": 0.0})) == []


def test_what_was_carried_to_other_neurons_is_refused():
    first, second = (random(3, 3, seed=seed) for seed in range(2))
    other = SourcePart("source 2", "sha256:2", 1.0, Items(item(second, neurons=torch.tensor([0, 1, 4]))))
    with pytest.raises(FusionError, match=r"source 2 was carried to other neurons of layer 0's q than source 1"):
        JoinedNeurons([*parts_of(first), other], Join("sum", 1.0, 0), {"source 1": 1.0, "source 2": 1.0})[0]
