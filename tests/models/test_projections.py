"""The views of every family: what they read and write, and that they are what the model computes with."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.activations import ACT2FN

from tests.pico import PICO_FAMILIES, PICO_RARE, PICO_VOCAB, pico_config, pico_model
from tmerge.models.projections import (
    PROJECTIONS,
    Architecture,
    Projection,
    describe,
    feature_key,
    match,
)

FAMILIES = [*PICO_FAMILIES, *PICO_RARE]
BATCH, SEQ = 2, 9
TOKENS = torch.randint(3, PICO_VOCAB, (BATCH, SEQ), generator=torch.Generator().manual_seed(1))

# Norms over all heads of q at once: there a change of one head's query moves the others too.
JOINT_QUERY_NORM = {"olmo2", "olmo3", "olmoe"}


def run_with_taps(
    model: PreTrainedModel, architecture: Architecture
) -> tuple[Any, dict[tuple[int, str], torch.Tensor]]:
    """The model's output, and (layer, feature key) -> feature."""
    caught: dict[tuple[int, str], torch.Tensor] = {}
    handles = []
    for tap in architecture.taps(PROJECTIONS):

        def hook(module: nn.Module, inputs: tuple, output: torch.Tensor, tap=tap) -> None:
            caught[tap.layer, tap.key] = tap.read(inputs, output, batch=BATCH).clone()

        handles.append(tap.module.register_forward_hook(hook))
    with torch.no_grad():
        output = model(input_ids=TOKENS, attention_mask=torch.ones_like(TOKENS), use_cache=True)
    for handle in handles:
        handle.remove()
    return output, caught


