"""tmerge adapt on a pico run: trained, scored on the run's own held-out texts, resumed, saved plain."""

import json
import shutil
import sys

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from tests.pico import save_pico
from tests.reported import typed
from tests.stages.test_merge import recipe_for
from tmerge.calibration import TextSet, sample_texts
from tmerge.comparison.compare import compare
from tmerge.errors import (
    AdaptationError,
    Cancelled,
    CheckpointError,
    MissingExtraError,
    OutputExistsError,
    RunBusyError,
    RunNotFoundError,
)
from tmerge.hub import merge_licence
from tmerge.plots import report_page
from tmerge.report import written_words
from tmerge.run import Run
from tmerge.stages.adapt import adapt_run
from tmerge.stages.merge import merge
from tmerge.store import locked
from tmerge.transport import TransportRecord

pytest.importorskip("trl")
WORDS = {"steps": 6, "batch_size": 4, "learning_rate": 2e-3, "max_tokens": 40}


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    save_pico("llama", folder / "target", layers=2)
    save_pico("qwen2", folder / "source", layers=2, seed=1, hidden_size=48, intermediate_size=80)
    return folder


@pytest.fixture(scope="module")
def run(pair, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "fused"
    merge(recipe_for(pair), folder)
    return folder


@pytest.mark.parametrize("objective", ["sft", "distill"])
def test_a_run_is_adapted(run, tmp_path, objective):
    steps = []
    report = adapt_run(run, tmp_path / "out", {**WORDS, "objective": objective}, listener=steps.append).to_dict()
    heard = [(step.unit, step.done / step.total) for step in steps if step.what.endswith("what it predicts")]
    assert heard[-1:] == ([("texts", 1.0)] if objective == "distill" else [])
    evaluation, adaptation = report["evaluation"], report["adaptation"]
    assert len(adaptation["loss_curve"]) == 6 and adaptation["objective"] == objective
    assert (adaptation["aligned_share"] is not None) == (objective == "distill")
    adapted = evaluation["adapted"]
    change = adapted["score"]["value"] - evaluation["base"]["value"]
    assert adapted["difference"]["value"] == pytest.approx(change, abs=1e-9) and change < 0
    assert adaptation["verdict"] == "helps"
    # What is said of the merge itself is still about the merge.
    merged = json.loads((run / "tmerge" / "report.json").read_text())
    assert report["verdict"] == merged["verdict"]
    assert evaluation["difference"] == merged["evaluation"]["difference"]
    page = report_page(typed(report), TransportRecord.load(tmp_path / "out" / "tmerge" / "transport.safetensors"))
    assert "After training" in page and f"{adapted['score']['value']:.4f}" in page
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.config.model_type == "llama"
    assert json.loads((tmp_path / "out" / "tmerge" / "report.json").read_text()) == json.loads(json.dumps(report))
    card = (tmp_path / "out" / "README.md").read_text()
    assert "Then it was trained" in card and f"{adapted['difference']['value']:+.4f}" in card
    # The trainer's own checkpoints are gone.
    assert not any((tmp_path / "out").rglob("*.pt"))


def test_a_stopped_training_continues_to_the_same_bytes(run, tmp_path):
    adapt_run(run, tmp_path / "whole", WORDS)

    def stop(step):
        if step.done == 5 and step.stage == "adapt":
            raise Cancelled("stopped")

    with pytest.raises(Cancelled):
        adapt_run(run, tmp_path / "cut", WORDS, listener=stop)
    with pytest.raises(OutputExistsError, match="another --out"):
        adapt_run(run, tmp_path / "cut", {**WORDS, "steps": 7})
    adapt_run(run, tmp_path / "cut", WORDS)
    whole, cut = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "cut"))
    assert whole.keys() == cut.keys() and all(torch.equal(whole[name], cut[name]) for name in whole)


