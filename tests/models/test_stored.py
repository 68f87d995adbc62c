"""Tensors without a place in the model: what is harmless, what is left out and named, what is refused."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, LlamaForSequenceClassification

from tests.pico import PICO_FAMILIES, PICO_RARE, pico_config, pico_tokenizer, save_pico
from tmerge.errors import CheckpointError
from tmerge.models import load_model, meta_model, read_facts, save_checkpoint, verify_checkpoint
from tmerge.models.checkpoint import StoredTensor, read_headers, weight_files
from tmerge.models.stored import Places, find_places, sort_stored
from tmerge.preflight.check import check
from tmerge.recipe import Recipe


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """A plain checkpoint that no test changes: two layers, a head of its own."""
    return save_pico("llama", tmp_path_factory.mktemp("models") / "pico")


@pytest.fixture
def folder(stored, tmp_path):
    """A copy to spoil."""
    return shutil.copytree(stored, tmp_path / "pico")


def _configure(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def _rewrite(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def _add(**tensors):
    return lambda folder: _rewrite(
        folder, lambda held: held.update({n.replace("__", "."): t for n, t in tensors.items()})
    )


def _eight_bit(folder):
    """As DeepSeek stores it, the config's quantization_config lost."""

    def change(tensors):
        for name in [name for name in tensors if name.endswith("proj.weight")]:
            tensors[f"{name}_scale_inv"] = torch.full((1, 1), 0.01)
            tensors[name] = (tensors[name] / 0.01).to(torch.float8_e4m3fn)

    _rewrite(folder, change)


def _integer_head(folder):
    """As bitsandbytes stores it."""

    def change(tensors):
        tensors["lm_head.weight"] = (tensors["lm_head.weight"] * 100).to(torch.int8)
        tensors["lm_head.SCB"] = torch.ones(384)

    _rewrite(folder, change)


def _lacks_a_layer(folder):
    _configure(folder, num_hidden_layers=3)


def _lacks_its_head(folder):
    _rewrite(folder, lambda tensors: tensors.pop("lm_head.weight"))


def _three_layers(folder):
    save_pico("llama", folder, layers=3)
    _configure(folder, num_hidden_layers=2)


def _other_shapes(folder):
    _configure(folder, intermediate_size=128)


def _further_layer_beside_an_encoder(folder):
    _three_layers(folder)
    _add(model__visual__blocks__4__norm__weight=torch.ones(8))(folder)


def _integer_bias_without_the_prefix(folder):
    """As the repo of GPT-2 names its tensors; the class passes over "attn.bias", which is found in this name."""
    save_pico("gpt2", folder)

    def change(tensors):
        renamed = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
        tensors.clear()
        tensors |= renamed
        tensors["h.0.attn.c_attn.bias"] = torch.ones(192, dtype=torch.int8)

    _rewrite(folder, change)


def _further_layer_without_the_prefix(folder):
    save_pico("gpt2", folder, layers=3)
    _configure(folder, n_layer=2)

    def change(tensors):
        renamed = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
        tensors.clear()
        tensors |= renamed

    _rewrite(folder, change)


def _packed_experts(folder):
    save_pico("mixtral", folder)
    _rewrite(folder, lambda tensors: tensors.pop("model.layers.1.block_sparse_moe.experts.2.w1.weight"))


_REFUSED = {
    "eight-bit weights with scales": (
        _eight_bit,
        ["F8_E4M3", "model.layers.0.mlp.down_proj.weight and 13 more", "use the repo of the unquantised model"],
    ),
    "an integer head": (_integer_head, ["I8", "(lm_head.weight)", "unquantised"]),
    "scales alone": (_add(model__layers__0__mlp__up_proj__weight_scale=torch.ones(1)), ["scales", "weight_scale"]),
    "layers beyond the config's": (
        _three_layers,
        ["stores 3 layers (model.layers.2.", "config.json counts 2", "num_hidden_layers"],
    ),
    "layers beyond the config's, beside an encoder": (
        _further_layer_beside_an_encoder,
        ["stores 3 layers (model.layers.2.", "set it to 3"],
    ),
    "layers beyond the config's, without the prefix": (
        _further_layer_without_the_prefix,
        ["stores 3 layers (", "h.2.", "config.json counts 2"],
    ),
    "an integer bias without the prefix": (_integer_bias_without_the_prefix, ["I8", "(h.0.attn.c_attn.bias)"]),
    "blocks that are not the decoder's": (
        _add(model__towers__0__norm__weight=torch.ones(8), model__towers__5__norm__weight=torch.ones(8)),
        ["no place for (model.towers.0.norm.weight and 1 more)"],
    ),
    "a missing layer": (_lacks_a_layer, ["lacks 9 of the weights of LlamaForCausalLM (model.layers.2."]),
    "a missing head": (_lacks_its_head, ["lacks 1 of the weights", "lm_head.weight", "not a whole causal LM"]),
    "other shapes": (_other_shapes, ["other shapes than its config.json says", "(64, 96) stored, (64, 128) by"]),
    "a missing expert": (_packed_experts, ["MixtralForCausalLM"]),
    "a bias that the config denies": (
        _add(model__layers__1__self_attn__q_proj__bias=torch.ones(48)),
        ["no place for (model.layers.1.self_attn.q_proj.bias)", "config.json describes in full"],
    ),
    "a bias of attention that looks like a mask's name": (
        _add(model__layers__1__self_attn__bias=torch.ones(64)),
        ["no place for (model.layers.1.self_attn.bias)"],
    ),
    "an adapter beside its base": (
        _add(model__layers__1__self_attn__q_proj__lora_A__weight=torch.ones(2, 64)),
        ["no place for", "merge_and_unload"],
    ),
}


