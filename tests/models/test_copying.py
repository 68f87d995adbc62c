"""What was not changed keeps its bytes; what was is written under the name and in the dtype that it was stored in."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.pico import PICO_FAMILIES, PICO_RARE, save_pico
from tmerge.errors import CheckpointError
from tmerge.models import Model, copying, load_model, read_facts, save_checkpoint, verify_checkpoint
from tmerge.models.copying import stored_again
from tmerge.models.settings import own_place

TEXTS = ["The cat sat on the mat.", "Saya membaca buku."]


def _bits(tensor):
    return tensor.dtype, tensor.reshape(-1).view(torch.uint8).numpy().tobytes()


def _rewrite(folder, change):
    tensors = load_file(folder / "model.safetensors")
    save_file(
        {name: change(name, tensor) for name, tensor in tensors.items()}, folder / "model.safetensors", {"format": "pt"}
    )


def _edit(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    "family",
    [
        family if family in ("llama-tied", "mixtral", "phi3") else pytest.param(family, marks=pytest.mark.slow)
        for family in PICO_FAMILIES | PICO_RARE
    ],
)
def test_of_every_family_only_what_was_changed_is_written_anew(tmp_path, family):
    folder = save_pico(family, tmp_path / "in", dtype=torch.bfloat16)
    loaded = load_model(str(folder), device="cpu")
    assert stored_again(loaded, own_place(loaded)) is not None
    changed = next(parameter for name, parameter in loaded.model.named_parameters() if ".0." in name)
    with torch.no_grad():
        changed.copy_((changed + 0.5).bfloat16())
    save_checkpoint(loaded, tmp_path / "out")
    verify_checkpoint(tmp_path / "out", loaded, TEXTS)
    before, after = (load_file(path / "model.safetensors") for path in (folder, tmp_path / "out"))
    differ = [name for name in before if _bits(before[name]) != _bits(after[name])]
    assert before.keys() == after.keys() and len(differ) >= 1
    for path in folder.iterdir():
        if path.name not in ("config.json", "tokenizer_config.json", "model.safetensors"):
            assert (tmp_path / "out" / path.name).read_bytes() == path.read_bytes()


@pytest.mark.parametrize("stored", [torch.float32, torch.float16])
def test_more_digits_than_the_config_names_are_kept(tmp_path, stored):
    """As many upload them: trained in float32, the config still says bfloat16."""
    folder = save_pico("llama", tmp_path / "in", dtype=stored)
    _edit(folder / "config.json", dtype="bfloat16")
    model = Model(str(folder), device="cpu")
    loaded = model.load()
    assert loaded.dtype == model.facts.dtype == stored
    with torch.no_grad():
        weight = loaded.model.model.layers[0].mlp.down_proj.weight
        weight.copy_((weight + 0.01).to(stored))
    save_checkpoint(loaded, tmp_path / "out")
    verify_checkpoint(tmp_path / "out", loaded, TEXTS)
    before, after = (load_file(path / "model.safetensors") for path in (folder, tmp_path / "out"))
    differ = {name for name in before if _bits(before[name]) != _bits(after[name])}
    assert differ == {"model.layers.0.mlp.down_proj.weight"} and {t.dtype for t in after.values()} == {stored}
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"
    (remark,) = model.facts.remarks
    assert f"files are {str(stored)[6:]} and its config says bfloat16" in remark


def test_each_tensor_keeps_its_own_precision(tmp_path):
    """Norms in float32 among bfloat16, which loading rounds: what was not changed is not rounded in the file."""
    folder = save_pico("llama", tmp_path / "in", dtype=torch.bfloat16)
    torch.manual_seed(0)
    _rewrite(folder, lambda name, tensor: torch.randn(tensor.shape) if "norm" in name else tensor)
    loaded = load_model(str(folder), device="cpu")
    assert loaded.dtype == torch.bfloat16
    with torch.no_grad():
        loaded.model.model.norm.weight += 1.0
    save_checkpoint(loaded, tmp_path / "out")
    verify_checkpoint(tmp_path / "out", loaded, TEXTS)
    before, after = (load_file(path / "model.safetensors") for path in (folder, tmp_path / "out"))
    assert {name for name in before if _bits(before[name]) != _bits(after[name])} == {"model.norm.weight"}
    assert after["model.norm.weight"].dtype == torch.float32


@pytest.mark.parametrize("narrow", [torch.bfloat16, torch.float16])
def test_what_its_own_precision_cannot_hold_is_written_in_the_models(tmp_path, narrow):
    """One tensor of fewer digits among float32: fused it has more, and what was measured is what is written."""
    folder, name = save_pico("llama", tmp_path / "in"), "model.layers.1.mlp.down_proj.weight"
    _rewrite(folder, lambda stored, tensor: tensor.to(narrow) if stored == name else tensor)
    loaded = load_model(str(folder), device="cpu")
    save_checkpoint(loaded, tmp_path / "same")
    assert load_file(tmp_path / "same" / "model.safetensors")[name].dtype == narrow
    with torch.no_grad():
        loaded.model.get_parameter(name).add_(1e-4 * torch.randn(64, 96))
    save_checkpoint(loaded, tmp_path / "out")
    verify_checkpoint(tmp_path / "out", loaded, TEXTS)
    assert load_file(tmp_path / "out" / "model.safetensors")[name].dtype == torch.float32


def _taken_apart(monkeypatch):
    """Names of the model's tensors that are taken apart from now on, and whether they are there or on meta."""
    from transformers import core_model_loading

    apart, revert = [], core_model_loading.revert_weight_conversion

    def watched(model, tensors):
        ((name, tensor),) = tensors.items()
        apart.append((name, tensor.device.type))
        return revert(model, tensors)

    monkeypatch.setattr(core_model_loading, "revert_weight_conversion", watched)
    return apart


