"""A merge that is written as a LoRA of its target: PEFT loads it, and the two are the model that was scored."""

from __future__ import annotations

import json
import shutil
import warnings

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, PreTrainedModel

from tests.models.pico_gguf import save_pico_gguf
from tests.pico import pico_model, save_pico
from tests.pico_adapter import save_adapter
from tests.stages.test_task_vector import _deeper, _shaken, recipe_for, save_all
from tests.test_cli import run  # noqa: F401 - a fixture
from tmerge.errors import RecipeError, UnsupportedModelError
from tmerge.hub.push import plan_push
from tmerge.models import load_model
from tmerge.preflight.check import check
from tmerge.recipe import Recipe, load_recipe
from tmerge.run import Run
from tmerge.stages.adapt import adapt_run
from tmerge.stages.merge import merge

IDS = torch.arange(5, 45)[None]
OPTIONS = {"target_modules": ["q_proj", "v_proj", "down_proj"], "size": 0.05}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    target = pico_model("llama")
    base = _shaken(_deeper(target), 0.02, 1)
    save_all(folder, target=target, base=base, source=_shaken(base, 0.05, 2))
    save_adapter(folder / "base", folder / "lora", **OPTIONS)
    save_adapter(folder / "base", folder / "dora", use_dora=True, **OPTIONS)
    return folder


def carried(models, adapter="lora", **sections) -> Recipe:
    data = recipe_for(models).model_dump(mode="json", exclude={"fusion", "save"})
    data |= {"source": str(models / "base"), "adapter": str(models / adapter)}
    data |= {"fusion": {"alpha": 1.0}, "save": {"form": "adapter"}}
    return Recipe.from_mapping({**data, **sections})


def logits(model: PreTrainedModel) -> torch.Tensor:
    with torch.inference_mode():
        return model.eval()(IDS).logits


def by_peft(target, folder) -> PeftModel:
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # such as of keys that find no place
        return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32), folder)


def test_the_licence_files_of_the_target_and_of_its_adapter_go_with_it(models, tmp_path):
    shutil.copytree(models, tmp_path / "models")
    lora = save_adapter(tmp_path / "models" / "target", tmp_path / "models" / "tuned", **OPTIONS)
    (tmp_path / "models" / "target" / "LICENSE").write_text("of the target")
    for name in ("LICENSE", "NOTICE"):
        (lora / name).write_text("of its adapter")
    report = merge(carried(tmp_path / "models"), tmp_path / "lora")
    assert report.saved_adapter is not None and any(note.endswith("the weights: LICENSE") for note in report.notes)
    assert (tmp_path / "lora" / "LICENSE").read_text() == "of the target"
    report = merge(carried(tmp_path / "models", target=str(lora), save={"form": "merged"}), tmp_path / "whole")
    assert any(note.endswith("the weights: LICENSE, NOTICE") for note in report.notes)
    assert (tmp_path / "whole" / "LICENSE").read_text() == "of the target"
    assert (tmp_path / "whole" / "NOTICE").read_text() == "of its adapter"


def test_a_carried_adapter_keeps_its_rank_and_is_the_merged_model(models, tmp_path):
    report = merge(carried(models), tmp_path / "lora")
    merged = merge(carried(models, save={"form": "merged"}, fusion={"alpha": 1.0, "stream": False}), tmp_path / "whole")
    assert report.evaluation.fused == merged.evaluation.fused
    adapter = by_peft(models / "target", tmp_path / "lora")
    whole = AutoModelForCausalLM.from_pretrained(tmp_path / "whole", dtype=torch.float32)
    torch.testing.assert_close(logits(adapter), logits(whole), rtol=1e-4, atol=1e-4)
    assert (logits(adapter) - logits(AutoModelForCausalLM.from_pretrained(models / "target"))).abs().max() > 0.01
    torch.testing.assert_close(logits(adapter.merge_and_unload()), logits(whole), rtol=1e-4, atol=1e-4)
    config = json.loads((tmp_path / "lora/adapter_config.json").read_text())
    assert (config["r"], config["rank_pattern"]) == (4, {})
    assert config["target_modules"] == ["down_proj", "q_proj", "v_proj"]
    stored = load_file(tmp_path / "lora/adapter_model.safetensors")
    assert (report.saved_adapter.rank, report.saved_adapter.modules) == (4, 6) and merged.saved_adapter is None
    assert report.transport.in_place is None  # of other shapes there is no same number
    assert report.saved_adapter.parameters == sum(tensor.numel() for tensor in stored.values())
    assert not (tmp_path / "lora/config.json").exists() and not (tmp_path / "lora/model.safetensors").exists()
    # What is written is read wherever a model is named.
    read = load_model(str(tmp_path / "lora"), device="cpu", dtype="float32").model
    torch.testing.assert_close(logits(read), logits(whole), rtol=1e-4, atol=1e-4)


