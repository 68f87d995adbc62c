"""Reconstruction as a stage: a target drawn to what a deeper relative does, stopped, and gone on with."""

import hashlib
import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from tests.pico import pico_model
from tests.stages.test_merge import digest
from tests.stages.test_task_vector import _deeper, _shaken, save_all
from tmerge.calibration import TextSet, sample_texts
from tmerge.cli.show import show_report
from tmerge.comparison.reproduce import reproduce
from tmerge.errors import (
    Cancelled,
    DatasetError,
    NotEnoughMemoryError,
    RecipeError,
    TooFewTextsError,
)
from tmerge.fusion import StoredNeurons, fuse
from tmerge.models import describe, load_model
from tmerge.plots.words import findings
from tmerge.recipe import Recipe
from tmerge.report import read_report, score_rows
from tmerge.run import Run
from tmerge.stages.adapt import adapt_run
from tmerge.stages.merge import advance, merge
from tmerge.ui.parts.progress import result_cards

IDS = torch.randint(5, 90, (4, 30), generator=torch.Generator().manual_seed(0))
SEVEN = ["q", "k", "v", "o", "gate", "up", "down"]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A target of two layers; a deeper relative that has gone a good way since."""
    folder = tmp_path_factory.mktemp("models")
    target = pico_model("llama")
    base = _deeper(target)
    return save_all(folder, target=target, base=base, source=_shaken(base, 0.15, 2))


def recipe_for(models, **sections):
    data = {
        "target": str(models / "target"),
        "source": str(models / "source"),
        "dtype": "float32",
        "calibration": {
            "dataset": "samples:indonesian",
            "texts": 70,
            "max_tokens": 48,
            "held_out": 0.3,
            "token_rows": 200,
            **sections.pop("calibration", {}),
        },
        "fusion": {"what": "reconstruct", "alpha": 1.0, "keep": None, **sections.pop("fusion", {})},
        "evaluation": {"texts": 12, "bootstrap": 200, **sections.pop("evaluation", {})},
    }
    return Recipe.from_mapping({**data, **sections})


@pytest.fixture(scope="module")
def finished(models, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "fused"
    return folder, merge(recipe_for(models), folder)


@torch.no_grad()
def distance(one, other, ids):
    """Mean KL divergence of the next token, in bits."""
    first, second = (AutoModelForCausalLM.from_pretrained(path)(ids).logits.log_softmax(-1) for path in (one, other))
    return float((first.exp() * (first - second)).sum(-1).mean()) / 0.6931


def test_every_fit_lessens_what_lacks_and_the_model_does_what_the_source_does(models, finished):
    folder, report = finished
    fit = report.fusion.fit
    assert fit.rows > 500 and fit.ridge == "auto" and fit.rank is None and fit.keep_texts == 0
    assert fit.final_goal == "logits" and report.calibration.choosing >= 8
    # Each fit has its own.
    taken = {ridge for ridges in fit.ridges.values() for ridge in ridges}
    assert {len(ridges) for ridges in fit.ridges.values()} == {2} and len(taken) > 1 and taken <= {0.01, 0.1, 1.0}
    assert set(fit.errors) == set(report.fusion.projections) == set(SEVEN)
    for name, pairs in fit.errors.items():
        assert len(pairs) == 2
        for before, after in pairs:
            assert 0 < after < before, name
    source = models / "source"
    assert distance(source, folder, IDS) < 0.7 * distance(source, models / "target", IDS)
    # Only the seven projections are others.
    here, before = load_file(folder / "model.safetensors"), load_file(models / "target/model.safetensors")
    changed = {name for name in before if not here[name].equal(before[name])}
    assert changed and all(name.split(".")[-2].endswith("_proj") for name in changed)
    assert len(changed) == 2 * len(SEVEN)


def test_shuffled_correspondences_are_the_control(models, finished):
    folder, report = finished
    assert set(report.evaluation.controls) == {"shrink", "noise", "permuted"}
    # The same fits toward the wrong neurons: as large, and no nearer to the source.
    permuted = load_model(str(models / "target"), dtype="float32")
    found = StoredNeurons(folder / "tmerge/cache/permuted")
    fuse(describe(permuted.model).layers, found, 1.0)
    assert [(item.layer, item.projection) for item in found] == [(layer, name) for layer in (0, 1) for name in SEVEN]
    permuted.model.save_pretrained(folder.parent / "permuted")
    source = models / "source"
    assert distance(source, folder, IDS) < 0.7 * distance(source, folder.parent / "permuted", IDS)


@pytest.mark.slow
def test_the_record_is_one_that_can_be_looked_at_and_fused_from(models, finished, tmp_path):
    folder, report = finished
    shutil.copytree(folder, tmp_path / "pushed", ignore=shutil.ignore_patterns("cache"))
    again = recipe_for(models, plan=str(tmp_path / "pushed"), fusion={"alpha": 0.5})
    swept = merge(again, tmp_path / "swept")
    # The same fits, from the recorded transport, at half the step.
    assert swept.fusion.fit.errors == report.fusion.fit.errors
    here, whole = (load_file(path / "model.safetensors") for path in (tmp_path / "swept", folder))
    before = load_file(models / "target/model.safetensors")
    for name, values in before.items():
        torch.testing.assert_close(here[name], (values + whole[name]) / 2, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(
    ("which", "block"),
    [
        ("reconstructing", 1),
        *(
            pytest.param(which, block, marks=pytest.mark.slow)
            for which, block in (
                ("reconstructing", 2),
                ("permuted: reconstructing", 1),
                ("permuted: reconstructing", 2),
            )
        ),
    ],
)
def test_a_run_that_is_stopped_between_blocks_goes_on_to_the_same_bytes(models, finished, tmp_path, which, block):
    out, heard = tmp_path / "fused", []

    def stop(step):
        if step.what == which and step.done == block:
            raise Cancelled("stopped")

    with pytest.raises(Cancelled):
        merge(recipe_for(models), out, listener=stop)
    report = merge(recipe_for(models), out, listener=heard.append)
    assert digest(out) == digest(finished[0])
    assert report.fusion.fit == finished[1].fusion.fit
    assert not (out / "tmerge/cache/goals").exists()
    assert ("reconstructing" in {step.what for step in heard}) == (which == "reconstructing")


@pytest.mark.slow
def test_what_was_finished_is_not_fitted_again(models, finished, tmp_path, monkeypatch):
    from tmerge.fusion import ridge

    out, solved = tmp_path / "fused", []
    solve = ridge.Regression.solve
    monkeypatch.setattr(ridge.Regression, "solve", lambda *words, **named: solved.append(1) or solve(*words, **named))

    def stop(step):
        if step.what == "reconstructing" and step.done == 1:
            raise Cancelled("stopped")

    with pytest.raises(Cancelled):
        merge(recipe_for(models), out, listener=stop)
    # Groups that read the same: q k v, o, gate up, down.
    assert len(solved) == 4
    advance(recipe_for(models, evaluation={"controls": ["shrink"]}), tmp_path / "other", until="reconstruct")
    assert len(solved) == 4 + 8
    merge(recipe_for(models), out)
    assert len(solved) == 12 + 4 + 8  # the second block, and both of the control's


@pytest.fixture(scope="module")
def kept_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "kept.jsonl"
    lines = [json.dumps({"text": text}) for text in sample_texts("english")[:80]]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def test_too_few_texts_to_be_kept_are_said_before_anything_is_read(models, tmp_path):
    recipe = recipe_for(models, fusion={"keep": "samples:english", "keep_texts": 20})
    with pytest.raises(TooFewTextsError, match=r"'samples:english': 20 rows .* raise fusion.keep_texts \(now 20\)"):
        advance(recipe, tmp_path / "fused", until="texts")


@pytest.mark.slow
def test_the_texts_to_be_kept_are_known_by_their_contents(models, kept_file, tmp_path):
    recipe = recipe_for(models, fusion={"keep": str(kept_file), "keep_texts": 80}, evaluation={"controls": []})
    report = merge(recipe, tmp_path / "fused")
    kept = report.evaluation.kept
    assert kept.file_sha256 == hashlib.sha256(kept_file.read_bytes()).hexdigest()
    # Of the 18 that are held out as many are scored as of the others; on 13 ridges are chosen.
    assert (kept.texts, report.fusion.fit.keep_texts) == (12, 49)
    # By its name: nobody else has its folder.
    assert kept.dataset == report.fusion.fit.keep == "kept.jsonl"
    # The same bytes come out again; another file of that name gives other weights, and is refused.
    assert reproduce(str(tmp_path / "fused"), tmp_path / "again").same
    before = kept_file.read_text(encoding="utf-8")
    try:
        kept_file.write_text(before + json.dumps({"text": "One more."}) + "\n", encoding="utf-8")
        with pytest.raises(DatasetError, match=r"kept.jsonl have changed since .* put that file in its place"):
            reproduce(str(tmp_path / "fused"), tmp_path / "changed")
    finally:
        kept_file.write_text(before, encoding="utf-8")


def test_texts_that_decide_are_not_among_those_to_be_kept(models, tmp_path):
    recipe = recipe_for(models, fusion={"alpha": "auto", "keep": "samples:indonesian", "keep_texts": 100})
    note = advance(recipe, tmp_path / "fused", until="texts")
    run = Run(tmp_path / "fused")
    texts, kept = (TextSet.load(path) for path in (run.texts_path, run.kept_texts_path))
    assert len(texts.choosing) >= 8 and not {*kept.texts} & {*texts.held_out, *texts.choosing}
    assert note.kept.texts == len(kept.texts) < 100 - note.kept.held_out - note.kept.choosing
    # On some of these ridges are chosen too.
    assert kept.choosing and not {*kept.choosing} & {*kept.texts, *texts.held_out, *texts.choosing}


@pytest.mark.slow
def test_running_out_of_memory_is_one_line(models, tmp_path, monkeypatch):
    def full(*words):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")

    monkeypatch.setattr("tmerge.fusion.ridge.Regression.add", full)
    with pytest.raises(NotEnoughMemoryError, match="the reconstruction does not fit in memory on cpu") as caught:
        merge(recipe_for(models), tmp_path / "fused")
    assert "\n" not in str(caught.value) and caught.value.exit_code == 2


@pytest.mark.slow
def test_texts_to_be_kept_hold_the_target_where_it_is(models, tmp_path):
    """Drawn on the texts alone the target goes further from itself on others than with these among the goals."""
    moved = []
    for fusion in ({"keep": None}, {"keep": "samples:english", "keep_share": 0.2}, {"keep": "samples:english"}):
        recipe = recipe_for(models, fusion=fusion, evaluation={"controls": ["shrink"]})
        out = tmp_path / str(len(moved))
        advance(recipe, out, until="save")
        ids = pico_tokenizer_ids(models)
        moved.append(distance(models / "target", out, ids))
    alone, little, half = moved
    assert half < 0.95 * little < 0.95 * 0.95 * alone


def test_only_the_last_down_is_fitted_to_logits(models, finished, tmp_path):
    recipe = recipe_for(models, fusion={"final_goal": "stream"}, evaluation={"controls": []})
    advance(recipe, tmp_path / "stream", until="save")
    here, there = (load_file(path / "model.safetensors") for path in (finished[0], tmp_path / "stream"))
    assert [name for name in here if not here[name].equal(there[name])] == ["model.layers.1.mlp.down_proj.weight"]


@pytest.mark.slow
def test_without_one_vocabulary_the_last_goal_is_the_stream(models, tmp_path, monkeypatch):
    monkeypatch.setattr("tmerge.stages.reconstruct.shared_vocabulary", lambda target, source: None)
    advance(recipe_for(models, evaluation={"controls": []}), tmp_path / "out", until="reconstruct")
    note = json.loads((tmp_path / "out/tmerge/cache/reconstruct.json").read_text())["facts"]
    assert note["final_goal"] == "stream"


def pico_tokenizer_ids(models):
    from transformers import AutoTokenizer

    from tmerge.calibration import sample_texts

    tokenizer = AutoTokenizer.from_pretrained(models / "target")
    ids = [tokenizer(text)["input_ids"][:24] for text in sample_texts("english")[:40]]
    return torch.tensor([row for row in ids if len(row) == 24])


@pytest.mark.slow
def test_a_rank_is_the_changes_rank(models, tmp_path):
    recipe = recipe_for(models, fusion={"rank": 3}, evaluation={"controls": ["shrink"]})
    advance(recipe, tmp_path / "fused", until="reconstruct")
    found = StoredNeurons(tmp_path / "fused/tmerge/cache/transported")
    assert len(found) == 14
    for item in found:
        assert torch.linalg.matrix_rank(item.weight, rtol=1e-4) == 3


@pytest.mark.slow
def test_auto_takes_one_step_for_all(models, tmp_path):
    recipe = recipe_for(models, fusion={"alpha": "auto"}, evaluation={"controls": ["shrink"]})
    advance(recipe, tmp_path / "fused", until="choose")
    choice = json.loads((tmp_path / "fused/tmerge/cache/choose.json").read_text())["facts"]["choice"]
    assert {tuple(trial["group"]) for trial in choice["trials"]} == {tuple(SEVEN)}
    assert len(set(choice["alpha"].values())) == 1


@pytest.mark.slow
def test_with_the_base_there_is_a_control_drawn_to_it(models, tmp_path):
    controls = ["permuted", "source_base", "texts"]
    recipe = recipe_for(models, source_base=str(models / "base"))
    assert recipe.evaluation.controls == ("shrink", "noise", "permuted", "source_base")
    recipe = recipe_for(models, source_base=str(models / "base"), evaluation={"controls": controls})
    report = merge(recipe, tmp_path / "fused")
    assert list(report.evaluation.controls) == controls
    fits = {
        name: StoredNeurons(tmp_path / f"fused/tmerge/cache/{'transported' if name == 'fused' else name}")
        for name in ("fused", *controls)
    }
    sizes = {name: sum(float(item.weight.norm() ** 2) for item in found) ** 0.5 for name, found in fits.items()}
    # The base computes what the target does: there is nothing to draw it to. Other tokens ask for more than any.
    assert sizes["source_base"] < 0.05 * sizes["fused"] < 0.05 * sizes["texts"]
    # Each name has a score of its own, and what all is held against is the target as it was.
    alone = json.loads((tmp_path / "fused/tmerge/cache/target.json").read_text())["facts"]["scores"]
    assert report.evaluation.base.value == pytest.approx(sum(alone["bits"]) / sum(alone["bytes"]))
    assert report.evaluation.controls["source_base"].difference.value != 0
    assert "toward the source before its fine-tuning" in str(score_rows(report))


@pytest.mark.slow
def test_it_is_trained_on_and_reproduced(finished, tmp_path):
    folder, report = finished
    trained = adapt_run(folder, tmp_path / "trained", {"steps": 2, "batch_size": 2, "max_tokens": 32})
    assert trained.fusion.fit == report.fusion.fit and trained.evaluation.adapted is not None
    assert reproduce(str(folder), tmp_path / "again").same is True


def test_terminal_page_and_app_say_what_to_do_next(finished, capsys):
    folder, report = finished
    show_report(report, folder)
    said = " ".join(capsys.readouterr().out.split())
    assert "fusion: reconstruct, alpha 1.0, ridge 0.01 to 0.1, chosen for each fit, full rank" in said
    assert "the last block to the source's logits" in said
    assert f"tmerge adapt {folder} --steps 50" in said and "change's norm over own norm" in said
    assert any("tmerge adapt RUN --steps 50" in line for line in findings(report))
    card = result_cards(SimpleNamespace(state="done", report=report, relatedness=None, asks="merge"))
    assert (
        "train a little on top of it, 50 steps, with the button" in card
        and "Change&#39;s norm over own norm, median" in card
    )


def test_the_report_is_read_back_and_said(finished):
    folder, report = finished
    assert read_report(folder / "tmerge/report.json").fusion.fit == report.fusion.fit
    card = (folder / "README.md").read_text()
    assert "chosen for each fit, full rank" in card and "what the source" in card
    assert "scale None" not in card and "None" not in card


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        ({"transport": {"structure": "none"}}, "needs transport.structure: shared"),
        ({"transport": {"map": "ridge"}}, "drop transport.map"),
        ({"fusion": {"top_k": 8}}, "top_k"),
        ({"fusion": {"ridge": 0}}, "a number above 0 or auto"),
        ({"evaluation": {"controls": ["source_base"]}}, "which needs that model: set source_base"),
        ({"fusion": {"what": "weights", "keep": "x"}, "evaluation": {"controls": ["texts"]}}, "keep|reconstruct alone"),
        ({"fusion": {"alpha": 1.5}}, r"fusion.alpha"),
    ],
)
def test_what_does_not_go_with_it_is_one_line(models, sections, words):
    with pytest.raises(RecipeError, match=words) as caught:
        recipe_for(models, **sections)
    assert "\n" not in str(caught.value)
