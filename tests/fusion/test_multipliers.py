"""Factors around projections: models that compute the same with others carry and reconstruct the same."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch

from tests.fusion.test_structured import _carry, _structure
from tests.pico import pico_model
from tests.planted import pooled_features, side_of
from tests.stages.test_reconstruct import recipe_for
from tests.stages.test_task_vector import _shaken, save_all
from tmerge.fusion import StoredNeurons
from tmerge.models import HEAD, describe
from tmerge.models.multipliers import multipliers_of
from tmerge.stages.merge import advance

TOKENS = torch.randint(3, 300, (60, 10), generator=torch.Generator().manual_seed(2))
FACTORS = {"attention_multiplier": 0.1, "embedding_multiplier": 3.0, "residual_multiplier": 0.22, "logits_scaling": 4.0}


def _granite(**factors):
    return pico_model("granite", tie_word_embeddings=False, **factors)


def _with_factors(model, **factors):
    """The same function by other factors: its weights make up for them."""
    other, config = _granite(**factors).to(next(model.parameters()).dtype), model.config
    other.load_state_dict(model.state_dict())
    now = other.config
    with torch.no_grad():
        other.model.embed_tokens.weight *= config.embedding_multiplier / now.embedding_multiplier
        other.lm_head.weight *= now.logits_scaling / config.logits_scaling
        for layer in other.model.layers:
            for part in (layer.self_attn.q_proj, layer.self_attn.k_proj):
                part.weight *= (config.attention_multiplier / now.attention_multiplier) ** 0.5
            for part in (layer.self_attn.o_proj, layer.mlp.down_proj):
                part.weight *= config.residual_multiplier / now.residual_multiplier
    with torch.no_grad():
        torch.testing.assert_close(other(TOKENS[:4]).logits, model(TOKENS[:4]).logits, rtol=1e-4, atol=1e-5)
    return other


def _carried(target, base, source, **fusion):
    features = tuple(pooled_features(model, TOKENS) for model in (target, base))
    keys = list(dict.fromkeys(key for _, key in features[0]))
    structure = _structure(side_of(target, features[0]), side_of(base, features[1]), keys)
    options = {}
    if fusion.get("what") == "task-vector":
        options = {"source_base": base, "vocabulary": torch.arange(384).repeat(2, 1)}
    carried, _ = _carry(target, source, structure, features, fusion, **options)
    return {(item.layer, item.projection): item.weight for item in carried.transported}


@pytest.mark.parametrize("units", ["none", "layer", "feature"])
@pytest.mark.parametrize("what", ["weights", "task-vector"])
def test_what_is_carried_is_the_same(what, units):
    target = _granite()
    base = _shaken(target, 0.01, 1)
    source = _shaken(base, 0.1, 2)
    fusion = {"what": what, "units": units} | ({"stream": True} if what == "task-vector" else {})
    plain = _carried(target, base, source, **fusion)
    scaled = _carried(target, _with_factors(base, **FACTORS), _with_factors(source, **FACTORS), **fusion)
    assert plain.keys() == scaled.keys() and ((2, HEAD) in plain) == (what == "task-vector")
    for place, weight in plain.items():
        torch.testing.assert_close(
            scaled[place], weight, rtol=1e-3, atol=1e-5, msg=lambda text, at=place: f"{at}: {text}"
        )


def test_to_the_letter_nothing_is_scaled():
    target = _granite()
    source = _shaken(target, 0.1, 2)
    scaled = _with_factors(source, **FACTORS)
    one, other = (_carried(target, model, model, scale="literal")[0, "o"] for model in (source, scaled))
    torch.testing.assert_close(other * FACTORS["residual_multiplier"], one, rtol=1e-3, atol=1e-6)


@pytest.mark.slow
def test_what_is_reconstructed_is_the_same(tmp_path):
    target = _granite()
    source = _shaken(target, 0.15, 3)
    found = {}
    for name, model in (("plain", source), ("scaled", _with_factors(source, **FACTORS))):
        folder = save_all(tmp_path / name, target=target, source=model)
        recipe = recipe_for(folder, transport={"weights": False}, evaluation={"controls": []}, fusion={"ridge": 0.1})
        advance(recipe, tmp_path / name / "fused", until="reconstruct")
        found[name] = StoredNeurons(tmp_path / name / "fused/tmerge/cache/transported")
    for one, other in zip(found["plain"], found["scaled"], strict=True):
        torch.testing.assert_close(one.weight, other.weight, rtol=1e-2, atol=2e-4)


def _assert_made_up_for(model, other):
    """Factors of the one, taken into the weights of the other, which has the same and no factors."""
    own, now = multipliers_of(model.config), multipliers_of(other.config)
    with torch.no_grad():
        for view in describe(other).projections():
            view.write(view.weight() * now.weight_ratio(view.name, own))
        other.lm_head.weight *= now.weight_ratio("head", own)
        torch.testing.assert_close(other(TOKENS[:3]).logits, model(TOKENS[:3]).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("family", "keys"),
    [
        ("granite", {"residual_multiplier": 0.3, "logits_scaling": 5.0}),
        ("cohere", {"logit_scale": 0.3}),
        ("cohere2", {"logit_scale": 0.3}),
        (
            "falcon_h1",
            {
                "attention_in_multiplier": 0.7,
                "attention_out_multiplier": 0.6,
                "key_multiplier": 0.3,
                "lm_head_multiplier": 0.4,
                "mlp_multipliers": [0.8, 0.3],
            },
        ),
    ],
)
def test_weights_that_make_up_for_the_factors_compute_the_same(family, keys):
    """Each family's own forward, against its factors taken into its weights."""
    model = pico_model(family, tie_word_embeddings=False, **keys)
    neutral = {key: [1.0, 1.0] if isinstance(value, list) else 1.0 for key, value in keys.items()}
    other = pico_model(family, tie_word_embeddings=False, **neutral)
    state = copy.deepcopy(model.state_dict())
    other.load_state_dict({name: state[name] for name in other.state_dict()})
    _assert_made_up_for(model, other)


@pytest.mark.parametrize("family", ["granite_swa", "hyperclovax"])
def test_families_that_are_granite_but_for_a_few_things(family):
    """Their logits are divided by, or multiplied with, what the table says."""
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2, "num_key_value_heads": 2}
    factors = {"residual_multiplier": 0.3, "logits_scaling": 5.0}
    sizes |= {"use_post_norm": False} if family == "hyperclovax" else {}
    whole = {**sizes, "vocab_size": 384, "num_hidden_layers": 2, "pad_token_id": 2, "tie_word_embeddings": False}
    torch.manual_seed(0)
    model, other = (
        AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **whole, **part)).eval()
        for part in (factors, dict.fromkeys(factors, 1.0))
    )
    other.load_state_dict(model.state_dict())
    _assert_made_up_for(model, other)


def test_of_a_model_without_factors_there_are_none():
    assert multipliers_of(SimpleNamespace(model_type="llama")).weight_ratio("o", multipliers_of(_granite().config)) == 1
