"""What is left alone and named, and what is refused with one clear line."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSeq2SeqLM, PreTrainedModel

from tests.pico import PICO_RARE, PICO_VOCAB, pico_config, pico_model
from tmerge.errors import UnsupportedModelError
from tmerge.models.layouts import HeadLayout
from tmerge.models.projections import PROJECTIONS, describe, feature_key

SMALL = {"vocab_size": PICO_VOCAB, "hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 2}
ALL = set(PROJECTIONS)
ATTENTION = {"q", "k", "v", "o"}
MLP = {"gate", "up", "down"}


def empty(model_type: str, auto: Any = AutoModelForCausalLM, **keys: Any) -> PreTrainedModel:
    """A model without values: nothing here runs it."""
    with torch.device("meta"):
        return auto.from_config(AutoConfig.for_model(model_type, **keys))


def empty_pico(family: str, **keys: Any) -> PreTrainedModel:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(pico_config(family, **keys))


def refusal(model: nn.Module) -> str:
    with pytest.raises(UnsupportedModelError) as caught:
        describe(model)
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize(
    ("family", "layers", "named"),
    [
        (
            "mixtral",
            [ATTENTION, ATTENTION],
            ["layers 0-1: 4 experts per layer (mixture of experts): attention is merged"],
        ),
        ("gpt_oss", [ATTENTION, ATTENTION], ["layers 0-1: 4 experts per layer"]),
        ("qwen3_moe-partly", [ALL, ATTENTION], ["layer 1: 4 experts per layer"]),
        ("llama4", [ALL, ATTENTION], ["layer 1: 4 experts per layer"]),
        ("granitemoeshared", [ALL, ALL], ["attention and the dense MLP beside them are merged, the experts are left"]),
        ("granitemoehybrid", [MLP, ALL], ["layer 0: mamba (GraniteMoeHybridMambaLayer) is not plain attention"]),
        ("recurrent_gemma", [MLP, ALL], ["layer 0: temporal_block (RecurrentGemmaRecurrentBlock)"]),
        ("lfm2", [MLP, ALL], ["layer 0: conv (Lfm2ShortConv) is not plain attention with q, k, v and o: left alone"]),
        (
            "qwen3_5",
            [MLP, ALL],
            ["layer 0: linear_attn (Qwen3_5GatedDeltaNet)", "layer 1: 48 of the 96 rows of q_proj are none of"],
        ),
        (
            "qwen3_next",
            [set(), ATTENTION],
            ["layer 0: linear_attn", "layer 0: 4 experts per layer (mixture of experts): the experts are left alone"],
        ),
        ("nemotron_h", [set(), ATTENTION, {"up", "down"}, ATTENTION], ["layer 0: mixer (NemotronHMamba2Mixer)"]),
        ("falcon_h1", [ALL, ALL], ["layers 0-1: mamba (FalconH1Mixer) is none of"]),
        ("gemma3n", [ALL, ALL, ALL - {"k", "v"}, ALL - {"k", "v"}], ["altup (Gemma3nTextAltUp), laurel"]),
        ("gemma4-keys", [ALL, ALL - {"v"}] * 2, ["layers 0-3: per_layer_input_gate (Linear)"]),
    ],
)
def test_what_is_left_alone_is_named(family: str, layers: list[set[str]], named: list[str]) -> None:
    architecture = describe(empty_pico(family))
    assert [set(layer) for layer in architecture.layers] == layers
    for words in named:
        assert any(words in sentence for sentence in architecture.left_alone), architecture.left_alone
    assert [heads is not None for heads in architecture.attention] == ["o" in layer for layer in layers]


def test_a_plain_model_leaves_nothing_alone() -> None:
    assert describe(empty_pico("llama", layers=3)).left_alone == []


def test_heads_are_described_layer_by_layer() -> None:
    gemma4 = describe(empty_pico("gemma4-keys"))
    normed = {"scaling": 1.0, "normed": frozenset({"q", "k", "v"})}
    assert gemma4.attention[:2] == [HeadLayout(4, 2, 12, **normed), HeadLayout(4, 1, 32, **normed)]
    smollm3 = describe(empty_pico("smollm3"))
    assert [heads.rotary_dim for heads in smollm3.attention] == [16, 0]
    neox = describe(empty_pico("gpt_neox"))
    assert (neox.heads, neox.kv_heads, neox.head_dim, neox.hidden_size, neox.num_layers) == (4, 4, 16, 64, 2)
    assert neox.attention[0] == HeadLayout(4, 4, 16, rotary_dim=4, rotary_pairs="halves", scaling=0.25)


def test_the_base_model_and_a_compiled_one_have_the_same_views() -> None:
    model = pico_model("opt")
    whole = describe(model).layers[0]["q"]
    assert describe(torch.compile(model)).layers[0]["q"].module is whole.module
    assert describe(nn.DataParallel(model)).layers[0]["q"].module_name == whole.module_name
    assert describe(model.base_model).layers[0]["q"].module is whole.module


def test_unknown_names_are_refused() -> None:
    with pytest.raises(ValueError, match="'qkv' is not a projection"):
        feature_key("qkv", "pre")
    with pytest.raises(ValueError, match="'mid' is not a side"):
        feature_key("q", "mid")
    with pytest.raises(ValueError, match="qkv: not among"):
        describe(empty_pico("llama")).taps(["q", "qkv"])


ENCODER_DECODER = {"vocab_size": PICO_VOCAB, "d_model": 32, "encoder_layers": 1, "decoder_layers": 1}


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (
            lambda: empty("t5", AutoModelForSeq2SeqLM, vocab_size=PICO_VOCAB, d_model=32, num_layers=1),
            ["t5 (T5ForConditionalGeneration) is an encoder-decoder", "found encoder.block, decoder.block"],
        ),
        (
            lambda: empty("bart", AutoModelForSeq2SeqLM, **ENCODER_DECODER),
            ["bart (BartForConditionalGeneration) is an encoder-decoder", "model.encoder.layers, model.decoder.layers"],
        ),
        # AutoModelForCausalLM takes a BART for its decoder alone.
        (
            lambda: empty("bart", **ENCODER_DECODER),
            ["decoder of an encoder-decoder", "found model.decoder.layers.0.encoder_attn"],
        ),
        (lambda: empty_pico("gpt2", add_cross_attention=True), ["found transformer.h.0.crossattention"]),
        (
            lambda: empty("gemma3", text_config={**SMALL}, vision_config={"hidden_size": 48, "num_hidden_layers": 1}),
            ["gemma3 (Gemma3ForConditionalGeneration) is a multimodal model", "vision_config", "vision_tower (Siglip"],
        ),
        (
            lambda: empty("mamba", vocab_size=PICO_VOCAB, hidden_size=32, num_hidden_layers=2),
            [
                "mamba (MambaForCausalLM)",
                "looked for one list of blocks whose self_attn/",
                "backbone.layers: 2 of Mamba",
            ],
        ),
        # Known names inside an unknown fused layout.
        (
            lambda: empty("codegen", vocab_size=PICO_VOCAB, n_embd=64, n_head=4, n_layer=2, rotary_dim=8),
            ["looked for", "q_proj, k_proj, v_proj", "found transformer.h: 2 of CodeGenBlock with attn.qkv_proj"],
        ),
        # Multi-head latent attention: an o_proj, but no q, k and v of its own.
        (lambda: empty("minicpm3", **SMALL), ["minicpm3", "self_attn.q_a_proj", "self_attn.kv_b_proj"]),
        (lambda: empty("bert", AutoModel, **SMALL), ["bert (BertModel)", "encoder.layer: 2 of BertLayer"]),
        (
            lambda: empty("hrm_text", **SMALL, num_layers_per_stack=1),
            ["several stacks of blocks", "model.L_module.layers, model.H_module.layers"],
        ),
        (
            lambda: empty_pico("bloom", slow_but_exact=True, pretraining_tp=2),
            ["slow_but_exact", "set slow_but_exact to false"],
        ),
        (lambda: nn.Linear(3, 3), ["Linear is not a transformers model: load one"]),
    ],
)
def test_another_kind_of_model_is_refused_with_what_was_found(build: Callable[[], nn.Module], words: list[str]) -> None:
    message = refusal(build())
    for word in words:
        assert word in message, message


class Linear4bit(nn.Linear):
    """As bitsandbytes has it: a Linear by inheritance, packed by content."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features, bias=False)
        packed = torch.zeros(in_features * out_features // 2, 1, dtype=torch.uint8)
        self.weight = nn.Parameter(packed, requires_grad=False)


class QuantLinear(nn.Module):
    """As GPTQ and AWQ have it: no weight at all."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.register_buffer("qweight", torch.zeros(in_features // 8, out_features, dtype=torch.int32))
        self.register_buffer("scales", torch.zeros(1, out_features))


class OnlineQuantisedLinear(nn.Linear):
    """As BitNet has it: the weight is plain, but what is computed is not W x."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x.round(), self.weight)


class LoraLinear(nn.Module):
    def __init__(self, base_layer: nn.Linear) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.lora_A = nn.Linear(base_layer.in_features, 2, bias=False)


def float8(module: nn.Linear) -> nn.Linear:
    module.weight = nn.Parameter(module.weight.detach().to(torch.float8_e4m3fn), requires_grad=False)
    return module


@pytest.mark.parametrize("name", ["self_attn.v_proj", "mlp.down_proj"])
@pytest.mark.parametrize(
    ("replace", "words"),
    [
        (lambda old: Linear4bit(old.in_features, old.out_features), "a Linear4bit with a weight of uint8"),
        (lambda old: QuantLinear(old.in_features, old.out_features), "a QuantLinear with qweight, scales"),
        (lambda old: OnlineQuantisedLinear(old.in_features, old.out_features), "an? OnlineQuantisedLinear"),
        (float8, "a Linear with a weight of float8_e4m3fn"),
        (LoraLinear, "merge the adapter into the model first"),
        (lambda old: nn.utils.parametrizations.weight_norm(old), "remove the parametrisation first"),
    ],
)
def test_weights_that_cannot_be_read_plainly_are_refused(
    name: str, replace: Callable[[nn.Linear], nn.Module], words: str
) -> None:
    model = pico_model("llama")
    model.model.layers[1].set_submodule(name, replace(model.model.layers[1].get_submodule(name)))
    message = refusal(model)
    assert message.startswith(f"model.layers.1.{name} is ")
    assert words.removeprefix("an? ") in message
    if "Linear" in words:
        assert "load an unquantised checkpoint" in message


def test_a_quantised_fused_module_is_refused() -> None:
    model = pico_model("gpt_neox")
    model.gpt_neox.layers[0].attention.query_key_value = QuantLinear(64, 192)
    assert "gpt_neox.layers.0.attention.query_key_value is a QuantLinear" in refusal(model)


def test_a_config_that_contradicts_the_weights_is_refused() -> None:
    model = empty_pico("llama")
    model.config.num_key_value_heads = 4
    assert "k of layer 0 (model.layers.0.self_attn.k_proj) is (24, 64), expected (48, 64)" in refusal(model)
    model = empty_pico("phi3")
    model.config.num_key_value_heads = 4
    assert "qkv_proj has 128 outputs, expected 192" in refusal(model)
    model = empty_pico("llama")
    model.config.num_hidden_layers = 3
    assert "has 2 blocks in model.layers, but its config says 3" in refusal(model)


def test_a_fused_module_of_another_model_type_is_not_guessed() -> None:
    """The same modules under a model_type that has no description: phi3's layout is not assumed."""
    model = empty_pico("phi3")
    model.config.model_type = "phi99"
    message = refusal(model)
    assert "looked for" in message and "self_attn.qkv_proj" in message


def test_two_names_for_one_projection_are_not_guessed_between() -> None:
    model = empty_pico("llama")
    model.model.layers[0].self_attn.dense = nn.Linear(48, 64, device="meta")
    assert "model.layers.0.self_attn has o_proj and dense, each a name for o" in refusal(model)


def test_an_mlp_without_known_names_is_refused() -> None:
    model = empty_pico("llama")
    for block in model.model.layers:
        block.mlp.expand = block.mlp._modules.pop("up_proj")
    message = refusal(model)
    assert "has no MLP that tmerge knows: looked for up_proj/" in message and "mlp" in message


def test_layers_that_share_a_weight_are_refused() -> None:
    model = empty_pico("llama")
    model.model.layers[1].self_attn.q_proj.weight = model.model.layers[0].self_attn.q_proj.weight
    message = refusal(model)
    assert (
        "q of layer 0 (model.layers.0.self_attn.q_proj) and q of layer 1" in message and "share one weight" in message
    )


def test_every_rare_family_is_described() -> None:
    """No pico family is kept that nothing is known of."""
    assert all(describe(empty_pico(family)).names for family in PICO_RARE)
