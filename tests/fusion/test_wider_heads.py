"""Between heads of different width: scores keep their meaning."""

from __future__ import annotations

import copy

import torch

from tests.fusion.test_structured import _carry, _structure
from tests.pico import pico_model
from tests.planted import planted_case, pooled_features, relative_errors, side_of
from tmerge.fusion import fuse
from tmerge.models import describe


def _with_wider_heads(model):
    """A llama that computes the same with heads twice as wide: every rotary pair and every dimension of v twice."""
    config = model.config
    wide = pico_model(
        "llama",
        layers=config.num_hidden_layers,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        head_dim=2 * config.head_dim,
    ).to(model.dtype)
    state = {name: values for name, values in model.state_dict().items() if "self_attn" not in name}
    wide.load_state_dict(state, strict=False)
    half = config.head_dim // 2
    pairs = torch.arange(half).repeat_interleave(2)
    inside, twice = torch.cat([pairs, pairs + half]), torch.arange(config.head_dim).repeat_interleave(2)
    for layer, views in enumerate(describe(model).layers):
        for name in ("q", "k", "v", "o"):
            weight = views[name].weight()
            heads = (weight.shape[1] if name == "o" else weight.shape[0]) // config.head_dim
            within = inside if name in ("q", "k") else twice
            index = torch.cat([head * config.head_dim + within for head in range(heads)])
            # Scores have twice as many terms, each of which the wider head makes smaller by the root of two.
            made = weight[:, index] / 2 if name == "o" else weight[index] * (1.0 if name == "v" else 2**-0.25)
            describe(wide).layers[layer][name].write(made)
    rotary = wide.model.rotary_emb
    rotary.inv_freq = model.model.rotary_emb.inv_freq.repeat_interleave(2)
    return wide.eval()


def test_scores_keep_their_meaning_between_heads_of_another_width():
    case = planted_case("llama")
    source = _with_wider_heads(case.original)
    tokens = case.tokens[:50]
    with torch.no_grad():
        torch.testing.assert_close(source(tokens).logits, case.original(tokens).logits, rtol=0, atol=2e-5)
    features = case.target_features, pooled_features(source, case.tokens)
    structure = _structure(side_of(case.target, features[0]), side_of(source, features[1]), case.keys)
    carried, _ = _carry(case.target, source, structure, features, {"alpha": 1.0})
    merged = copy.deepcopy(case.target)
    fuse(describe(merged).layers, carried.transported, 1.0)
    for name, error in relative_errors(merged, case.original).items():
        assert error < 1e-6, f"{name}: {error:.1e}"
