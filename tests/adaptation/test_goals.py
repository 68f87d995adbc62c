"""Transport as an objective: the goals on a planted source, and the distance going down in training."""

import pytest
import torch

from tests.adaptation.test_training import settings
from tests.evaluation.test_choose import loaded
from tests.pico import save_pico
from tests.stages.test_merge import recipe_for
from tmerge.adaptation import adapt, feature_goals
from tmerge.adaptation.goals import FeatureWatch
from tmerge.calibration import FeatureStore, TextSet
from tmerge.errors import AdaptationError
from tmerge.models import describe, load_model
from tmerge.stages.merge import merge
from tmerge.transport import TransportRecord

pytest.importorskip("trl")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("goals")
    save_pico("llama", folder / "target", layers=2)
    save_pico("qwen2", folder / "source", layers=2, seed=1, hidden_size=48, intermediate_size=80)
    merge(recipe_for(folder), folder / "fused")
    work = folder / "fused" / "tmerge"
    record = TransportRecord.load(work / "transport.safetensors")
    stores = [FeatureStore(work / "cache" / "features" / role) for role in ("target", "source")]
    return folder, record, stores, TextSet.load(work / "cache" / "calibration.json").texts


def test_goals_have_the_targets_mean_and_deviation(run):
    _, record, (target, source), texts = run
    goals = feature_goals(record, target, source)
    assert set(goals.projections) == set("qkvo")
    for (layer, key), goal in goals.goals.items():
        own = target.get(layer, key)
        assert goal.shape == own.shape == (len(texts), own.shape[1])
        torch.testing.assert_close(goal.mean(0), own.mean(0), atol=1e-4, rtol=1e-3)
        torch.testing.assert_close(goal.std(0), own.std(0), atol=1e-4, rtol=1e-2)


def test_a_goal_is_the_barycentre_of_the_source(run):
    """One row by hand, in float64."""
    _, record, (target, source), _ = run
    goals, key, layer, neuron = feature_goals(record, target, source), "v.post", 1, 3
    pairs, plans = record.pairs(key), record.plans(key)
    total = 0.0
    weights = record.tensors["kept.v.weights"][layer].double()
    for column, weight in zip(record.tensors["kept.v.layers"][layer].tolist(), weights / weights.sum(), strict=True):
        row = plans.dense(pairs.index((layer, column)))[neuron].double()
        features = source.get(column, key).double()
        standard = (features - features.mean(0)) / features.std(0, unbiased=False)
        total = total + weight * (standard @ (row / row.sum()))
    own = target.get(layer, key)[:, neuron].double()
    expected = own.mean() + own.std(unbiased=False) * (total - total.mean()) / total.std(unbiased=False)
    torch.testing.assert_close(goals.goals[layer, key][:, neuron].double(), expected, atol=1e-4, rtol=1e-3)


def distance(model, goals, texts):
    one = loaded(model)
    watch = FeatureWatch(describe(model), goals)
    total = 0.0
    with watch.watching(), torch.no_grad():
        for place, text in enumerate(texts):
            ids = torch.tensor([one.tokenizer(text)["input_ids"][:40]])
            model(input_ids=ids)
            total += float(watch.distance([place], torch.ones_like(ids)))
    return total / len(texts)


def test_training_draws_the_features_to_their_goals(run, tmp_path):
    folder, record, (target, source), texts = run
    goals = feature_goals(record, target, source)
    far = distance(load_model(str(folder / "target")).model, goals, texts)
    results = {}
    for weight in (0.0, 2.0):
        model = load_model(str(folder / "target"), dtype="float32")
        words = settings(transport_weight=weight, steps=20)
        adapt(model, texts, words, seed=0, work=tmp_path / str(weight), goals=goals)
        results[weight] = distance(model.model, goals, texts)
    assert results[2.0] < 0.9 * far and results[2.0] < 0.9 * results[0.0]


@pytest.mark.parametrize("words", [{"lora_rank": 2}, {"gradient_checkpointing": True}])
def test_what_cannot_be_had_together(run, tmp_path, words):
    folder, record, stores, texts = run
    model = load_model(str(folder / "target"), dtype="float32")
    with pytest.raises(AdaptationError, match=next(iter(words))):
        adapt(
            model,
            texts,
            settings(transport_weight=1.0, **words),
            seed=0,
            work=tmp_path / "w",
            goals=feature_goals(record, *stores),
        )
