"""What scores are made of, measured in each family's own forward: norms of q and k, and what products are scaled by."""

from __future__ import annotations

import pytest
import torch

from tests.pico import PICO_FAMILIES, PICO_RARE, pico_model
from tmerge.models import describe, feature_key

# What their scores go through afterwards.
_PLAIN = {"gemma2": {"attn_logit_softcapping": None}}
# Norms that stand behind the rotation.
_ROTATED_FIRST = {"hunyuan", "llama4", "nanochat"}
FAMILIES = sorted(PICO_FAMILIES | PICO_RARE)


def _layer_of(layout):
    return next(layer for layer, views in enumerate(layout.layers) if {"q", "k"} <= views.keys())


def _outputs(model, layout, layer, ids):
    """(S, n) of q and k, behind their norms where those are caught; and the arguments of every softmax."""
    taps = {tap.key: tap for tap in layout.taps(["q", "k"]) if tap.layer == layer and tap.key.endswith("post")}
    taps |= {tap.key: tap for tap in layout.norm_taps[layer].values() if tap.key != feature_key("v", "post")}
    caught, hooks = {}, []
    for key, tap in taps.items():

        def hear(_module, inputs, output, key=key, tap=tap):
            caught[key] = tap.read(inputs, output, len(ids))[0].clone()

        hooks.append(tap.module.register_forward_hook(hear))
    with torch.no_grad():
        model(ids, use_cache=False)
    for hook in hooks:
        hook.remove()
    return caught["q.post"], caught["k.post"]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_score_is_the_scaled_product_of_what_is_caught(family, monkeypatch):
    """Of the first token with itself: no rotation, no distance."""
    model = pico_model(family, **_PLAIN.get(family, {}))
    layout = describe(model)
    layer = _layer_of(layout)
    heads, seen = layout.attention[layer], []
    for owner in (torch, torch.nn.functional, torch.Tensor):

        def watched(values, *args, own=owner.softmax, **named):
            seen.append(values.detach().clone())
            return own(values, *args, **named)

        monkeypatch.setattr(owner, "softmax", watched)
    q, k = _outputs(model, layout, layer, torch.tensor([[5]]))
    q, k = q.view(heads.heads, -1), k.view(heads.kv_heads, -1).repeat_interleave(heads.heads // heads.kv_heads, 0)
    wanted = heads.scaling * (q * k).sum(-1)
    scores = [values.reshape(heads.heads, 1) for values in seen if values.numel() == heads.heads]
    for values in (values.reshape(-1, 2) for values in seen if values.numel() == 2 * heads.heads):
        # Beside a sink (gpt_oss), and less the larger of the two.
        sinks = next(sink for name, sink in model.named_parameters() if name.endswith(f"{layer}.self_attn.sinks"))
        scores.append((values[:, :1] - values[:, 1:]) + sinks.detach()[:, None])
    scores = [score[:, 0] for score in scores]
    if heads.normed and family in _ROTATED_FIRST:
        assert layout.norm_taps[layer] == {}
        assert not any(torch.allclose(score, wanted, rtol=1e-4, atol=1e-5) for score in scores)
        return
    assert heads.normed <= layout.norm_taps[layer].keys() | {"v"}
    assert any(torch.allclose(score, wanted, rtol=1e-4, atol=1e-5) for score in scores), (wanted, scores)


@pytest.mark.parametrize("family", [family for family in FAMILIES if family not in ("qwen3_next", "qwen3_5", "lfm2")])
@pytest.mark.parametrize("which", [0, 1])
def test_positions_and_heads_are_told_apart(family, which):
    """As many positions as heads: one more of them changes nothing of the first."""
    model = pico_model(family)
    layout = describe(model)
    layer = _layer_of(layout)
    heads = layout.attention[layer]
    count = (heads.heads, heads.kv_heads)[which]
    ids = torch.randint(3, 300, (1, count + 1), generator=torch.Generator().manual_seed(0))
    longer, shorter = (_outputs(model, layout, layer, part)[which] for part in (ids, ids[:, :count]))
    torch.testing.assert_close(longer[:count], shorter, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("family", ["qwen3", "gemma3", "stablelm-norms", "cohere", "olmo2"])
def test_the_norm_of_each_head_is_that_of_its_own_outputs(family, kv_heads):
    model = pico_model(family, num_key_value_heads=kv_heads)
    layout = describe(model)
    ids = torch.randint(3, 300, (1, 4), generator=torch.Generator().manual_seed(0))
    raw = {}
    hook = layout.layers[0]["k"].module.register_forward_hook(lambda _m, _i, output: raw.update(k=output[0].clone()))
    _, normed = _outputs(model, layout, 0, ids)
    hook.remove()
    tap = layout.norm_taps[0]["k"]
    heads = raw["k"].unflatten(-1, (kv_heads, -1))
    with torch.no_grad():
        if family == "olmo2":
            wanted = tap.module(raw["k"])
        elif family == "stablelm-norms":
            wanted = torch.stack([norm(heads[:, head]) for head, norm in enumerate(tap.module.norms)], 1).flatten(1)
        else:
            wanted = tap.module(heads[None])[0].flatten(1)
    torch.testing.assert_close(normed, wanted)