@pytest.mark.parametrize("name", _REFUSED)
def test_what_changes_the_model_is_refused_by_check_and_by_loading(stored, folder, name):
    spoil, words = _REFUSED[name]
    spoil(folder)
    messages = []
    for action in (
        lambda: check(Recipe(target=str(stored), source=str(folder))),
        lambda: read_facts(str(folder)),
        lambda: load_model(str(folder), device="cpu"),
    ):
        with pytest.raises(CheckpointError) as caught:
            action()
        messages.append(str(caught.value))
    assert len(set(messages)) == 1, messages
    assert messages[0].startswith(repr(str(folder))) and "\n" not in messages[0]
    for word in words:
        assert word in messages[0], messages[0]


_SIDE = {
    "mtp.*": (
        {"mtp.fc.weight": (64, 128), "mtp.layers.0.mlp.up_proj.weight": (96, 64), "mtp.norm.weight": (64,)},
        "layers that predict further tokens (MTP) (mtp.fc.weight and 2 more)",
    ),
    "a layer with eh_proj": (
        {"model.layers.2.eh_proj.weight": (64, 128), "model.layers.2.mlp.up_proj.weight": (96, 64)},
        "layers that predict further tokens (MTP) (model.layers.2.eh_proj.weight and 1 more)",
    ),
    "eh_proj alone": ({"model.eh_proj.weight": (64, 128)}, "layers that predict further tokens (MTP) (model.eh_proj."),
    "v_head": (
        {"v_head.summary.weight": (1, 64), "v_head.summary.bias": (1,)},
        "a value head (v_head.summary.bias and",
    ),
    "score": ({"score.weight": (3, 64)}, "a reward or classifier head (score.weight)"),
    "an encoder of more blocks than the decoder has": (
        {f"model.visual.blocks.{block}.norm.weight": (8,) for block in range(6)},
        "an encoder of images or sound (model.visual.blocks.0.norm.weight and 5 more)",
    ),
    "an encoder": ({"model.visual.patch_embed.weight": (8, 8)}, "an encoder of images or sound (model.visual."),
}


@pytest.mark.parametrize("name", _SIDE)
def test_side_parts_are_named_left_out_and_no_longer_announced(stored, folder, tmp_path, name):
    shapes, words = _SIDE[name]
    _rewrite(folder, lambda tensors: tensors.update({key: torch.ones(shape) for key, shape in shapes.items()}))
    _configure(folder, num_nextn_predict_layers=1, mtp_loss_weight=0.3, mtp_use_dedicated_embeddings=True)
    for recipe, role in (
        (Recipe(target=str(folder), source=str(stored)), "target"),
        (Recipe(target=str(stored), source=str(folder)), "source"),
    ):
        (note,) = [note for note in check(recipe).notes if "leaves out" in note]
        assert note.startswith(f"the {role}'s files hold {words}")
    loaded = load_model(str(folder), device="cpu")
    save_checkpoint(loaded, tmp_path / "saved")
    verify_checkpoint(tmp_path / "saved", loaded, ["a text"])
    saved = json.loads((tmp_path / "saved" / "config.json").read_text())
    # What is no count of layers stays as it is.
    assert saved["num_nextn_predict_layers"] == 0 and saved["mtp_loss_weight"] == 0.3
    assert saved["mtp_use_dedicated_embeddings"] is True
    assert not set(shapes) & set(load_file(tmp_path / "saved" / "model.safetensors"))
    torch.testing.assert_close(
        loaded.model.state_dict(), load_model(str(stored), device="cpu").model.state_dict(), rtol=0, atol=0
    )


