"""The last block's goal against a least squares over the whole vocabulary, token by token, in float64."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.optimize import minimize

from tmerge.fusion.logit_goal import _HELD, _UNREAD, LogitGoal
from tmerge.models import LastNorm, Readout

TOKENS, MINE, THEIRS = 90, 12, 20


def readout(width, seed, *, centres=False, biased=False, tokens=TOKENS):
    draw = torch.Generator().manual_seed(seed)

    def values(*shape):
        return torch.randn(*shape, generator=draw)

    shift = 0.3 * values(width) if centres else torch.zeros(width)
    bias = values(tokens) if biased else None
    return Readout(values(tokens, width), bias, LastNorm(1 + 0.3 * values(width), shift, centres), 1 + 0.1 * seed)


def logits(of, stream):
    """(r, V), float64."""
    stream = stream.double()
    held = stream - stream.mean(1, keepdim=True) if of.norm.centres else stream
    normed = of.norm.gain.double() * held / held.square().mean(1, keepdim=True).sqrt() + of.norm.shift.double()
    made = normed @ of.head.double().T
    return of.scale * (made if of.head_bias is None else made + of.head_bias.double())


@pytest.mark.parametrize("centres", [False, True])
@pytest.mark.parametrize("biased", [False, True])
def test_it_is_the_weighted_least_squares_over_the_vocabulary(centres, biased):
    target, source = readout(MINE, 1, centres=centres, biased=biased), readout(THEIRS, 2, centres=centres)
    order = torch.randperm(TOKENS, generator=torch.Generator().manual_seed(5))
    vocabulary = torch.stack([torch.arange(TOKENS), order])
    counts = torch.randint(0, 9, (TOKENS,), generator=torch.Generator().manual_seed(3))
    carried = torch.randn(7, MINE, generator=torch.Generator().manual_seed(4))
    hidden = 3 * torch.randn(7, THEIRS, generator=torch.Generator().manual_seed(6))
    found = LogitGoal.of(target, source, vocabulary, counts).stream(carried, hidden)

    weights = (counts.double() + _UNREAD).sqrt()[:, None]
    jacobian = target.scale * target.head.double() * target.norm.gain.double()
    if centres:
        jacobian = jacobian - jacobian.mean(1, keepdim=True)
    shares = weights.square() / weights.square().sum()
    jacobian = (jacobian - (shares * jacobian).sum(0)) * shares.sqrt()
    constant = target.head.double() @ target.norm.shift.double()
    constant = target.scale * (constant if target.head_bias is None else constant + target.head_bias.double())
    size = hidden.double() - (hidden.double().mean(1, keepdim=True) if centres else 0)
    size = size.square().mean(1).sqrt()
    held = _HELD * jacobian.square().sum(0).mean()
    for token, row in enumerate(logits(source, hidden)[:, order]):
        wanted = row - constant
        wanted = ((wanted - (shares[:, 0] * wanted).sum()) * shares[:, 0].sqrt()).numpy()
        now = carried[token].double() / size[token]
        now = (now - now.mean() if centres else now).numpy()
        made = (found[token].double() / size[token]).numpy()
        # It has the size that the norm divides by, and no stream of that size comes nearer.
        assert np.sqrt(np.square(made).mean()) == pytest.approx(1, abs=1e-4)

        def lack(y, wanted=wanted, now=now):
            off = wanted - jacobian.numpy() @ y
            return off @ off + float(held) * (y - now) @ (y - now)

        sized = {"type": "eq", "fun": lambda y: np.square(y).mean() - 1}
        for seed in range(3):
            start = np.random.default_rng(seed).normal(size=MINE)
            best = minimize(lack, start, method="SLSQP", constraints=[sized], options={"maxiter": 500, "ftol": 1e-12})
            assert best.success and lack(made) <= lack(best.x) * (1 + 1e-4)


def test_the_sources_own_stream_is_the_goal_where_the_heads_are_one():
    source = readout(THEIRS, 2)
    vocabulary = torch.arange(TOKENS).expand(2, -1)
    hidden = torch.randn(5, THEIRS, generator=torch.Generator().manual_seed(6))
    goal = LogitGoal.of(source, source, vocabulary, torch.ones(TOKENS))
    torch.testing.assert_close(goal.stream(hidden, hidden), hidden, atol=1e-4, rtol=1e-4)
    # From elsewhere it is moved there, as far as logits depend on it.
    moved = goal.stream(hidden + torch.randn(5, THEIRS), hidden)
    assert float((moved - hidden).norm()) < 0.03 * float(hidden.norm())


def test_a_narrower_target_comes_nearer_to_the_logits_than_with_the_kept_neurons():
    source = readout(THEIRS, 2)
    # As of a trained model: what one neuron says, others say too.
    mixed = source.head @ torch.randn(THEIRS, 8, generator=torch.Generator().manual_seed(9)) / 8
    source = replace(source, head=mixed @ torch.randn(8, THEIRS, generator=torch.Generator().manual_seed(10)))
    kept = torch.randperm(THEIRS, generator=torch.Generator().manual_seed(1))[:MINE]
    target = Readout(
        source.head[:, kept], None, LastNorm(source.norm.gain[kept], source.norm.shift[kept], False), source.scale
    )
    vocabulary = torch.arange(TOKENS).expand(2, -1)
    hidden = torch.randn(50, THEIRS, generator=torch.Generator().manual_seed(6))
    goal = LogitGoal.of(target, source, vocabulary, torch.ones(TOKENS))

    def divergence(stream):
        wanted, made = (logits(of, h).log_softmax(-1) for of, h in ((source, hidden), (target, stream)))
        return float((wanted.exp() * (wanted - made)).sum(1).mean())

    assert divergence(goal.stream(hidden[:, kept], hidden)) < 0.7 * divergence(hidden[:, kept])