@pytest.mark.slow
def test_a_folder_that_another_process_trains_in_is_refused_and_stays(run, tmp_path):
    def stop(step):
        if step.done == 1 and step.stage == "adapt":
            raise Cancelled("stopped")

    out = tmp_path / "out"
    with pytest.raises(Cancelled):
        adapt_run(run, out, WORDS, listener=stop)
    with locked(Run(out).cache, out):
        before = sorted(out.rglob("*"))
        with pytest.raises(RunBusyError, match=r"another tmerge \(process .*\) is at work in .*out; wait") as caught:
            adapt_run(run, out, WORDS)
        assert "\n" not in str(caught.value) and caught.value.exit_code == 2
        assert sorted(out.rglob("*")) == before
    assert adapt_run(run, out, WORDS).adaptation.steps == WORDS["steps"]


def test_held_out_texts_are_never_trained_on(run, tmp_path):
    held_out = TextSet.load(run / "tmerge" / "cache" / "calibration.json").held_out
    data = tmp_path / "data.txt"
    others = sample_texts("malay")[:30]
    data.write_text("\n".join([*held_out, *others]), encoding="utf-8")
    report = adapt_run(run, tmp_path / "out", {**WORDS, "steps": 9}, dataset=str(data)).to_dict()
    assert report["adaptation"]["data"]["texts"] == len(others)
    card = (tmp_path / "out/README.md").read_text()
    assert "and then `tmerge adapt --dataset data.txt`" in card


def test_the_texts_that_are_left_over_are_told_of(run, tmp_path):
    heard = []
    report = adapt_run(run, tmp_path / "out", WORDS, dataset="samples:malay", listener=heard.append)
    said = (
        "samples:malay has more texts than the training reads: 24 of them, as 6 steps of 4 texts do not reach further"
    )
    assert report.notes[0].startswith(said) and report.adaptation.data.texts == 24
    assert any(step.stage == "note" and step.what.startswith(said) for step in heard)


@pytest.fixture
def another(pair):
    """Puts another model in the place of a role's; the former is put back afterwards."""
    before = {path: path.read_bytes() for role in ("target", "source") for path in (pair / role).iterdir()}

    def replace(role):
        keys = {"target": {"seed": 7}, "source": {"seed": 8, "hidden_size": 48, "intermediate_size": 80}}
        save_pico({"target": "llama", "source": "qwen2"}[role], pair / role, layers=2, **keys[role])

    yield replace
    for path, data in before.items():
        path.write_bytes(data)


@pytest.mark.parametrize("role", ["target", "source"])
def test_a_model_that_is_another_since_the_merge_is_refused_before_anything_is_begun(run, tmp_path, another, role):
    another(role)
    with pytest.raises(CheckpointError, match=f"{role}' changed since it was merged") as caught:
        adapt_run(run, tmp_path / "out", WORDS)
    assert "\n" not in str(caught.value) and caught.value.exit_code == 2
    assert not (tmp_path / "out").exists()


def test_a_source_that_is_not_read_may_be_another(run, tmp_path, another):
    another("source")
    assert adapt_run(run, tmp_path / "out", {**WORDS, "objective": "sft", "steps": 1}).adaptation.steps == 1


@pytest.mark.parametrize("role", ["target", "source"])
def test_a_model_that_changes_before_it_is_loaded_is_refused(run, tmp_path, another, role, monkeypatch):
    monkeypatch.setattr("tmerge.stages.merged_models.MergedModels.refuse_changed", lambda self, *roles: another(role))
    with pytest.raises(CheckpointError, match=f"{role}' changed since it was merged"):
        adapt_run(run, tmp_path / "out", WORDS)
    assert not (tmp_path / "out").exists()


def test_after_one_that_diverged_another_can_be_begun_in_its_folder(run, tmp_path):
    out = tmp_path / "out"
    with pytest.raises(AdaptationError, match="diverged; lower adaptation.learning_rate"):
        adapt_run(run, out, {**WORDS, "learning_rate": 1e30})
    assert not out.exists()
    assert adapt_run(run, out, WORDS).adaptation.verdict == "helps"