def _stacks(loaded):
    """Names of the tensors that hold all of a layer's experts."""
    return [name for name, parameter in loaded.model.named_parameters() if parameter.dim() == 3]


@pytest.mark.parametrize("family", ["mixtral", "olmoe", "qwen3_moe", "qwen2_moe"])
@pytest.mark.parametrize("change", [False, True])
def test_each_stack_of_experts_is_taken_apart_once(tmp_path, monkeypatch, family, change):
    """Files list the parts of a layer's stacks by experts: as often as they alternate would take hours."""
    folder = save_pico(family, tmp_path / "in", layers=11, dtype=torch.bfloat16)
    loaded = load_model(str(folder), device="cpu")
    stacks = _stacks(loaded)
    assert len(stacks) == 11 * 2
    if change:
        with torch.no_grad():
            for name in stacks:
                loaded.model.get_parameter(name).add_(0.5)
    apart = _taken_apart(monkeypatch)
    alive, parts = [], copying._Apart._parts

    def counted(self, name, tensor):
        if tensor.device.type != "meta":
            alive.append(len(self._held))
        return parts(self, name, tensor)

    monkeypatch.setattr(copying._Apart, "_parts", counted)
    tensors = stored_again(loaded, own_place(loaded))
    # Nothing but names and shapes is asked for before the first is written.
    assert {device for _, device in apart} == {"meta"}
    apart.clear()
    (tmp_path / "out").mkdir()
    copying.write_shards(tmp_path / "out", tensors, "5GB")
    assert sorted(name for name, _ in apart) == sorted(stacks) and {device for _, device in apart} == {"cpu"}
    # The other stack of the layer, and nothing of the layers before.
    assert max(alive) == 1


def test_a_stack_that_two_files_share_is_taken_apart_for_each(tmp_path, monkeypatch):
    folder = save_pico("mixtral", tmp_path / "in", layers=4, max_shard_size="300KB")
    loaded = load_model(str(folder), device="cpu")
    apart = _taken_apart(monkeypatch)
    save_checkpoint(loaded, tmp_path / "out", max_shard_size="300KB")
    written = sorted((tmp_path / "out").glob("*.safetensors"))
    before, after = (
        {name: _bits(tensor) for path in paths for name, tensor in load_file(path).items()}
        for paths in (folder.glob("*.safetensors"), written)
    )
    assert before == after
    files = len(written)
    taken = [name for name, device in apart if device == "cpu"]
    assert files > 2 and set(taken) == set(_stacks(loaded)) and len(taken) <= 4 * 2 + 2 * (files - 1)


