"""Carrying embeddings, head and norms: by Phi_out what is written to the stream, by Phi_in what reads it.

That a whole task vector arrives exactly is in test_structured.py.
"""

from __future__ import annotations

import copy

import pytest
import torch

from tests.pico import PICO_VOCAB, pico_model
from tmerge.fusion import fuse
from tmerge.fusion.stream import carry_stream
from tmerge.models import EMBEDDING, HEAD, HEAD_NORMS, describe


def _maps(n, m, seed=0):
    """Any Phi_out (n, m) and Phi_in (m, n)."""
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(n, m, generator=generator), torch.rand(m, n, generator=generator)


def _no_heads(name, layer, source_layer):
    return None


def _fine_tuned(model, seed=1):
    other = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return other


def _carried(family, source_family=None, *, vocabulary=PICO_VOCAB, head_map=_no_heads, **options):
    base = pico_model(source_family or family, layers=3, seed=3, **options)
    source, target = _fine_tuned(base), pico_model(family)
    maps = _maps(64, base.config.hidden_size)
    tokens = torch.arange(vocabulary).repeat(2, 1) if vocabulary else None
    found = list(carry_stream(describe(target), describe(source), describe(base), {0: 0, 1: 2}, maps, tokens, head_map))
    return target, source, base, maps, {(item.layer, item.projection): item for item in found}


def test_each_is_carried_by_the_side_that_meets_the_stream():
    target, source, base, (out_map, in_map), found = _carried("gpt_neox", hidden_size=80)
    wanted = {}
    for layer, other in ((0, 0), (1, 2)):
        for name, role in {"input_layernorm": "attention", "post_attention_layernorm": "mlp"}.items():
            new, old = (getattr(model.gpt_neox.layers[other], name) for model in (source, base))
            wanted[layer, f"norm:{role}"] = (
                out_map @ (new.weight - old.weight)[:, None],
                out_map @ (new.bias - old.bias),
            )
    new, old = source.gpt_neox.final_layer_norm, base.gpt_neox.final_layer_norm
    wanted[2, "norm:last"] = (
        out_map @ (new.weight - old.weight)[:, None],
        out_map @ (new.bias - old.bias),
    )
    embeddings = source.get_input_embeddings().weight - base.get_input_embeddings().weight
    heads = source.get_output_embeddings().weight - base.get_output_embeddings().weight
    wanted[2, EMBEDDING], wanted[2, HEAD] = (embeddings @ out_map.T, None), (heads @ in_map, None)
    assert found.keys() == wanted.keys()
    for place, (weight, bias) in wanted.items():
        item = found[place]
        assert item.is_difference and item.neurons.tolist() == list(range(len(item.weight)))
        torch.testing.assert_close(item.weight, weight.detach(), rtol=1e-5, atol=1e-5)
        if bias is None:
            assert item.bias is None
        else:
            torch.testing.assert_close(item.bias, bias.detach(), rtol=1e-5, atol=1e-5)
    # And it is of the shape that the target takes.
    before = target.get_input_embeddings().weight.detach().clone()
    fuse(describe(target).views, list(found.values()), 0.5)
    change = target.get_input_embeddings().weight - before
    torch.testing.assert_close(change, 0.5 * found[2, EMBEDDING].weight, rtol=0, atol=1e-5)


def test_alpha_of_the_stream_is_one_of_its_own():
    target, _, _, _, found = _carried("llama")
    before = {name: values.clone() for name, values in target.state_dict().items()}
    fuse(describe(target).views, list(found.values()), {"q": 1.0, "stream": 0.0})
    assert all(values.equal(before[name]) for name, values in target.state_dict().items())
    fuse(describe(target).views, list(found.values()), {"stream": 1.0})
    changed = {name for name, values in target.state_dict().items() if not values.equal(before[name])}
    assert changed == {name for name in before if "norm" in name or "embed" in name or "lm_head" in name}


@pytest.mark.parametrize("vocabulary", [0, 100, PICO_VOCAB])
def test_tokens_that_are_not_shared_stay(vocabulary):
    target, _, _, _, found = _carried("llama", vocabulary=vocabulary)
    names = {name for _, name in found}
    assert ({EMBEDDING, HEAD} <= names) == (vocabulary > 0)
    before = target.get_input_embeddings().weight.detach().clone()
    fuse(describe(target).views, list(found.values()), 1.0)
    changed = (target.get_input_embeddings().weight != before).any(1)
    assert changed[:vocabulary].all() and not changed[vocabulary:].any()


@pytest.mark.parametrize(
    ("target", "source", "left"),
    [
        ("llama", "llama-tied", set()),
        ("llama-tied", "llama", set()),
        # Norms meet where they do the same, whatever they are called.
        ("gpt2", "llama", set()),
        ("llama", "gpt_neox", set()),
        ("olmo2", "llama", {"norm:o", "norm:down", *HEAD_NORMS}),
        ("llama", "olmo2", {"norm:attention", "norm:mlp"}),
        ("gemma3", "llama", {"norm:o", "norm:down", *HEAD_NORMS}),
        ("gemma", "gemma2", set()),
        ("qwen3", "exaone4", {"norm:attention", "norm:mlp", *HEAD_NORMS}),
        ("llama", "cohere", {"norm:attention", "norm:mlp"}),
        ("openai-gpt", "gpt2", {"norm:ln_1+ln_2/ln_1", "norm:ln_1+ln_2/ln_2"}),
    ],
)
def test_what_the_source_lacks_stays(target, source, left):
    model, _, _, _, found = _carried(target, source)
    names = {name for layer in describe(model).stream for name in layer}
    assert {name for _, name in found} == names - left