def test_the_same_run_written_in_the_other_form_leaves_nothing_of_the_first(models, tmp_path):
    alone = {"alpha": 1.0, "stream": False}
    out = tmp_path / "out"
    merge(carried(models, fusion=alone), out)
    first = load_file(out / "adapter_model.safetensors")
    merge(carried(models, fusion=alone, save={"form": "merged"}), out)
    assert (out / "config.json").exists() and (out / "model.safetensors").exists()
    assert not (out / "adapter_config.json").exists() and not (out / "adapter_model.safetensors").exists()
    merge(carried(models, fusion=alone), out)
    assert not (out / "config.json").exists() and not (out / "model.safetensors").exists()
    again = load_file(out / "adapter_model.safetensors")
    assert again.keys() == first.keys() and all(torch.equal(again[name], first[name]) for name in first)


def test_what_is_trained_on_top_of_it_is_a_whole_model_and_says_so(models, tmp_path):
    pytest.importorskip("trl")
    merge(carried(models), tmp_path / "lora")
    report = adapt_run(tmp_path / "lora", tmp_path / "out", {"steps": 2, "batch_size": 4, "max_tokens": 40})
    assert (tmp_path / "out/config.json").is_file() and not (tmp_path / "out/adapter_config.json").exists()
    written = Run(tmp_path / "out").recipe()
    assert written.save.form == "merged" and report.saved_adapter is None
    assert "form: merged" in (tmp_path / "out/README.md").read_text()
    # Else it is the merge's own, with what the training was.
    merged = Run(tmp_path / "lora").recipe()
    assert merged.save.form == "adapter" and written.adaptation.steps == 2
    assert written.digest("fusion", "transport", "target", "source") == merged.digest(
        "fusion", "transport", "target", "source"
    )


@pytest.mark.parametrize("kind", ["task-vector", "reconstruct"])
def test_of_a_source_that_was_trained_whole_at_the_rank_that_is_said(models, tmp_path, kind):
    fusion = {"what": kind, "alpha": 1.0, "rank": 3}
    if kind == "reconstruct":
        fusion |= {"ridge": 0.1}
    base = {} if kind == "task-vector" else {"source_base": None, "evaluation": {"texts": 8, "controls": ["shrink"]}}
    data = recipe_for(models).model_dump(mode="json", exclude={"fusion", "save"}) | base
    report = merge(Recipe.from_mapping(data | {"fusion": fusion, "save": {"form": "adapter"}}), tmp_path / "lora")
    assert report.saved_adapter.rank == 3
    merged = merge(Recipe.from_mapping(data | {"fusion": fusion | _no_stream(kind)}), tmp_path / "whole")
    assert report.evaluation.fused == merged.evaluation.fused
    whole = AutoModelForCausalLM.from_pretrained(tmp_path / "whole", dtype=torch.float32)
    torch.testing.assert_close(
        logits(by_peft(models / "target", tmp_path / "lora")), logits(whole), rtol=1e-4, atol=1e-4
    )


def test_an_adapter_is_reconstructed_at_a_rank_and_its_plan_serves_the_next(models, tmp_path):
    fusion = {"what": "reconstruct", "alpha": 1.0, "rank": 3, "ridge": 0.1}
    few = {"texts": 8, "controls": ["shrink", "source_base"]}
    report = merge(carried(models, fusion=fusion, evaluation=few), tmp_path / "lora")
    # Beside it the control: what its base alone does.
    assert set(report.evaluation.controls) == {"shrink", "source_base"}
    assert (report.adapter, report.source.adapter.rank) == (str(models / "lora"), 4)
    assert report.saved_adapter.rank == 3 and set(report.projections.fused) >= {"k", "o", "up"}
    own = AutoModelForCausalLM.from_pretrained(models / "target", dtype=torch.float32)
    assert not torch.equal(logits(by_peft(models / "target", tmp_path / "lora")), logits(own))
    # The base was matched, and so its plan is of the base.
    again = merge(carried(models, plan=str(tmp_path / "lora")), tmp_path / "carried")
    direct = merge(carried(models), tmp_path / "direct")
    assert again.evaluation.fused.value == pytest.approx(direct.evaluation.fused.value, abs=1e-3)


