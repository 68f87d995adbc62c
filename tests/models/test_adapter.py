"""An adapter joined to its base while it is read gives what PEFT merges, and what is no such adapter gets one line."""

from __future__ import annotations

import json
import re
import shutil

import pytest
import torch
from peft import IA3Config, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from tests.models.pico_gguf import save_pico_gguf
from tests.models.test_block_weights import features
from tests.pico import save_pico
from tests.pico_adapter import merged_by_peft, save_adapter
from tmerge.errors import TmergeError
from tmerge.models import Model, load_model, save_checkpoint, verify_checkpoint
from tmerge.models.loading import open_by_blocks

ATTENTION = ["q_proj", "v_proj"]
KINDS = {
    "lora": ("llama", {"target_modules": [*ATTENTION, "o_proj", "gate_proj", "down_proj"]}),
    "rslora": ("llama", {"target_modules": ATTENTION, "use_rslora": True}),
    "dora": ("llama", {"target_modules": [*ATTENTION, "up_proj"], "use_dora": True}),
    "patterns": (
        "llama",
        {
            "target_modules": [*ATTENTION, "up_proj"],
            "rank_pattern": {"v_proj": 2, "layers.1.mlp.up_proj": 3},
            "alpha_pattern": {"^model.layers.0.self_attn.q_proj": 11},
        },
    ),
    "some layers": ("llama", {"target_modules": ATTENTION, "layers_to_transform": [1]}),
    "fused": ("phi3", {"target_modules": ["qkv_proj", "gate_up_proj", "o_proj"]}),
    "fused dora": ("phi3", {"target_modules": ["qkv_proj"], "use_dora": True}),
    "transposed": ("gpt2", {"target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True}),
    "transposed dora": ("gpt2", {"target_modules": ["c_attn"], "fan_in_fan_out": True, "use_dora": True}),
    "embedding": ("llama", {"target_modules": ["q_proj", "embed_tokens"]}),
    "trained whole": ("llama", {"target_modules": ATTENTION, "modules_to_save": ["embed_tokens", "lm_head", "norm"]}),
    "biases": ("qwen2", {"target_modules": ATTENTION, "bias": "all"}),
    "bias of B": ("qwen2", {"target_modules": ATTENTION, "lora_bias": True}),
}


def made(kind, folder, **more):
    family, options = KINDS[kind]
    base = save_pico(family, folder / "base", layers=2)
    return base, save_adapter(base, folder / "adapter", **{**options, **more})


@pytest.mark.parametrize("kind", KINDS)
def test_a_joined_model_is_what_peft_merges(kind, tmp_path):
    base, adapter = made(kind, tmp_path)
    expected, plain = merged_by_peft(base, adapter).state_dict(), load_file(base / "model.safetensors")
    model = Model(str(adapter), device="cpu")
    joined = model.load().model.state_dict()
    assert joined.keys() == expected.keys()
    for name, values in expected.items():
        torch.testing.assert_close(joined[name], values, rtol=1e-5, atol=1e-5)
    changed = [name for name, values in plain.items() if not torch.equal(values, expected[name])]
    assert changed and sorted(changed) == list(model.facts.adapter.parameters)
    # From the files, tensor by tensor: the same bits, where transformers takes the tensors as they are.
    weights = model.weights
    assert weights.keys() == plain.keys()
    for name, values in weights.items():
        assert torch.equal(joined[name], values), name


@pytest.mark.parametrize("kind", ["lora", "fused dora", "trained whole"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_read_by_blocks_it_is_the_same_to_the_bit(kind, dtype, tmp_path):
    family, options = KINDS[kind]
    base = save_pico(family, tmp_path / "base", layers=3, dtype=dtype)
    adapter = save_adapter(base, tmp_path / "adapter", **options)
    place = Model(str(adapter)).place
    whole = load_model(str(adapter), widen=True, device="cpu")
    by_blocks = open_by_blocks(str(adapter), widen=True, device="cpu")
    assert by_blocks.block_weights is not None and by_blocks.commit == whole.commit == place.commit
    expected, found = features(whole, tmp_path / "whole"), features(by_blocks, tmp_path / "blocks")
    without = features(load_model(str(base), widen=True, device="cpu"), tmp_path / "without")
    for feature, values in expected.items():
        assert torch.equal(found[feature], values), feature
    assert any(not torch.equal(without[feature], values) for feature, values in expected.items())


def test_beside_a_gguf_file(tmp_path):
    base = save_pico_gguf(tmp_path / "base.gguf", seed=1)
    plain = load_model(str(base), device="cpu", dtype="float32")
    (tmp_path / "plain").mkdir()
    save_checkpoint(plain, tmp_path / "plain")
    adapter = save_adapter(tmp_path / "plain", tmp_path / "adapter", target_modules=["q_proj", "down_proj"])
    joined = Model(str(base), adapter=str(adapter), device="cpu", dtype="float32").load().model.state_dict()
    for name, values in merged_by_peft(tmp_path / "plain", adapter).state_dict().items():
        torch.testing.assert_close(joined[name], values, rtol=1e-5, atol=1e-5)


def test_an_embedding_that_stays_the_head(tmp_path):
    base = save_pico("llama-tied", tmp_path / "base")
    options = {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]}
    apart = save_adapter(base, tmp_path / "apart", **options)
    with pytest.raises(TmergeError, match="has as one with lm_head.weight: it would part them"):
        Model(str(apart)).facts  # noqa: B018 - finding them is what is asked
    one = save_adapter(base, tmp_path / "one", **options, ensure_weight_tying=True)
    joined = Model(str(one), device="cpu").load().model
    assert joined.lm_head.weight is joined.model.embed_tokens.weight
    expected = merged_by_peft(base, one).state_dict()["model.embed_tokens.weight"]
    torch.testing.assert_close(joined.model.embed_tokens.weight.data, expected)


def test_a_joined_target_is_saved_as_a_checkpoint_of_its_own(tmp_path):
    base, adapter = made("lora", tmp_path)
    loaded = load_model(str(adapter), device="cpu")
    (tmp_path / "saved").mkdir()
    save_checkpoint(loaded, tmp_path / "saved")
    verify_checkpoint(tmp_path / "saved", loaded, ["the cat sat on the mat"])
    saved, expected = load_file(tmp_path / "saved/model.safetensors"), merged_by_peft(base, adapter).state_dict()
    for name, values in saved.items():
        torch.testing.assert_close(values, expected[name], rtol=1e-5, atol=1e-5)


def test_what_identifies_it_is_the_contents_of_both(tmp_path):
    base, adapter = made("rslora", tmp_path)
    commit = Model(str(adapter)).commit
    assert commit == Model(str(base), adapter=str(adapter)).commit and re.fullmatch("sha256:[0-9a-f]{64}", commit)
    assert commit != Model(str(base)).commit == Model(str(adapter)).facts.adapter.base_commit
    shutil.copytree(adapter, tmp_path / "moved")
    assert Model(str(tmp_path / "moved")).commit == commit
    change_config(tmp_path / "moved", lora_alpha=7)
    assert Model(str(tmp_path / "moved")).commit != commit
    save_pico("llama", base, layers=2, seed=5)
    assert Model(str(adapter)).commit != commit


# -- what is no adapter of this base -------------------------------------------------------------------------------


def change_config(adapter, **keys):
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | keys))


def change_tensors(adapter, change):
    tensors = load_file(adapter / "adapter_model.safetensors")
    change(tensors)
    save_file(tensors, adapter / "adapter_model.safetensors")


def pickled(adapter):
    (adapter / "adapter_model.safetensors").unlink()
    torch.save({}, adapter / "adapter_model.bin")


def first(tensors, part):
    return next(name for name in sorted(tensors) if part in name)


DAMAGE = {
    "pickles": (pickled, r"weights as pickles only \(adapter_model.bin\)"),
    "no weights": (lambda a: (a / "adapter_model.safetensors").unlink(), "without adapter_model.safetensors"),
    "cut": (lambda a: (a / "adapter_model.safetensors").write_bytes(b"x" * 40), "truncated or no safetensors file"),
    "no JSON": (lambda a: (a / "adapter_config.json").write_text("nonsense"), "is no JSON object"),
    "a list": (lambda a: (a / "adapter_config.json").write_text("[]"), "is no JSON object"),
    "no base": (lambda a: change_config(a, base_model_name_or_path=None), "names no base .*--source-base"),
    "base gone": (
        lambda a: change_config(a, base_model_name_or_path="/nowhere/at/all"),
        "an adapter of '/nowhere/at/all', which is no model that can be found .*--source-base",
    ),
    "rank": (lambda a: change_config(a, r=3), r"factors of the shapes .* and its rank is 3"),
    "rank of a word": (lambda a: change_config(a, r="four"), "adapter_config.json has r 'four'"),
    "pattern": (lambda a: change_config(a, alpha_pattern={"(": 3}), "a pattern of names that is none"),
    "a pattern of choices without end": (
        lambda a: change_config(a, rank_pattern={".?" * 30 + "X": 3}),
        "which could take for ever",
    ),
    "a pattern that nests": (lambda a: change_config(a, rank_pattern={"(" * 90 + "a" + ")" * 90 + "{9": 3}), "pattern"),
    "a pattern that counts": (
        lambda a: change_config(a, rank_pattern={"a{99999999999999999999}": 3}),
        "a pattern of names that is none",
    ),
    "a pattern without end": (lambda a: change_config(a, rank_pattern={"(a+)+": 3}), "which could take for ever"),
    "pissa": (lambda a: change_config(a, init_lora_weights="pissa"), "begun with init_lora_weights 'pissa'"),
    "aLoRA": (lambda a: change_config(a, alora_invocation_tokens=[1]), "in force only after certain tokens"),
    "nothing": (lambda a: change_tensors(a, dict.clear), "there is nothing in it"),
    "half": (lambda a: change_tensors(a, lambda t: t.pop(first(t, "lora_A"))), "lora_A of .* is missing"),
    "stranger": (lambda a: change_tensors(a, lambda t: t.update(x=torch.ones(1))), "x is of no kind that is read"),
    "no such module": (
        lambda a: change_tensors(a, lambda t: t.update({first(t, "q_proj").replace("rs.0", "rs.7"): torch.ones(1)})),
        "it changes model.layers.7.self_attn.q_proj, which '.*' has not",
    ),
    "shape": (
        lambda a: change_tensors(a, lambda t: t.update({first(t, "lora_B"): torch.ones(5, 4)})),
        r"is for a weight of the shape \(5, 96\), and .* has \(64, 96\); name the base that it was trained on",
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_bad_adapter_gets_one_line(damage, tmp_path):
    _, adapter = made("lora", tmp_path)
    spoil, words = DAMAGE[damage]
    spoil(adapter)
    with pytest.raises(TmergeError, match=words) as caught:
        Model(str(adapter), device="cpu").facts  # noqa: B018
    assert "\n" not in str(caught.value)


def test_values_that_are_not_finite(tmp_path):
    _, adapter = made("lora", tmp_path)
    change_tensors(adapter, lambda tensors: tensors[first(tensors, "lora_B")].fill_(float("nan")))
    with pytest.raises(TmergeError, match="the adapter .*lora_B.weight has values that are not finite"):
        load_model(str(adapter), device="cpu")


def test_what_older_releases_stored_beside_a_module_that_was_trained_whole(tmp_path):
    _, adapter = made("trained whole", tmp_path)
    commit, expected = Model(str(adapter)).commit, load_model(str(adapter), device="cpu").model.state_dict()

    def as_before(tensors):
        own = tensors.pop("base_model.model.lm_head.weight")
        tensors["base_model.model.lm_head.modules_to_save.default.weight"] = own
        tensors["base_model.model.lm_head.original_module.weight"] = torch.zeros_like(own)

    change_tensors(adapter, as_before)
    found = load_model(str(adapter), device="cpu")
    assert found.commit != commit
    for name, values in expected.items():
        assert torch.equal(found.model.state_dict()[name], values), name


def test_values_beyond_the_range_of_its_base(tmp_path):
    _, adapter = made("lora", tmp_path)
    change_config(adapter, lora_alpha=1e42)
    with pytest.raises(TmergeError, match="has values beyond the range of float32"):
        load_model(str(adapter), device="cpu")


@pytest.mark.parametrize(
    "config", [PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2), IA3Config(task_type="CAUSAL_LM")]
)
def test_of_adapters_only_lora_is_read(config, tmp_path):
    base = save_pico("llama", tmp_path / "base")
    get_peft_model(AutoModelForCausalLM.from_pretrained(base), config).save_pretrained(tmp_path / "adapter")
    with pytest.raises(TmergeError, match="is an adapter of the kind .*, and of adapters only LoRA is read"):
        load_model(str(tmp_path / "adapter"))


def test_an_adapter_of_an_adapter(tmp_path):
    base, adapter = made("lora", tmp_path)
    shutil.copytree(adapter, tmp_path / "second")
    change_config(tmp_path / "second", base_model_name_or_path=str(adapter))
    for model in (Model(str(tmp_path / "second")), Model(str(adapter), adapter=str(tmp_path / "second"))):
        with pytest.raises(TmergeError, match="which is an adapter itself"):
            model.facts  # noqa: B018
    with pytest.raises(TmergeError, match="has no adapter_config.json, so it is no PEFT adapter"):
        Model(str(base), adapter=str(base)).facts  # noqa: B018