def test_nothing_learned_is_nothing_carried():
    base = pico_model("gpt2", layers=3, seed=3)
    models = describe(pico_model("gpt2")), describe(base), describe(base)
    found = list(carry_stream(*models, {0: 0, 1: 1}, _maps(64, 64), torch.arange(PICO_VOCAB).repeat(2, 1), _no_heads))
    assert len(found) == 6
    assert not any(item.weight.any() or (item.bias is not None and item.bias.any()) for item in found)


def test_what_is_known_to_be_unchanged_is_not_carried():
    base = pico_model("llama", layers=3, seed=3)
    models = describe(pico_model("llama")), describe(_fine_tuned(base)), describe(base)
    rest = {0: 0, 1: 2}, _maps(64, 64), torch.arange(PICO_VOCAB).repeat(2, 1), _no_heads
    changed = {
        "model.embed_tokens.weight",
        "model.layers.2.input_layernorm.weight",
        "model.layers.2.mlp.up_proj.weight",
    }
    found = [(item.layer, item.projection) for item in carry_stream(*models, *rest, changed)]
    # Of a head of its own the source learned nothing, whatever its embedding did.
    assert found == [(1, "norm:attention"), (2, EMBEDDING)]
    assert not list(carry_stream(*models, *rest, frozenset()))


def test_a_head_of_the_targets_own_takes_what_a_tied_source_learned():
    target, source, base, (out_map, in_map), found = _carried("llama", "llama-tied")
    assert source.get_output_embeddings().weight is source.get_input_embeddings().weight
    learned = (source.get_input_embeddings().weight - base.get_input_embeddings().weight).detach()
    torch.testing.assert_close(found[2, EMBEDDING].weight, learned @ out_map.T, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found[2, HEAD].weight, learned @ in_map, rtol=1e-5, atol=1e-5)
    # The other way round there is one matrix to write to, and the embedding takes it.
    _, source, base, (out_map, _), found = _carried("llama-tied", "llama")
    learned = (source.get_input_embeddings().weight - base.get_input_embeddings().weight).detach()
    torch.testing.assert_close(found[2, EMBEDDING].weight, learned @ out_map.T, rtol=1e-5, atol=1e-5)
    assert (2, HEAD) not in found


def test_a_trimmed_and_reordered_vocabulary_is_carried_token_by_token():
    base = pico_model("llama", layers=3, seed=3)
    source, target = _fine_tuned(base), pico_model("llama", vocab_size=200)
    out_map, in_map = _maps(64, 64)
    # The last is beyond both matrices, as rows may be that a tokenizer knows and a model does not.
    tokens = torch.tensor([[7, 3, 199, 200], [300, 4, 5, PICO_VOCAB]])
    models = describe(target), describe(source), describe(base)
    items = list(carry_stream(*models, {0: 0, 1: 2}, (out_map, in_map), tokens, _no_heads))
    found = {item.projection: item for item in items}
    before = target.get_input_embeddings().weight.detach().clone()
    learned = (source.get_input_embeddings().weight - base.get_input_embeddings().weight).detach()
    assert found[EMBEDDING].neurons.tolist() == found[HEAD].neurons.tolist() == [7, 3, 199]
    fuse(describe(target).views, items, 1.0)
    change = target.get_input_embeddings().weight.detach() - before
    torch.testing.assert_close(change[[7, 3, 199]], learned[[300, 4, 5]] @ out_map.T, rtol=1e-4, atol=1e-5)
    others = [row for row in range(200) if row not in (7, 3, 199)]
    assert not change[others].any()


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("source_family", ["qwen3", "olmo2", "hunyuan"])
@pytest.mark.parametrize("family", ["qwen3", "olmo2"])
def test_a_norm_of_q_or_k_goes_by_the_map_of_its_outputs(family, source_family, sparse):
    """Against sums over heads, with a head of the target's that has no counterpart."""
    maps, asked = {}, []

    def head_map(name, layer, source_layer):
        asked.append((name, layer, source_layer))
        heads, generator = {"q": 4, "k": 2}[name], torch.Generator().manual_seed(len(asked))
        target_size, source_size = (16 if of == "olmo2" else 12 for of in (family, source_family))
        mapping = torch.randn(heads, target_size, heads * source_size, generator=generator)
        mapping[1] = 0
        maps[name, layer] = mapping
        flat = mapping.flatten(0, 1)
        return flat.to_sparse().coalesce() if sparse else flat

    _, source, base, _, found = _carried(family, source_family, head_map=head_map)
    assert sorted(asked) == [("k", 0, 0), ("k", 1, 2), ("q", 0, 0), ("q", 1, 2)]
    for (name, layer), mapping in maps.items():
        norms = [describe(model).stream[{0: 0, 1: 2}[layer]][f"norm:{name}"] for model in (source, base)]
        learned = (norms[0].weight() - norms[1].weight())[:, 0]
        each = mapping.abs() @ learned.repeat(mapping.shape[2] // len(learned))
        wanted = each.flatten() if family == "olmo2" else each.sum(0) / (len(each) - 1)
        item = found[layer, f"norm:{name}"]
        torch.testing.assert_close(item.weight[:, 0], wanted, rtol=1e-5, atol=1e-6)
        assert item.bias is None


def test_where_q_is_not_carried_its_norm_stays():
    _, _, _, _, found = _carried("qwen3", head_map=lambda name, *_: None if name == "q" else torch.eye(24))
    assert {name for _, name in found} & set(HEAD_NORMS) == {"norm:k"}