def test_a_tied_classifier_is_taken_for_its_decoder_without_its_labels(tmp_path):
    config = pico_config(
        "llama-tied", id2label={0: "bad", 1: "so", 2: "good"}, problem_type="single_label_classification"
    )
    LlamaForSequenceClassification(config).save_pretrained(tmp_path / "pico")
    pico_tokenizer(tmp_path / "pico")
    assert [str(part) for part in read_facts(str(tmp_path / "pico")).side] == [
        "a reward or classifier head (score.weight)"
    ]
    save_checkpoint(load_model(str(tmp_path / "pico"), device="cpu"), tmp_path / "saved")
    saved = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert saved["architectures"] == ["LlamaForCausalLM"]
    assert not {"id2label", "label2id", "problem_type", "num_labels"} & {key for key, value in saved.items() if value}


@pytest.mark.parametrize("base", ["model.", "model.language_model.", ""])
def test_a_class_that_passes_over_its_encoder_and_its_prediction_layers(base):
    """Names as the headers give them; the class's own have the prefix."""
    own = {f"model.layers.{layer}.norm.weight" for layer in range(4)}
    visual = {f"model.visual.blocks.{block}.norm.weight" for block in range(6)}
    predicting = {f"{base}layers.4.{part}.weight" for part in ("eh_proj", "norm")}
    passed_over = visual | predicting
    stored = {name: StoredTensor("BF16", (8,), 16) for name in own | passed_over}
    places = Places("Any", 4, frozenset(own), unplaced=frozenset(passed_over), expected=frozenset(passed_over))
    found = sort_stored(stored, places)
    assert found.refusals == ()
    assert {part.names for part in found.side} == {tuple(sorted(visual)), tuple(sorted(predicting))}
    # The same layer without anything that predicts is one that the config does not count.
    names = frozenset(visual | {f"{base}layers.4.norm.weight"})
    (refusal,) = sort_stored(stored, replace(places, unplaced=names, expected=names)).refusals
    assert refusal.startswith(f"stores 5 layers ({base}layers.4.norm.weight), but its config.json counts 4")


def test_an_encoder_that_the_class_passes_over_is_left_out(tmp_path):
    folder = save_pico("qwen3_5", tmp_path / "pico")
    _rewrite(
        folder,
        lambda held: held.update({f"model.visual.blocks.{block}.norm.weight": torch.ones(8) for block in range(6)}),
    )
    words = "an encoder of images or sound (model.visual.blocks.0.norm.weight and 5 more)"
    assert [str(part) for part in read_facts(str(folder)).side] == [words]
    load_model(str(folder), device="cpu")


def test_what_older_releases_stored_is_passed_over(folder):
    _add(
        model__layers__0__self_attn__rotary_emb__inv_freq=torch.ones(6),
        model__layers__0__self_attn__masked_bias=torch.tensor(-1e9),
        model__layers__0__self_attn__bias=torch.ones(1, 1, 8, 8, dtype=torch.uint8),
        model__embeddings__position_ids=torch.arange(8),
    )(folder)
    assert read_facts(str(folder)).side == ()
    load_model(str(folder), device="cpu")


def test_a_base_model_without_its_prefix_is_whole(tmp_path):
    folder = save_pico("gpt2", tmp_path / "pico")

    def change(tensors):
        renamed = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
        tensors.clear()
        tensors |= renamed
        for layer in range(2):
            tensors[f"h.{layer}.attn.bias"] = torch.ones(1, 1, 8, 8, dtype=torch.bool)

    _rewrite(folder, change)
    assert read_facts(str(folder)).side == ()
    load_model(str(folder), device="cpu")


@pytest.mark.parametrize("family", [*PICO_FAMILIES, *PICO_RARE])
def test_every_family_is_whole_and_has_nothing_beside_it(tmp_path, family):
    folder = save_pico(family, tmp_path)
    model = meta_model(AutoConfig.from_pretrained(folder))
    headers = read_headers(weight_files(folder))
    found = sort_stored(headers, find_places(model, headers))
    assert found.refusals == () and found.side == ()
    # And one tensor less is seen in every family.
    name = next(name for name in sorted(headers) if ".0." in name)
    del headers[name]
    assert sort_stored(headers, find_places(model, headers)).refusals


def test_headers_that_tell_of_no_floats_where_the_model_has_none(stored):
    headers = read_headers(weight_files(stored))
    model = meta_model(AutoConfig.from_pretrained(stored))
    model.register_buffer("counts", torch.zeros(3, dtype=torch.int64, device="meta"))
    headers["counts"] = StoredTensor("I64", (3,), 24)
    places = find_places(model, headers)
    assert places.integers == {"counts"}
    # The class itself has no such buffer, so here it is a stranger; but it is no quantised weight.
    assert not any("quantised" in words for words in sort_stored(headers, places).refusals)
