"""What a task vector changes beside the projections: which modules are taken, and that writing changes them."""

from __future__ import annotations

import pytest
import torch

from tests.pico import PICO_FAMILIES, PICO_VOCAB, pico_model
from tmerge.models import EMBEDDING, HEAD, HEAD_NORMS, PROJECTIONS, STREAM, describe, group_of

# Family -> norms of a block, what lies outside the blocks, and their modules' names.
_TAKEN = {
    "llama": (
        ["norm:attention", "norm:mlp"],
        {EMBEDDING: "model.embed_tokens", HEAD: "lm_head", "norm:last": "model.norm"},
    ),
    "llama-tied": (
        ["norm:attention", "norm:mlp"],
        {EMBEDDING: "model.embed_tokens", "norm:last": "model.norm"},
    ),
    # Its q_norm is as wide as the stream, and lies on none of its neurons.
    "olmo2": (
        ["norm:o", "norm:down", *HEAD_NORMS],
        {EMBEDDING: "model.embed_tokens", HEAD: "lm_head", "norm:last": "model.norm"},
    ),
    "gemma3": (
        [
            "norm:attention",
            "norm:o",
            "norm:mlp",
            "norm:down",
            *HEAD_NORMS,
        ],
        {EMBEDDING: "model.embed_tokens", "norm:last": "model.norm"},
    ),
    # Positions are no tokens.
    "gpt2": (["norm:attention", "norm:mlp"], {EMBEDDING: "transformer.wte", "norm:last": "transformer.ln_f"}),
    # Half as wide as its stream are its embeddings, which a linear layer brings to the stream's width.
    "opt": (["norm:attention", "norm:mlp"], {}),
    "gpt_neox": (
        ["norm:attention", "norm:mlp"],
        {EMBEDDING: "gpt_neox.embed_in", HEAD: None, "norm:last": "gpt_neox.final_layer_norm"},
    ),
    # No weights at all in its norms.
    "olmo": ([], {EMBEDDING: "model.embed_tokens", HEAD: "lm_head"}),
}
_WIDTH = 64


@pytest.mark.parametrize("family", _TAKEN)
def test_what_is_taken(family):
    model = pico_model(family, layers=3)
    stream = describe(model).stream
    norms, outside = _TAKEN[family]
    assert len(stream) == 4
    for layer in stream[:-1]:
        assert list(layer) == norms
    if family == "opt":
        # Its last norm is a block's namesake.
        assert not {EMBEDDING, HEAD} & set(stream[-1]) and len(stream[-1]) == 1
        return
    assert set(stream[-1]) == set(outside)
    modules = dict(model.named_modules())
    for name, module in outside.items():
        view = stream[-1][name]
        # The module of a head is named differently from version to version.
        assert view.module is (model.get_output_embeddings() if module is None else modules[module])
        shape = (PICO_VOCAB, _WIDTH) if name in (EMBEDDING, HEAD) else (_WIDTH, 1)
        assert view.weight().shape == shape == (view.out_features, view.in_features)


@pytest.mark.parametrize(
    ("family", "sizes"),
    [
        ("qwen3", [12, 12]),  # a gain for each dimension of a head, whichever head it is
        ("hunyuan", [12, 12]),
        ("olmo2", [64, 32]),  # one for each output, of 4 heads and of 2
        ("stablelm-norms", []),  # a norm for each head
        ("cohere", []),  # a matrix of them
        ("llama", []),
    ],
)
def test_the_norms_of_q_and_k_are_known_by_whose_they_are(family, sizes):
    first = describe(pico_model(family)).stream[0]
    norms = [first[name] for name in HEAD_NORMS if name in first]
    assert [view.out_features for view in norms] == sizes
    for view, letter in zip(norms, "qk", strict=False):
        assert view.module_name.rpartition(".")[2].startswith(letter)