def test_files_that_went_away_or_changed_are_one_line(tmp_path):
    folder = save_pico("llama", tmp_path / "in")
    loaded = load_model(str(folder), device="cpu")
    _rewrite(folder, lambda name, tensor: tensor.bfloat16())
    with pytest.raises(CheckpointError, match="changed while it was being used"):
        save_checkpoint(loaded, tmp_path / "out")
    shutil.rmtree(folder)
    with pytest.raises(CheckpointError) as caught:
        save_checkpoint(loaded, tmp_path / "out")
    assert "\n" not in str(caught.value)


def test_in_another_dtype_all_of_it_is(tmp_path):
    """Asked for by the user, or by a save in another one."""
    folder = save_pico("llama", tmp_path / "in")
    loaded = load_model(str(folder), device="cpu", dtype="bfloat16")
    save_checkpoint(loaded, tmp_path / "out")
    verify_checkpoint(tmp_path / "out", loaded, TEXTS)
    assert {tensor.dtype for tensor in load_file(tmp_path / "out" / "model.safetensors").values()} == {torch.bfloat16}
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"


def test_what_llama_cpp_wants_is_kept(tmp_path):
    """tokenizer.model, and all that lies beside the tokenizer, to the byte."""
    folder = save_pico("llama", tmp_path / "in", chat=True)
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tool_use.jinja").write_text("{{ messages[0]['content'] }} tools")
    (folder / "special_tokens_map.json").write_text('{"bos_token": "<s>"}')
    (folder / "merges.txt").write_text("#version: 0.2\n")
    (folder / "notes.txt").write_text("of the author's own")
    loaded = load_model(str(folder), device="cpu")
    save_checkpoint(loaded, tmp_path / "out")
    for name in ("additional_chat_templates/tool_use.jinja", "special_tokens_map.json", "merges.txt", "tokenizer.json"):
        assert (tmp_path / "out" / name).read_bytes() == (folder / name).read_bytes()
    assert not (tmp_path / "out" / "notes.txt").exists()
    assert set(load_model(str(tmp_path / "out"), device="cpu").tokenizer.chat_template) == {"default", "tool_use"}


def test_a_head_that_is_stored_beside_the_embedding_that_it_is_tied_to(tmp_path):
    folder = save_pico("llama-tied", tmp_path / "in")
    tensors = load_file(folder / "model.safetensors")
    save_file(
        tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()},
        folder / "model.safetensors",
        {"format": "pt"},
    )
    loaded = load_model(str(folder), device="cpu")
    save_checkpoint(loaded, tmp_path / "out")
    verify_checkpoint(tmp_path / "out", loaded, TEXTS)
    assert "lm_head.weight" not in load_file(tmp_path / "out" / "model.safetensors")


@pytest.mark.parametrize("said", [True, False], ids=["said", "by default"])
@pytest.mark.parametrize("family", ["llama-tied", "gemma2"])
def test_a_head_of_other_values_than_the_embedding_is_not_tied_to_it(tmp_path, family, said):
    """The config says that they are one: what the files hold counts, and the written config says so."""
    folder = save_pico(family, tmp_path / "in")
    config = json.loads((folder / "config.json").read_text())
    if not said and family == "gemma2":
        del config["tie_word_embeddings"]
        (folder / "config.json").write_text(json.dumps(config))
    tensors = load_file(folder / "model.safetensors")
    save_file(
        tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"] * 2},
        folder / "model.safetensors",
        {"format": "pt"},
    )
    loaded = load_model(str(folder), device="cpu")
    save_checkpoint(loaded, tmp_path / "out")
    verify_checkpoint(tmp_path / "out", loaded, TEXTS)
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert torch.equal(written["lm_head.weight"], tensors["model.embed_tokens.weight"] * 2)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is False
    (remark,) = read_facts(str(folder)).remarks
    assert "lm_head.weight with other values than model.embed_tokens.weight" in remark
    by_blocks = Model(str(folder), device="cpu", memory="blocks").open()
    assert not by_blocks.model.config.tie_word_embeddings