def _no_stream(kind):
    return {"stream": False} if kind == "task-vector" else {}


@pytest.mark.parametrize("family", ["qwen2", "gpt2", "phi3"])
def test_biases_transposed_and_fused_modules(family, tmp_path):
    target = pico_model(family)
    save_all(tmp_path, target=target, source=_shaken(target, 0.05, 2))
    data = recipe_for(tmp_path).model_dump(mode="json", exclude={"fusion", "save"}) | {
        "source_base": str(tmp_path / "target")
    }
    fusion = {"what": "task-vector", "alpha": 0.7, "rank": 3, "stream": False}
    report = merge(Recipe.from_mapping(data | {"fusion": fusion, "save": {"form": "adapter"}}), tmp_path / "lora")
    merge(Recipe.from_mapping(data | {"fusion": fusion}), tmp_path / "whole")
    adapter = by_peft(tmp_path / "target", tmp_path / "lora")
    whole = AutoModelForCausalLM.from_pretrained(tmp_path / "whole", dtype=torch.float32)
    torch.testing.assert_close(logits(adapter), logits(whole), rtol=1e-4, atol=2e-4)
    has_biases = any(name.endswith(".bias") for name in load_file(tmp_path / "lora/adapter_model.safetensors"))
    assert has_biases == (family != "phi3")
    # q, k and v of one module have its three ranks together.
    assert report.saved_adapter.rank == (3 if family == "qwen2" else 9)
    assert json.loads((tmp_path / "lora/adapter_config.json").read_text())["fan_in_fan_out"] == (family == "gpt2")
    # Source and target are of one shape and order: that what is carried is a copy is found, and said.
    assert report.transport.in_place == 1
    assert any("every neuron is matched with the source's of the same number" in note for note in report.notes)


def test_nothing_chosen_is_an_adapter_that_changes_nothing(models, tmp_path):
    report = merge(carried(models, fusion={"alpha": 0.0}), tmp_path / "lora")
    assert (report.saved_adapter.rank, report.evaluation.difference.value) == (1, 0.0)
    own = AutoModelForCausalLM.from_pretrained(models / "target", dtype=torch.float32)
    assert torch.equal(logits(by_peft(models / "target", tmp_path / "lora")), logits(own))


def test_of_several_sources_none_of_which_is_carried(models, tmp_path):
    both = [{"adapter": str(models / "lora")}, {"source": str(models / "source")}]
    more = {"source": None, "adapter": None, "sources": both, "fusion": {"alpha": 0.0, "rank": 4}}
    data = carried(models).model_dump(mode="json") | {"evaluation": {"texts": 8, "descent": 4}}
    report = merge(Recipe.from_mapping(data | more), tmp_path / "lora")
    assert (report.saved_adapter.rank, report.evaluation.difference.value, report.evaluation.descent) == (1, 0.0, None)
    own = AutoModelForCausalLM.from_pretrained(models / "target", dtype=torch.float32)
    assert torch.equal(logits(by_peft(models / "target", tmp_path / "lora")), logits(own))


def test_a_rank_that_is_nearly_all(models, tmp_path):
    # k and v have 32 outputs.
    data = recipe_for(models).model_dump(mode="json", exclude={"fusion", "save"})
    recipe = Recipe.from_mapping(data | _form({"what": "task-vector", "alpha": 1.0, "rank": 27}))
    report = merge(recipe, tmp_path / "lora")
    assert report.saved_adapter.rank == 27


def test_a_target_with_experts(models, tmp_path):
    save_pico("qwen3_moe", tmp_path / "moe", decoder_sparse_step=2)
    with pytest.raises(UnsupportedModelError, match=r"the target has experts .* to some of q, k, v and o"):
        check(carried(models, target=str(tmp_path / "moe")))
    fusion = {"alpha": 1.0, "projections": ["q", "v"]}
    report = merge(carried(models, target=str(tmp_path / "moe"), fusion=fusion), tmp_path / "lora")
    assert report.saved_adapter.modules == 4
    merge(carried(models, target=str(tmp_path / "moe"), fusion=fusion, save={"form": "merged"}), tmp_path / "whole")
    whole = AutoModelForCausalLM.from_pretrained(tmp_path / "whole", dtype=torch.float32)
    adapter = by_peft(tmp_path / "moe", tmp_path / "lora")
    torch.testing.assert_close(logits(adapter), logits(whole), rtol=1e-4, atol=1e-4)


