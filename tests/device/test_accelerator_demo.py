"""The two demo models on an accelerator, against float64 on the CPU: `make device`."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch

from tests.device.accelerators import LACKING, accelerator_here, float64_here, in_its_own_dtype
from tmerge.adaptation import adapt
from tmerge.calibration import FeatureStore, capture, sample_texts
from tmerge.errors import MissingExtraError
from tmerge.evaluation import score_texts
from tmerge.fusion import carry, fuse
from tmerge.fusion.merge import CPU
from tmerge.models import Architecture, LoadedModel, describe, head_facts, load_model
from tmerge.recipe import AdaptationSettings, Apart, Shared, Weights
from tmerge.transport import Side, Transport, apart_transport, feature_keys, solve_features
from tmerge.transport.shared import solve_shared

# What an accelerator computes can be seen on one alone; test_fake.py and test_apple.py tell what can be told without.
if accelerator_here() is None:
    pytest.skip(LACKING, allow_module_level=True)

# On two CPU cores about three minutes of processor time; `make device` runs them whatever they take.
pytestmark = pytest.mark.slow

NAMES = {"target": "demo:smollm2-135m-instruct", "source": "demo:gemma-3-270m"}
TEXTS = sample_texts("english")[:24]
LIMITS = {"max_tokens": 16, "batch_tokens": 256}
PROJECTIONS = ["q", "k", "v", "o"]
# Of those that are matched by plans: some layers, so that float64 ends.
LAYERS = {"target": range(0, 30, 10), "source": range(0, 18, 6)}


@dataclass(frozen=True)
class Read:
    """A model in one precision, and what was read of it."""

    loaded: LoadedModel
    architecture: Architecture
    store: FeatureStore

    @classmethod
    def of(cls, loaded: LoadedModel, folder: Path) -> Read:
        architecture = describe(loaded.model)
        capture(loaded, architecture, TEXTS, PROJECTIONS, folder, key="k", **LIMITS)
        return cls(loaded, architecture, FeatureStore(folder))

    @property
    def side(self) -> Side:
        return Side.of(self.store, head_facts(self.loaded.model, self.architecture))


@dataclass(frozen=True)
class Pair:
    """Both models where they are tested, or in float64 on the CPU."""

    target: Read
    source: Read


@pytest.fixture(scope="module")
def pairs(accelerator, tmp_path_factory) -> tuple[Pair, Pair]:
    """On the accelerator in float32, and the same weights in float64 here."""
    folder, read = tmp_path_factory.mktemp("demo"), {}
    for role, name in NAMES.items():
        try:
            loaded = load_model(name, dtype="float32", device="cpu")
        except MissingExtraError as error:
            # The models come in packages of their own; the error says which and how to install it.
            pytest.skip(str(error))
        wide = replace(loaded, model=copy.deepcopy(loaded.model).double(), dtype=torch.float64)
        there = replace(loaded, model=loaded.model.to(accelerator), device=accelerator)
        read[role] = [Read.of(model, folder / f"{role}-{number}") for number, model in enumerate((there, wide))]
    return tuple(Pair(target, source) for target, source in zip(read["target"], read["source"], strict=True))


def _off(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """Relative to the whole: some neurons are all but silent beside others."""
    return float((found - wanted).norm() / wanted.norm())


@pytest.mark.parametrize("role", NAMES)
def test_features(pairs, role):
    there, here = (getattr(pair, role).store for pair in pairs)
    for layer in here.layers:
        for key in here.keys(layer):
            found, wanted = there.get(layer, key), here.get(layer, key)
            assert _off(found, wanted) < 1e-4


@pytest.mark.parametrize("role", NAMES)
def test_scores(pairs, role):
    there, here = (score_texts(getattr(pair, role).loaded, TEXTS[:8]).bits for pair in pairs)
    torch.testing.assert_close(there, here, rtol=1e-4, atol=1e-3)


def _apart(pair: Pair, device: torch.device) -> Transport:
    settings = Apart(layers_kept=2)
    plans = {
        key: solve_features(
            key,
            lambda layer, key=key: pair.target.store.get(layer, key),
            lambda layer, key=key: pair.source.store.get(layer, key),
            LAYERS["target"],
            LAYERS["source"],
            epsilon=settings.epsilon,
            device=device,
        )
        for key in feature_keys(["q"])
    }
    assert all(solved.converged.all() for solved in plans.values())
    return apart_transport(plans, pair.target.store.get, pair.source.store.get, ["q"], settings)


def _carried(pair: Pair, transport: Transport, device: torch.device):
    fusion = Weights(alpha=0.3, top_k=64, projections=tuple(transport.layer_maps))
    return carry(pair.target.architecture, pair.source.architecture, transport, fusion, device=device).transported


def _assert_same_fusion(pairs, transports, device):
    """What is carried, and the target's weights once it is fused; they are as before afterwards."""
    there, here = pairs
    found = _carried(there, transports[0], device)
    with float64_here():
        wanted = _carried(here, transports[1], CPU)
    for item, reference in zip(found, wanted, strict=True):
        assert item.neurons.equal(reference.neurons)
        # An entry that is as large as the last one kept may be kept on one side alone.
        assert _off(item.weight, reference.weight) < 1e-2
    layers = [pair.target.architecture.layers for pair in pairs]
    before = {(item.layer, item.projection): layers[0][item.layer][item.projection].weight().clone() for item in found}
    for views, items in zip(layers, (found, wanted), strict=True):
        fuse(views, items, 0.3)
    for (layer, projection), weight in before.items():
        fused, reference = (views[layer][projection].weight() for views in layers)
        assert not fused.equal(weight)
        assert _off(fused.cpu().double(), reference) < 1e-3
        for views in layers:
            views[layer][projection].write(weight.to(views[layer][projection].weight()))