@pytest.mark.parametrize(("missing", "words"), [("trl", {}), ("peft", {"lora_rank": 2})])
def test_without_its_packages_nothing_is_begun(run, tmp_path, monkeypatch, missing, words):
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(MissingExtraError, match="needs trl and peft: pip install"):
        adapt_run(run, tmp_path / "out", {**WORDS, **words})
    assert not (tmp_path / "out").exists()


def test_nothing_of_the_merges_checkpoint_is_said_of_the_trained_one(run, tmp_path):
    fused = tmp_path / "fused"
    shutil.copytree(run, fused)
    path, save = fused / "tmerge/report.json", fused / "tmerge/cache/save.json"
    document, saved = json.loads(path.read_text()), json.loads(save.read_text())
    chosen = "fusion.alpha auto found no alpha that clearly gains: the merge leaves the target unchanged"
    of_files = written_words("5.0", ["LICENSE"], ["licenses/source/NOTICE"])
    saved["facts"] |= {"least_release": "5.0", "licence_files": ["LICENSE"]}
    saved["facts"] |= {"source_licence_files": ["licenses/source/NOTICE"]}
    before = [*document["notes"], chosen, *of_files]
    path.write_text(json.dumps(document | {"notes": before, "dtype": "bfloat16", "versions": {"torch": "1.0"}}))
    save.write_text(json.dumps(saved))
    report = adapt_run(fused, tmp_path / "out", {**WORDS, "alpha": 0.0})
    # No such files lie in its folder, and it is of a kind that every release reads.
    assert not any(line in note for line in of_files for note in report.notes)
    assert f"of the merge, before the training: {chosen}" in report.notes and chosen not in report.notes
    licence = merge_licence(report)
    lasting = [line for line in before if line in (*licence.refusals, *licence.unknown)]
    assert lasting and set(lasting) <= set(report.notes)
    assert report.dtype == "float32" and report.adaptation.versions["torch"] == torch.__version__
    card = (tmp_path / "out/README.md").read_text()
    assert "of the merge, before the training: fusion.alpha auto" in card
    assert "with nothing of what was transported (strength 0)" in card
    assert f"torch {torch.__version__}" in card.split("Trained with ")[1].split("\n")[0]


def test_without_its_cache_a_run_cannot_be_adapted(tmp_path):
    (tmp_path / "tmerge").mkdir()
    with pytest.raises(RunNotFoundError):
        adapt_run(tmp_path, tmp_path / "out", WORDS)
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_compare_trains_every_row_on_the_same_tokens(pair, tmp_path):
    comparison = {"rows": ["sft", "distill", "fused+sft", "fused+distill"], "seeds": [0, 1], "alphas": []}
    recipe = recipe_for(pair, compare=comparison, adaptation=WORDS, evaluation={"descent": 4})
    result = compare(recipe, tmp_path / "c")
    rows = {row.name: row for row in result.rows}
    trained = [rows[name] for name in comparison["rows"]]
    assert len({(row.tokens, row.steps) for row in trained}) == 1
    for row in trained:
        values = [seed.value for seed in row.seeds]
        assert len(values) == 2 and min(values) <= row.value <= max(values)
        assert row.difference.high < 0
    assert len({row.value for row in trained}) == 4
    added = {item.row: item for item in result.added}
    assert {name: item.to for name, item in added.items()} == {"fused+sft": "sft", "fused+distill": "distill"}
    for name, item in added.items():
        assert item.value == pytest.approx(rows[name].value - rows[item.to].value, abs=1e-9)
        assert item.low <= item.value <= item.high
        assert sum(seed.value for seed in item.seeds) / 2 == pytest.approx(item.value, abs=1e-9)
        for place in ("compare.md", "compare.html"):
            assert f"{name} against {item.to}: {item.value:+.4f}" in (tmp_path / "c" / place).read_text()
    assert "Training loss" in (tmp_path / "c" / "compare.html").read_text()
    assert not list((tmp_path / "c" / "training").iterdir())