def test_a_packed_target(models, tmp_path):
    packed = save_pico_gguf(tmp_path / "target.gguf", seed=0)
    report = merge(carried(models, target=str(packed), dtype="float32"), tmp_path / "lora")
    assert any("PEFT loads it" in note for note in report.notes)
    assert 'from_pretrained(FOLDER, gguf_file="target.gguf")' in (tmp_path / "lora/README.md").read_text()
    own = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="target.gguf", dtype=torch.float32)
    before = logits(own)
    assert not torch.equal(logits(PeftModel.from_pretrained(own, tmp_path / "lora")), before)


def test_card_and_push(models, tmp_path):
    out = tmp_path / "lora"
    merge(carried(models), out)
    card = (out / "README.md").read_text()
    assert "library_name: peft" in card and "PeftModel.from_pretrained(model" in card
    assert "The result is a LoRA adapter of `target` (rank 4, 6 modules" in card
    planned = plan_push(out, "someone/lora", even_if_worse=True)
    assert {"adapter_config.json", "adapter_model.safetensors", "tmerge/transport.safetensors"} <= planned.files.keys()
    assert not {"config.json", "model.safetensors"} & planned.files.keys()


def test_what_cannot_be_an_adapter(models, tmp_path):
    with pytest.raises(RecipeError, match="fusion.what: weights moves all of each weight"):
        load_recipe("demo", {"save.form": "adapter"})
    with pytest.raises(RecipeError, match="set fusion.rank, such as 16"):
        Recipe.from_mapping(recipe_for(models).model_dump(exclude={"fusion"}) | _form({"what": "task-vector"}))
    with pytest.raises(RecipeError, match="set fusion.rank, such as 16"):
        carried(models, fusion={"what": "reconstruct", "alpha": 1.0})
    with pytest.raises(RecipeError, match="what its base does with it is reconstructed"):
        carried(models, fusion={"what": "weights"}, save={"form": "merged"})
    with pytest.raises(RecipeError, match="set fusion.stream: false"):
        Recipe.from_mapping(
            recipe_for(models).model_dump(exclude={"fusion"}) | _form({"what": "task-vector", "stream": True})
        )
    with pytest.raises(UnsupportedModelError, match=r"by more than its rank \(a DoRA, or trained whole\)"):
        check(carried(models, "dora"))
    check(carried(models, "dora", fusion={"alpha": 1.0, "rank": 4}))
    save_adapter(models / "target", tmp_path / "of the target", target_modules=["q_proj"])
    with pytest.raises(UnsupportedModelError, match="is an adapter with its base already"):
        check(carried(models, target=str(tmp_path / "of the target")))


def _form(fusion):
    return {"fusion": fusion, "save": {"form": "adapter"}}


def test_on_the_command_line(run, models, tmp_path):  # noqa: F811
    pair = ("--target", models / "target", "--source-base", models / "base", "--adapter", models / "lora")
    small = ("--set", "calibration.held_out=0.4", "--set", "fusion.alpha=0.5", "--set", "evaluation.texts=8")
    words = ("merge", *pair, "--dataset", "samples:english", *small, "--out", tmp_path / "out")
    code, _, said = run(*words, "--save", "adapter")
    assert code == 0, said
    assert Run(tmp_path / "out").recipe().save.form == "adapter"
    assert (tmp_path / "out/adapter_model.safetensors").is_file()
    code, printed, _ = run("inspect", tmp_path / "out", "--json")
    assert code == 0 and json.loads(printed)["saved_adapter"]["rank"] == 4
    code, _, said = run(*words, "--save", "both")
    assert code == 2 and "save.form is 'both'" in said and "Traceback" not in said


def test_what_it_needs_is_less(models):
    merged, adapter = (
        check(carried(models, save={"form": form}, fusion={"alpha": 1.0, "stream": False})).estimate
        for form in ("merged", "adapter")
    )
    assert adapter.disk_bytes < merged.disk_bytes