@pytest.mark.parametrize("family", PICO_FAMILIES)
def test_views_name_all_that_can_be_fused_once(family):
    """Together with the projections no parameter is taken twice, and what is left has no neuron of the stream."""
    model = pico_model(family)
    architecture = describe(model)
    views = architecture.views
    assert len(views) == architecture.num_layers + 1
    assert all(view.layer == layer and view.name == name for layer, of in enumerate(views) for name, view in of.items())
    assert not any(set(of) & set(PROJECTIONS) for of in architecture.stream)
    weights = [id(view.module.weight) for of in architecture.stream for view in of.values()]
    assert len(weights) == len(set(weights))
    taken = set(weights) | {id(view.module.weight) for view in architecture.projections()}
    for name, parameter in model.named_parameters():
        if parameter.shape == (PICO_VOCAB, _WIDTH):
            assert id(parameter) in taken, name
    assert any(architecture.stream)


@pytest.mark.parametrize("family", ["llama", "llama-tied", "olmo2", "gpt2", "gpt_neox", "opt", "gemma3"])
def test_writing_changes_the_module_and_nothing_else(family):
    model = pico_model(family)
    for of in describe(model).stream:
        for view in of.values():
            before = {name: values.clone() for name, values in model.state_dict().items()}
            rows = torch.tensor([5, 2])
            new = torch.randn(2, view.in_features)
            bias = torch.randn(2) if view.has_bias else None
            view.write(new, bias=bias, rows=rows)
            assert view.weight()[rows].equal(new)
            stored = view.module.weight
            assert stored[rows].reshape(2, -1).equal(new)
            if bias is not None:
                assert view.module.bias[rows].equal(bias)
            tied = [
                name
                for name, values in model.state_dict().items()
                if values.data_ptr() in {stored.data_ptr(), *([view.module.bias.data_ptr()] if view.has_bias else [])}
            ]
            for name, values in model.state_dict().items():
                changed = (values != before[name]).reshape(values.shape[0] if values.dim() else 1, -1).any(1)
                assert changed.nonzero().flatten().tolist() == ([2, 5] if name in tied else []), name


def test_a_tied_head_is_the_embedding():
    model = pico_model("llama-tied")
    stream = describe(model).stream[-1]
    assert HEAD not in stream
    stream[EMBEDDING].write(torch.zeros(PICO_VOCAB, _WIDTH))
    assert not model.get_output_embeddings().weight.any()


def test_a_base_model_has_no_head():
    stream = describe(pico_model("llama").model).stream[-1]
    assert set(stream) == {EMBEDDING, "norm:last"}


def test_what_is_held_in_more_digits_is_rounded_first():
    model = pico_model("llama")
    view = describe(model, rounded_to=torch.bfloat16).stream[0]["norm:attention"]
    value = torch.full((_WIDTH, 1), 1.001)
    view.write(value)
    assert model.model.layers[0].input_layernorm.weight.tolist() == [1.0] * _WIDTH


def test_a_norms_gradient_is_a_column():
    model = pico_model("gpt2")
    view = describe(model).stream[1]["norm:mlp"]
    assert view.gradient() is None
    model(torch.tensor([[3, 4, 5]])).logits.square().sum().backward()
    assert view.gradient().shape == (_WIDTH, 1) and view.gradient().flatten().equal(view.module.weight.grad)


def test_the_groups_of_alphas():
    assert [group_of(name) for name in PROJECTIONS] == list(PROJECTIONS)
    assert {group_of(name) for of in describe(pico_model("llama")).stream for name in of} == {STREAM}


# Between the embedding and the first block opt has a linear layer, and bloom a norm.
@pytest.mark.parametrize("family", sorted(set(PICO_FAMILIES) - {"opt", "bloom"}))
def test_the_embeddings_scale_is_what_reaches_the_first_block(family):
    """Measured: how far the stream moves when a token's embedding does."""
    model = pico_model(family).float().eval()
    layout = describe(model)
    embedding = model.get_input_embeddings().weight
    seen = []
    block = next(module for _, module in model.named_modules() if isinstance(module, torch.nn.ModuleList))[0]
    hook = block.register_forward_pre_hook(
        lambda module, inputs, named: seen.append((inputs[0] if inputs else named["hidden_states"])[0, 1].clone()),
        with_kwargs=True,
    )
    ids, move = torch.tensor([[3, 5, 7]]), torch.zeros(layout.hidden_size)
    move[4] = 2.0**-3
    with torch.no_grad():
        model(ids)
        embedding[5] += move
        model(ids)
    hook.remove()
    got = (seen[1] - seen[0])[4] / move[4]
    assert float(got) == pytest.approx(layout.embedding_scale, rel=1e-3)