def snapshot(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def changed(model: nn.Module, before: dict[str, torch.Tensor]) -> dict[str, int]:
    """Names of the tensors that differ, and in how many entries."""
    counts = {name: int((tensor != before[name]).sum()) for name, tensor in model.state_dict().items()}
    return {name: count for name, count in counts.items() if count}


def some_views(architecture: Architecture) -> list[Projection]:
    """Each projection once, in the last layer that has it."""
    return list({view.name: view for view in architecture.projections()}.values())


@pytest.mark.parametrize("family", FAMILIES)
def test_writing_a_part_leaves_every_other_byte(family: str) -> None:
    model = pico_model(family)
    before = snapshot(model)
    for view in some_views(describe(model)):
        weight, bias = view.weight().clone(), view.bias()
        bias = None if bias is None else bias.clone()
        assert weight.shape == (view.out_features, view.in_features)
        rows = torch.tensor([view.out_features - 1, 2, view.out_features // 2])
        columns = torch.tensor([5, 0, view.in_features - 1, 7])
        for chosen_rows, chosen_columns in ((rows, None), (None, columns), (rows, columns), (None, None)):
            expected, expected_bias = weight.clone(), bias
            row_index = torch.arange(view.out_features) if chosen_rows is None else chosen_rows
            column_index = torch.arange(view.in_features) if chosen_columns is None else chosen_columns
            new = torch.randn(len(row_index), len(column_index))
            new_bias = torch.randn(len(row_index)) if view.has_bias else None
            expected[row_index[:, None], column_index] = new
            if bias is not None:
                expected_bias = bias.index_copy(0, row_index, new_bias)
            view.write(new, new_bias, rows=chosen_rows, columns=chosen_columns)

            assert torch.equal(view.weight(), expected)
            if bias is not None:
                assert torch.equal(view.bias(), expected_bias)
            wanted = {f"{view.module_name}.weight": new.numel()}
            wanted |= {f"{view.module_name}.bias": len(row_index)} if view.has_bias else {}
            assert changed(model, before) == wanted

            view.write(weight, bias)
            assert not changed(model, before)


@pytest.mark.parametrize("family", FAMILIES)
def test_features_satisfy_y_is_w_x_plus_b(family: str) -> None:
    model = pico_model(family)
    architecture = describe(model)
    _, features = run_with_taps(model, architecture)
    for view in architecture.projections():
        x = features[view.layer, feature_key(view.name, "pre")]
        y = features[view.layer, feature_key(view.name, "post")]
        assert x.shape == (BATCH, SEQ, view.in_features)
        assert y.shape == (BATCH, SEQ, view.out_features)
        assert y.std() > 0
        # Fused modules and Conv1D sum in another order than this; products of 64 to 256 terms of size 1.
        assert_close(nn.functional.linear(x, view.weight(), view.bias()), y, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_taps_are_shared_and_change_nothing(family: str) -> None:
    model = pico_model(family)
    architecture = describe(model)
    taps = architecture.taps(PROJECTIONS)
    keys = [(tap.layer, tap.key) for tap in taps]
    assert len(keys) == len(set(keys))
    for layer, views in enumerate(architecture.layers):
        expected = {feature_key(name, side) for name in views for side in ("pre", "post")}
        assert {key for index, key in keys if index == layer} == expected
    with torch.no_grad():
        plain = model(input_ids=TOKENS, attention_mask=torch.ones_like(TOKENS), use_cache=True).logits
    assert torch.equal(run_with_taps(model, architecture)[0].logits, plain)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_mlp_is_what_its_names_say(family: str) -> None:
    """down.pre = act(gate.post) * up.post, or act(up.post): tells gate from up, and both from their halves."""
    model = pico_model(family)
    architecture = describe(model)
    _, features = run_with_taps(model, architecture)
    layers = [layer for layer in architecture.layers if "down" in layer]
    assert layers or any("experts" in sentence for sentence in architecture.left_alone)
    for layer in layers:
        down = layer["down"]
        holder = model.get_submodule(down.module_name.rpartition(".")[0])
        names = ("act_fn", "activation_fn", "activation", "act", "gelu_impl")
        found = [getattr(holder, name) for name in names if hasattr(holder, name)]
        act = found[0] if found else ACT2FN["silu"]  # lfm2 calls silu as a function
        up = features[down.layer, "up.post"]
        expected = act(features[down.layer, "gate.post"]) * up if "gate" in layer else act(up)
        assert_close(features[down.layer, "down.pre"], expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_each_kv_head_feeds_its_own_query_heads(family: str) -> None:
    """Tells v from q and k, and the order of heads: o.pre of query head h reads kv head h // (heads / kv_heads)."""
    model = pico_model(family)
    architecture = describe(model)
    layer = next(index for index, views in enumerate(architecture.layers) if "v" in views)
    heads, views = architecture.attention[layer], architecture.layers[layer]
    assert heads is not None
    assert (heads.heads * heads.head_dim, heads.kv_heads * heads.head_dim) == (
        views["q"].out_features,
        views["v"].out_features,
    )
    before = run_with_taps(model, architecture)[1][layer, "o.pre"].unflatten(-1, (heads.heads, heads.head_dim))
    group = heads.heads // heads.kv_heads
    for kv_head in range(heads.kv_heads):
        weight = views["v"].weight().clone()
        rows = torch.arange(kv_head * heads.head_dim, (kv_head + 1) * heads.head_dim)
        views["v"].write(torch.randn(heads.head_dim, views["v"].in_features), rows=rows)
        after = run_with_taps(model, architecture)[1][layer, "o.pre"].unflatten(-1, (heads.heads, heads.head_dim))
        moved = (after - before).abs().amax(dim=(0, 1, 3)) > 1e-4
        assert moved.tolist() == [head // group == kv_head for head in range(heads.heads)]
        views["v"].write(weight)


@pytest.mark.parametrize("family", [family for family in FAMILIES if family not in JOINT_QUERY_NORM])
def test_each_query_head_feeds_its_own_output(family: str) -> None:
    model = pico_model(family)
    architecture = describe(model)
    layer = next(index for index, views in enumerate(architecture.layers) if "q" in views)
    heads, query = architecture.attention[layer], architecture.layers[layer]["q"]
    assert heads is not None
    before = run_with_taps(model, architecture)[1][layer, "o.pre"].unflatten(-1, (heads.heads, heads.head_dim))
    for head in range(heads.heads):
        weight = query.weight().clone()
        rows = torch.arange(head * heads.head_dim, (head + 1) * heads.head_dim)
        query.write(torch.randn(heads.head_dim, query.in_features), rows=rows)
        after = run_with_taps(model, architecture)[1][layer, "o.pre"].unflatten(-1, (heads.heads, heads.head_dim))
        moved = (after - before).abs().amax(dim=(0, 1, 3)) > 1e-4
        assert moved.tolist() == [index == head for index in range(heads.heads)]
        query.write(weight)


def _has_key_norm(model: PreTrainedModel, view: Projection) -> bool:
    attention = model.get_submodule(view.module_name.rpartition(".")[0])
    return any(hasattr(attention, name) for name in ("k_norm", "k_layernorm", "key_layernorm", "qk_norm"))


@pytest.mark.parametrize("family", FAMILIES)
def test_keys_and_values_are_what_the_cache_holds(family: str) -> None:
    """Values as they are; keys rotated in pairs, whose lengths stay: tells k from q, and which dimensions pair up."""
    model = pico_model(family)
    architecture = describe(model)
    output, features = run_with_taps(model, architecture)
    cache = getattr(output, "past_key_values", None)
    checked = 0
    for index, views in enumerate(architecture.layers):
        if cache is None or "v" not in views or getattr(cache.layers[index], "values", None) is None:
            continue
        heads = architecture.attention[index]
        split = (heads.kv_heads, heads.head_dim)
        keys, values = cache.layers[index].keys.transpose(1, 2), cache.layers[index].values.transpose(1, 2)
        if keys.shape[2] == heads.heads and family == "falcon-new":
            # It repeats each kv head for its query heads before it stores them.
            keys, values = (part[:, :, :: heads.heads // heads.kv_heads] for part in (keys, values))
        if not hasattr(model.get_submodule(views["v"].module_name.rpartition(".")[0]), "v_norm"):
            assert torch.equal(values, features[index, "v.post"].unflatten(-1, split))
        checked += 1
        assert heads.rotary_dim is not None or family in PICO_RARE
        if _has_key_norm(model, views["k"]) or heads.rotary_dim is None:
            continue
        plain, rotary = features[index, "k.post"].unflatten(-1, split), heads.rotary_dim
        assert_close(keys[..., rotary:], plain[..., rotary:])
        pairs = {
            "halves": torch.arange(rotary).view(2, -1).T,
            "neighbours": torch.arange(rotary).view(-1, 2),
        }
        lengths = {kind: (keys[..., pair].norm(dim=-1), plain[..., pair].norm(dim=-1)) for kind, pair in pairs.items()}
        if rotary:
            assert_close(*lengths.pop(heads.rotary_pairs))
            (other,) = lengths.values()
            assert not torch.allclose(*other, rtol=1e-2)
    # Every family keeps a cache but GPT-1; RecurrentGemma keeps its own inside its layers.
    assert checked or family in ("openai-gpt", "recurrent_gemma")


def _rows_by_hand(family: str, heads: int, kv_heads: int, size: int) -> dict[str, list[int]]:
    """Rows of the fused module in the order of each view, spelt out head by head."""
    rows: dict[str, list[int]] = {"q": [], "k": [], "v": []}
    if family in ("phi3", "gpt2", "mpt"):
        for head in range(heads):
            rows["q"] += [head * size + i for i in range(size)]
        for head in range(kv_heads):
            rows["k"] += [heads * size + head * size + i for i in range(size)]
            rows["v"] += [(heads + kv_heads) * size + head * size + i for i in range(size)]
        return rows
    at = 0
    for _ in range(kv_heads):
        for name, count in (("q", heads // kv_heads), ("k", 1), ("v", 1)):
            rows[name] += range(at, at + count * size)
            at += count * size
    return rows


@pytest.mark.parametrize(
    "family", ["phi3", "gpt2", "mpt", "gpt_neox", "bloom", "falcon", "falcon-mq", "falcon-new", "gpt_bigcode-mha"]
)
@pytest.mark.parametrize("name", ["q", "k", "v"])
def test_writing_a_fused_part_equals_writing_it_by_hand(family: str, name: str) -> None:
    model, by_hand = pico_model(family), pico_model(family)
    architecture = describe(model)
    view = architecture.layers[1][name]
    assert view.is_fused
    new = torch.randn(view.out_features, view.in_features)
    rows = _rows_by_hand(family, architecture.heads, architecture.kv_heads, architecture.head_dim)[name]
    weight = by_hand.get_submodule(view.module_name).weight
    with torch.no_grad():
        if family == "gpt2":
            weight[:, rows] = new.T
        else:
            weight[rows] = new
    before = model(TOKENS).logits
    view.write(new)
    assert torch.equal(model(TOKENS).logits, by_hand(TOKENS).logits)
    assert not torch.allclose(model(TOKENS).logits, before, atol=1e-3)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_on_the_meta_device_is_described_alike(family: str) -> None:
    with torch.device("meta"):
        empty = describe(AutoModelForCausalLM.from_config(pico_config(family)))
    real = describe(pico_model(family))

    def facts(architecture: Architecture) -> list[dict[str, tuple]]:
        return [
            {name: (v.module_name, v.out_features, v.in_features, v.has_bias, v.rows) for name, v in layer.items()}
            for layer in architecture.layers
        ]

    assert facts(empty) == facts(real)
    assert (empty.attention, empty.left_alone, empty.model_type) == (real.attention, real.left_alone, real.model_type)
    assert [(t.layer, t.key, t.features) for t in empty.taps(PROJECTIONS)] == [
        (t.layer, t.key, t.features) for t in real.taps(PROJECTIONS)
    ]
    assert all(view.weight().is_meta for view in empty.projections())


@pytest.mark.parametrize(("dtype", "family"), [(torch.bfloat16, "gpt_neox"), (torch.float16, "gpt2")])
def test_a_write_rounds_to_the_stored_dtype(dtype: torch.dtype, family: str) -> None:
    model = pico_model(family).to(dtype)
    view = describe(model).layers[0]["k"]
    new = torch.randn(view.out_features, view.in_features)
    view.write(new)
    assert view.weight().dtype == dtype
    assert torch.equal(view.weight(), new.to(dtype))


def test_a_mask_names_the_rows_that_an_index_does() -> None:
    by_index, by_mask = (describe(pico_model("falcon-new")).layers[0]["q"] for _ in range(2))
    mask = torch.zeros(by_mask.out_features, dtype=torch.bool)
    mask[[3, 40]] = True
    new = torch.randn(2, by_mask.in_features)
    by_index.write(new, rows=torch.tensor([3, 40]))
    by_mask.write(new, rows=mask)
    assert torch.equal(by_index.weight(), by_mask.weight())


@pytest.mark.parametrize(
    ("call", "words"),
    [
        ({"weight": torch.zeros(3, 3)}, r"shape \(3, 3\), expected \(64, 64\)"),
        ({"weight": torch.zeros(2, 64), "rows": torch.tensor([4, 4])}, "given twice"),
        ({"weight": torch.zeros(2, 64), "rows": torch.tensor([4, 64])}, r"4\.\.64 are not all in 0\.\.63"),
        ({"weight": torch.zeros(1, 64), "rows": torch.ones(3, dtype=torch.bool)}, "mask"),
        ({"weight": torch.zeros(64, 64), "bias": torch.zeros(63)}, "bias of q"),
    ],
)
def test_a_write_that_does_not_fit_changes_nothing(call: dict[str, torch.Tensor], words: str) -> None:
    model = pico_model("gpt_neox")
    before = snapshot(model)
    with pytest.raises(ValueError, match=words):
        describe(model).layers[0]["q"].write(**call)
    assert not changed(model, before)


def test_a_bias_that_is_not_there_cannot_be_written() -> None:
    with pytest.raises(ValueError, match="has no bias"):
        describe(pico_model("llama")).layers[0]["q"].write(bias=torch.zeros(48))


def test_flattened_tokens_are_never_taken_for_a_batch() -> None:
    tap = next(tap for tap in describe(pico_model("opt")).taps(["up"]) if tap.side == "pre")
    flat = torch.randn(BATCH * SEQ, 64)
    with pytest.raises(ValueError, match="give `batch`"):
        tap.read((flat,), flat)
    assert torch.equal(tap.read((flat,), flat, batch=BATCH), flat.view(BATCH, SEQ, 64))


def test_match_names_what_one_side_lacks() -> None:
    llama, gpt2, mixtral = (describe(pico_model(family)) for family in ("llama", "gpt2", "mixtral"))
    assert match(llama, pico_architecture := llama, PROJECTIONS) == (list(PROJECTIONS), {})
    assert pico_architecture.names == list(PROJECTIONS)
    matched, skipped = match(llama, gpt2, ["down", "gate", "q"])
    assert matched == ["down", "q"]
    assert skipped == {"gate": "the source (gpt2) has no gate: its MLP is not gated"}
    matched, skipped = match(mixtral, gpt2, PROJECTIONS)
    assert matched == ["q", "k", "v", "o"]
    assert set(skipped) == {"gate", "up", "down"}
    assert "target (mixtral)" in skipped["gate"] and "source (gpt2)" in skipped["gate"]
    # One dense layer is enough to have an MLP.
    assert match(describe(pico_model("qwen3_moe-partly")), llama, ["gate", "up"])[0] == ["gate", "up"]
    with pytest.raises(ValueError, match="'qkv' is not a projection"):
        match(llama, llama, ["qkv"])