def test_plans_and_their_fusion(pairs, accelerator):
    there = _apart(pairs[0], accelerator)
    with float64_here():
        here = _apart(pairs[1], CPU)
    for key, layers in here.layers.items():
        torch.testing.assert_close(there.layers[key].cost, layers.cost, rtol=1e-4, atol=1e-5)
    _assert_same_fusion(pairs, (there, here), accelerator)


def test_one_structure_and_its_fusion(pairs, accelerator, tmp_path):
    settings = Shared()
    transports = [
        solve_shared(pair.target.side, pair.source.side, PROJECTIONS, settings, tmp_path / str(number))
        for number, pair in enumerate(pairs)
    ]
    there, here = transports
    assert there.pairs == here.pairs
    alike = [
        float((there.feature_map(layer, key, source).plan.to_dense() - plan.to_dense()).abs().sum())
        / float(plan.to_dense().abs().sum())
        for layer, source in here.pairs.items()
        for (key, _), plan in ((at, found.plan) for at, found in here.feature_maps(layer).items())
    ]
    # Strangers have ties all but broken, which rounding may break otherwise.
    assert sum(alike) / len(alike) < 0.02
    _assert_same_fusion(pairs, (here, here), accelerator)


@pytest.mark.parametrize("objective", ["sft", "distill"])
def test_a_short_adaptation(pairs, tmp_path, monkeypatch, objective):
    trl = pytest.importorskip("trl")
    # A checkpoint in float64 is four gigabytes.
    monkeypatch.setattr(trl.SFTTrainer, "_save_checkpoint", lambda *_: None)
    settings = AdaptationSettings(objective=objective, steps=2, batch_size=2, max_tokens=16, learning_rate=1e-5)
    losses = []
    for number, pair in enumerate(pairs):
        loaded = replace(pair.target.loaded, model=copy.deepcopy(pair.target.loaded.model))
        in_its_own_dtype(loaded.model)
        source = pair.source.loaded
        trained = adapt(
            loaded,
            TEXTS[:4],
            settings,
            seed=0,
            work=tmp_path / str(number),
            source=lambda source=source: nullcontext(source),
        )
        losses.append(torch.tensor([loss for _, loss in trained.loss_curve]))
    # Products of a training are in bfloat16 where the device has it.
    torch.testing.assert_close(losses[0], losses[1], rtol=2e-2, atol=1e-2)
