"""The model card: valid for the Hub's own client offline, true to the report, and safe against what others wrote."""

from __future__ import annotations

import json
import shutil

import pytest
from huggingface_hub import ModelCard, ModelCardData
from huggingface_hub.repocard_data import model_index_to_eval_results

from tests.pico import save_pico
from tests.reported import adaptation, texts, typed
from tmerge.hub import card_text as card_text_of
from tmerge.hub import plan_push
from tmerge.recipe import Recipe
from tmerge.run import Run
from tmerge.stages.merge import merge

COMMIT = {"target": "1" * 40, "source": "2" * 40}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("card")
    for name, family, seed in (("target", "llama", 1), ("source", "qwen2", 2)):
        save_pico(family, folder / name, seed=seed)
    recipe = Recipe(
        target=str(folder / "target"),
        source=str(folder / "source"),
        calibration={"dataset": "samples:thai", "texts": 90},
        fusion={"alpha": 0.3, "top_k": 16},
    )
    merge(recipe, folder / "fused")
    return Run(folder / "fused")


@pytest.fixture
def report(run):
    """Of two Hub models, as a run of them would have it."""
    found = run.report().to_dict()
    for role in ("target", "source"):
        found[role] |= {"ref": f"user/{role}@{COMMIT[role][:7]}", "commit": COMMIT[role], "licence": "apache-2.0"}
    return found


def card_text(document, recipe, **options):
    return card_text_of(typed(document), recipe, **options)


def body(text):
    return text.split("---\n", 2)[2]


def test_metadata_is_what_the_hub_reads(run, report):
    card = ModelCard(card_text(report, run.recipe(), repo="user/fused"))
    data = card.data
    assert isinstance(data, ModelCardData)
    assert data.base_model == ["user/target", "user/source"] and data.get("base_model_relation") == "merge"
    assert data.pipeline_tag == "text-generation"
    assert data.to_dict()["library_name"] == "transformers"
    assert {"merge", "tmerge", "transport-and-merge"} <= set(data.tags)
    assert data.language == ["th"] and data.license == "apache-2.0" and data.get("license_name") is None
    score, change = data.eval_results
    evaluation = report["evaluation"]
    assert score.metric_value == pytest.approx(evaluation["fused"]["value"], abs=1e-6)
    assert change.metric_value == pytest.approx(evaluation["difference"]["value"], abs=1e-6)
    low, high = evaluation["difference"]["ci95"]
    assert f"{low:+.4f} to {high:+.4f}" in change.metric_name
    # What is written is read back the same.
    again = ModelCard(str(card))
    assert again.data.to_dict() == data.to_dict()
    assert model_index_to_eval_results(data.to_dict()["model-index"])[0] == data.model_name == "fused"


def test_an_adapter_is_of_its_target_alone(run, report):
    report["saved_adapter"] = {"rank": 16, "modules": 14, "parameters": 123456}
    card = ModelCard(card_text(report, run.recipe(), repo="user/fused"))
    assert (card.data.base_model, card.data.get("base_model_relation")) == ("user/target", "adapter")
    assert card.data.to_dict()["library_name"] == "peft" and "lora" in card.data.tags
    assert "rank 16, 14 modules, 123,456 parameters" in card.text
    at = f'"user/target", revision="{report["target"]["commit"]}"'
    assert f"AutoModelForCausalLM.from_pretrained({at})" in card.text
    assert f"AutoTokenizer.from_pretrained({at})" in card.text
    assert 'PeftModel.from_pretrained(model, "user/fused")' in card.text


def test_every_number_in_the_table_is_the_reports(run, report):
    text = card_text(report, run.recipe(), repo="user/fused")
    evaluation = report["evaluation"]
    for item in (evaluation["base"], evaluation["fused"], evaluation["source"], *evaluation["controls"].values()):
        assert f"| {item['value']:.4f} | {item['ci95'][0]:.4f} to {item['ci95'][1]:.4f} |" in text
    for name in ("shrink", "noise", "permuted"):
        assert f"control: {name}" in text
    for projection in report["fusion"]["projections"].values():
        assert f"{projection['neurons']} of {projection['of']}" in text


def test_the_body_says_how_to_load_reproduce_and_cite(run, report):
    recipe = run.recipe()
    text = body(card_text(report, recipe, repo="user/fused"))
    assert 'AutoModelForCausalLM.from_pretrained("user/fused")' in text
    assert "tmerge reproduce user/fused" in text and "tmerge merge --plan user/fused" in text
    assert COMMIT["target"] in text and COMMIT["source"] in text and "eprint        = {2602.05495}" in text
    assert "biases" in text and "## Limitations" in text
    assert f"```yaml\n{recipe.to_yaml().rstrip()}\n```" in text
    for name in ("scores", "coupling"):
        assert f"(tmerge/figures/{name}.png)" in text
        assert (run.folder / f"tmerge/figures/{name}.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("verdict", "value", "first"),
    [
        ("hurts", 0.2, "**The merge hurts"),
        ("helps", -0.2, "The merge helps"),
        ("better, but not by the source", -0.2, "The merge is better than its target, but not by the source: -0.2000"),
        ("no difference", 0.0, "The merge makes no"),
    ],
)
def test_the_verdict_comes_first(run, report, verdict, value, first):
    report["verdict"] = verdict
    report["evaluation"]["difference"] = {"value": value, "ci95": [value - 0.1, value + 0.1]}
    paragraphs = body(card_text(report, run.recipe())).strip().split("\n\n")
    assert paragraphs[0].startswith("# ") and paragraphs[1].startswith(first)
    assert ("not as a model to be used" in paragraphs[1]) == (verdict == "hurts")


