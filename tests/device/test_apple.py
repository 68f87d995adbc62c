"""No float64 comes to a device that has none: the steps of a merge on one that calls itself ``mps``."""

from __future__ import annotations

import sys
from functools import partial

import pytest
import torch

from tests.device.apple import APPLE, apple
from tests.pico import pico_model, pico_tokenizer
from tmerge.calibration import FeatureStore, capture
from tmerge.evaluation import score_texts
from tmerge.fusion import carry, fuse
from tmerge.fusion.addition import ADDING, additions_of
from tmerge.fusion.logit_goal import LogitGoal
from tmerge.fusion.ridge import Linear, Regression
from tmerge.models import LastNorm, LoadedModel, ModelReference, Readout, describe, head_facts
from tmerge.models.blocks import BlockCall
from tmerge.processes import ALONE
from tmerge.recipe import Apart, Weights
from tmerge.transport import Heads, Side, apart_transport, plans, relatedness, solve_features

TEXTS = ["Kucing itu tidur di kursi.", "A", "The cat sat on the mat.", "one two three four"] * 3
PROJECTIONS = ["q", "k", "v", "o", "up", "down"]
FAMILIES = ["llama", "gpt2", "gemma3", "phi3", "falcon"]


@pytest.fixture(autouse=True)
def device(monkeypatch):
    def here(work, items, workers, take):
        for item in items:
            take(item, work(item))

    # What a thread of its own does would not see the device, and torch here has nothing to wait for.
    for module in (plans, sys.modules[carry.__module__]):
        monkeypatch.setattr(module, "in_turn", here)
    monkeypatch.setattr(torch.mps, "synchronize", lambda: None)
    with apple():
        yield


def _loaded(family: str) -> LoadedModel:
    with torch.device("meta"):
        model = pico_model(family)
    reference = ModelReference.parse("user/pico")
    return LoadedModel(reference, "sha256:0", model, pico_tokenizer(), None, APPLE, torch.float32)


def test_a_device_without_float64_is_one():
    there, here = torch.ones(3, 4, device=APPLE), torch.ones(3, 4)
    assert there.device == APPLE and there[:2].to("cpu").equal(here[:2]) and float(there.sum()) == 1
    assert here.double().to(there).dtype == torch.float32 and there.cpu().double().dtype == torch.float64
    for wide in (
        there.double,
        partial(there.to, "cpu", torch.float64),
        partial(there.sum, 0, dtype=torch.float64),
        partial(here.double().to, APPLE),
        partial(torch.zeros, 2, dtype=torch.float64, device=APPLE),
        partial(here.double().copy_, there),
    ):
        with pytest.raises(TypeError, match="float64"):
            wide()


@pytest.mark.parametrize("family", FAMILIES)
def test_reading(family, tmp_path):
    loaded = _loaded(family)
    architecture = describe(loaded.model)
    words = {"max_tokens": 8, "batch_tokens": 32, "key": "k"}
    capture(loaded, architecture, TEXTS, PROJECTIONS, tmp_path / "store", **words)
    store, facts = FeatureStore(tmp_path / "store"), head_facts(loaded.model, architecture)
    assert store.get(1, "down.pre").shape[0] == len(TEXTS)
    # Of heads that rotate the frequencies have been read, from where the model is.
    rotates = architecture.attention[0].rotary_dim != 0 and family != "gpt2"
    assert all((heads["frequencies"] is not None) == rotates for heads in facts.values()) and len(facts) == 2
    assert all(Heads.of(heads) for heads in facts.values())


@pytest.mark.parametrize("family", FAMILIES)
def test_scoring(family):
    assert score_texts(_loaded(family), TEXTS).bits.dtype == torch.float64


def _features(widths: dict[str, int], layer: int, key: str) -> torch.Tensor:
    draw = torch.Generator().manual_seed(100 * layer + len(key))
    return torch.randn(40, widths[key], generator=draw)


@pytest.mark.parametrize("epsilon", [0.3, 0.01])
def test_plans(epsilon):
    reads = (partial(_features, {"q.post": width}, key="q.post") for width in (70, 90))
    solved = solve_features("q.post", *reads, range(2), range(3), epsilon=epsilon, device=APPLE, max_iterations=20)
    assert solved.f.dtype == torch.float32 and solved.cost.dtype == torch.float64 and solved.f.shape == (2, 3, 70)


def test_carrying_relatedness_and_fusing():
    names = ["q", "down"]
    target, source = (describe(_loaded("llama").model) for _ in range(2))
    widths = {tap.key: tap.features for tap in target.taps(names)}
    read, layers = partial(_features, widths), (range(2), range(2))
    solved = {
        key: solve_features(key, partial(read, key=key), partial(read, key=key), *layers, epsilon=0.3, max_iterations=5)
        for key in widths
    }
    transport = apart_transport(solved, read, read, names, Apart(layers_kept=2))
    fusion = Weights(alpha=0.5, top_k=4, projections=tuple(names))
    carried = carry(target, source, transport, fusion, device=APPLE)
    assert len(carried.transported) == 2 * len(names)
    assert {item.weight.device.type for item in carried.transported} == {"cpu"}
    assert all(ratio is not None for ratios in carried.norm_ratios.values() for ratio in ratios)
    fuse(target.views, carried.transported, 0.5)
    side = Side(read, {layer: list(widths) for layer in range(2)}, {})
    assert relatedness(side, side, {0: 0, 1: 1}, 40, seed=0).stream == 1


def _first_call(loaded: LoadedModel) -> BlockCall:
    """What the model gives to its first block."""
    block, calls = loaded.base.layers[0], []
    forward = block.forward
    block.forward = lambda *given, **named: calls.append((given, named)) or forward(*given, **named)
    loaded.base(input_ids=torch.ones(2, 5, dtype=torch.int64, device=APPLE), use_cache=False)
    del block.forward
    return BlockCall(block, *calls[0], forward)


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_how_a_block_adds_and_what_is_fitted(family):
    loaded = _loaded(family)
    views = describe(loaded.model).layers[0]
    with torch.no_grad():
        additions = additions_of(loaded, 0, _first_call(loaded), views, ADDING)
        now = torch.ones(6, views["o"].out_features, device=APPLE)
        wanted, _ = additions["o"].output_for(now, torch.arange(now.shape[1], device=APPLE), now)
        layer = Linear(views["o"].weight(), views["o"].bias())
        sums = [
            Regression(views["o"].in_features, [now.shape[1]], has_bias=layer.bias is not None, device=APPLE)
            for _ in range(2)
        ]
        for of in sums:
            of.add(torch.ones(6, views["o"].in_features, device=APPLE), [wanted], torch.ones(6, device=APPLE))
            of.add_others(ALONE)
        (fit,) = sums[0].solve([layer], [1.0, 0.1], rank=2, kept_away=sums[1])
    assert fit.weight.device.type == "cpu" and fit.weight.shape == views["o"].weight().shape


def test_the_last_goal():
    readouts = [
        Readout(torch.ones(40, width, device=APPLE), None, LastNorm(*torch.ones(2, width, device=APPLE), False), 1.0)
        for width in (6, 9)
    ]
    vocabulary, counts = torch.arange(40).repeat(2, 1), torch.ones(40, dtype=torch.int64)
    with torch.no_grad():
        goal = LogitGoal.of(*readouts, vocabulary, counts)
        assert goal.stream(torch.ones(3, 6), torch.ones(3, 9, device=APPLE)).shape == (3, 6)