def test_of_a_trained_run_the_training_decides(run, report):
    report["adaptation"] = adaptation()
    worse = {"value": 0.3, "ci95": [0.2, 0.4]}
    report["evaluation"]["adapted"] = {"score": worse, "difference": worse, "difference_to_fused": worse}
    assert typed(report).published_verdict == "hurts"
    text = card_text(report, run.recipe())
    assert "worse than the target it was made from" in body(text).strip().split("\n\n")[1]
    assert "**fused and trained**" in text
    assert ModelCard(text).data.eval_results[1].metric_value == 0.3


def test_what_others_wrote_is_text(run, report):
    report["notes"].append("<script>alert(1)</script> [here](javascript:alert(1)) | a | b")
    report["target"]["licence"] = "<img src=x onerror=alert(1)>"
    report["calibration"]["dataset"] = "evil`|</code><b>name"
    text = body(card_text(report, run.recipe()))
    outside = text.replace("`evil'¦</code><b>name`", "")
    assert "<script" not in outside and "<img" not in outside and "<b>" not in outside
    assert "[here](javascript" not in outside


def test_a_licence_that_is_not_known_is_other_with_its_name(run, report):
    report["source"]["licence"] = "our-own"
    data = ModelCard(card_text(report, run.recipe(), repo="user/fused")).data
    assert data.license == "other" and data.get("license_name") and data.get("license_link").startswith("https://")


def test_local_models_are_not_pointed_at(run):
    card = ModelCard(card_text_of(run.report(), run.recipe()))
    assert card.data.base_model is None and card.data.get("base_model_relation") is None
    assert any("files of this machine" in line for line in plan_push(run.folder, "user/x", even_if_worse=True).warnings)


def test_the_language_of_other_texts_is_the_recipes(run, report):
    recipe = run.recipe().model_dump(mode="json")
    recipe["calibration"]["dataset"], recipe["save"]["language"] = "texts.jsonl", ["ms", "yue"]
    assert ModelCard(card_text(report, Recipe.from_mapping(recipe))).data.language == ["ms", "yue"]


def test_a_llama_asks_for_its_name(run, tmp_path):
    report = run.report().to_dict()
    report["source"]["licence"] = "llama3.2"
    shutil.copytree(run.folder, tmp_path / "fused")
    (tmp_path / "fused/tmerge/report.json").write_text(json.dumps(report))
    named = [plan_push(tmp_path / "fused", repo, even_if_worse=True).warnings for repo in ("user/x", "user/Llama-x")]
    assert any('begins with "Llama"' in line for line in named[0])
    assert not any('begins with "Llama"' in line for line in named[1])


def test_only_what_is_at_hand_nowhere_is_named_as_local(run, report):
    def sentence():
        text = body(card_text(report, run.recipe(), repo="user/fused"))
        return text.partition("files that are not on the Hub (")[2].partition(")")[0]

    assert sentence() == ""
    # A demo model comes out of a package.
    report["source"] |= {"ref": "demo:gemma-3-270m", "commit": "sha256:" + "3" * 64}
    assert sentence() == ""
    report["target"] |= {"ref": "demo:smollm2-135m-instruct", "commit": "sha256:" + "4" * 64}
    report["source"]["ref"] = "/home/someone/models/mine"
    assert sentence() == "mine"
    report["target"]["ref"] = "/home/someone/models/yours"
    report["calibration"] |= {"dataset": "texts.jsonl", "revision": None}
    assert sentence() == "yours, mine, texts.jsonl"


def test_the_training_set_is_named_with_its_commit(run, report):
    worse = {"value": 0.3, "ci95": [0.2, 0.4]}
    report["evaluation"]["adapted"] = {"score": worse, "difference": worse, "difference_to_fused": worse}
    data = texts(dataset="user/lessons", revision="5" * 40, sha256="6" * 64, held_out=0, notes=[])
    report["adaptation"] = adaptation(data)
    text = card_text(report, run.recipe(), repo="user/fused")
    calibrated = f"| calibration set | `samples:thai` | sha256 `{report['calibration']['sha256']}` |"
    assert f"{calibrated}\n| training set | `user/lessons` | `{'5' * 40}` |\n\nSeed" in text
    assert ModelCard(text).data.datasets == ["user/lessons"]
    data |= {"dataset": "lessons.jsonl", "revision": None}
    text = card_text(report, run.recipe(), repo="user/fused")
    assert (
        f"| training set | `lessons.jsonl` | sha256 `{'6' * 64}` |" in text and "not on the Hub (lessons.jsonl)" in text
    )
    assert ModelCard(text).data.datasets is None


def test_what_the_source_was_before_its_fine_tuning_is_in_the_table_with_its_terms(run, report):
    assert "| source_base |" not in card_text(report, run.recipe())
    commit = "7" * 40
    report["source_base"] = f"user/base@{commit}"
    row = f"| source_base | [`user/base`](https://huggingface.co/user/base) | `{commit}` |"
    # A report of before has the reference alone.
    text = card_text(report, run.recipe(), repo="user/fused")
    assert f"{row}\n| calibration set |" in text and ModelCard(text).data.license == "apache-2.0"
    facts = {**report["source"], "ref": report["source_base"], "commit": commit, "licence": "gemma"}
    report["source_base_model"] = facts
    text = card_text(report, run.recipe(), repo="user/fused")
    assert row in text and "- source_base: [`user/base`](https://huggingface.co/user/base), gemma" in text
    data = ModelCard(text).data
    assert data.license == "gemma" and data.base_model == ["user/target", "user/source"]
    assert "Gemma is provided under and subject to" in text
    report["source_base"] = "/home/someone/models/base"
    del report["source_base_model"]
    text = card_text(report, run.recipe(), repo="user/fused")
    assert "| source_base | `base` | not in the report |" in text
