"""The whole road on pico models: what comes out, that it is the same every time, and after every interruption."""

import gc
import hashlib
import json
import os
import signal
import weakref

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests import forked
from tests.pico import save_pico
from tmerge.calibration import TextSet, sample_texts
from tmerge.errors import Cancelled, NoSharedStructureError, TransportError
from tmerge.models import loading
from tmerge.models import model as handles
from tmerge.recipe import Recipe
from tmerge.run import Run
from tmerge.stages.merge import STAGES, advance, merge
from tmerge.transport import TransportRecord


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """Two pico checkpoints of different family, depth and width."""
    folder = tmp_path_factory.mktemp("models")
    save_pico("llama", folder / "target", layers=3)
    save_pico("qwen2", folder / "source", layers=2, seed=1, hidden_size=48, intermediate_size=80)
    return folder


def recipe_for(pair, **sections):
    fusion = {"alpha": 0.2, "top_k": 8, **sections.pop("fusion", {})}
    # Layer plans that are met in a few sweeps: two layers against two take a thousand at the default.
    quick = {} if "what" in fusion else {"eta": 1.0}
    data = {
        "target": str(pair / "target"),
        "source": str(pair / "source"),
        "dtype": "float32",
        "calibration": {
            "dataset": "samples:english",
            "texts": 60,
            "max_tokens": 48,
            "held_out": 0.3,
            **sections.pop("calibration", {}),
        },
        "fusion": fusion,
        "transport": {**quick, **sections.pop("transport", {})},
        "evaluation": {"texts": 12, "bootstrap": 200, **sections.pop("evaluation", {})},
    }
    return Recipe.from_mapping({**data, **sections})


def weights(folder):
    return load_file(folder / "model.safetensors")


def digest(folder):
    """Of everything a run leaves for others: the checkpoint and the transport."""
    result = {}
    for path in sorted(folder.glob("*.safetensors")) + [folder / "tmerge" / "transport.safetensors"]:
        result[path.name] = hashlib.sha256(path.read_bytes()).hexdigest()
    return result


@pytest.fixture(scope="module")
def finished(pair, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "fused"
    steps = []
    report = merge(recipe_for(pair), folder, listener=steps.append).to_dict()
    return folder, report, steps


def test_the_checkpoint_is_plain_and_only_what_was_fused_changed(pair, finished):
    folder, report, _ = finished
    model = AutoModelForCausalLM.from_pretrained(folder)
    AutoTokenizer.from_pretrained(folder)
    base, fused = AutoModelForCausalLM.from_pretrained(pair / "target").state_dict(), model.state_dict()
    assert base.keys() == fused.keys()
    record = TransportRecord.load(folder / "tmerge" / "transport.safetensors")
    changed = {name for name in base if not torch.equal(base[name], fused[name])}
    assert changed == {f"model.layers.{n}.self_attn.{p}_proj.weight" for n in range(3) for p in "qkvo"}
    for name in changed:
        layer, projection = int(name.split(".")[2]), name.split(".")[4][0]
        chosen = record.tensors[f"neurons.{projection}"][layer].long()
        difference = (base[name] != fused[name]).any(0 if projection == "o" else 1)
        assert set(difference.nonzero().flatten().tolist()) <= set(chosen.tolist())
        assert len(chosen) == 8


def test_the_report_holds_what_the_design_promises(finished):
    folder, report, _ = finished
    assert report == json.loads((folder / "tmerge" / "report.json").read_text())
    assert report["schema"] == 1
    assert report["target"]["architecture"] == "llama" and report["target"]["layers"] == 3
    assert report["source"]["architecture"] == "qwen2" and report["source"]["layers"] == 2
    assert report["target"]["commit"].startswith("sha256:")
    calibration = report["calibration"]
    assert calibration["texts"] + calibration["held_out_texts"] == 60
    transport = report["transport"]
    # Six feature keys (qkv.pre, q k v .post, o.pre, o.post), each with 3 x 2 layer pairs.
    assert transport["problems"] == 36 == transport["converged"]
    assert transport["worst_marginal_violation"] < 1e-6
    for name in "qkvo":
        assert len(report["fusion"]["projections"][name]["norm_ratio"]) == 3
    evaluation = report["evaluation"]
    assert set(evaluation["controls"]) == {"shrink", "noise", "permuted"}
    low, high = evaluation["difference"]["ci95"]
    assert low <= evaluation["difference"]["value"] <= high
    assert evaluation["difference"]["value"] == pytest.approx(
        evaluation["fused"]["value"] - evaluation["base"]["value"], abs=1e-12
    )
    known = all(item["fused_minus_control"]["ci95"][1] < 0 for item in evaluation["controls"].values())
    better = "helps" if known else "better, but not by the source"
    expected = better if high < 0 else "hurts" if low > 0 else "no difference"
    assert report["verdict"] == expected
    assert [stage["name"] for stage in report["stages"]] == list(STAGES)
    assert report["timing"]["forward_seconds"] < report["timing"]["total_seconds"]


def test_the_listener_hears_every_stage_and_the_layer_costs(finished):
    _, _, steps = finished
    assert [stage for stage in STAGES if stage in {step.stage for step in steps}] == list(STAGES)
    rows = [step.row for step in steps if step.row is not None]
    assert len(rows) == 18 and all(costs.shape == (2,) for _, _, costs in rows)


def test_alpha_zero_changes_no_byte(pair, tmp_path):
    merge(recipe_for(pair, fusion={"alpha": 0.0}), tmp_path / "fused")
    base = weights(pair / "target")
    fused = weights(tmp_path / "fused")
    assert base.keys() == fused.keys()
    for name, tensor in base.items():
        assert tensor.numpy().tobytes() == fused[name].numpy().tobytes(), name


@pytest.mark.slow
def test_a_task_vector_of_nothing_changes_no_byte(pair, tmp_path):
    recipe = recipe_for(pair, source_base=str(pair / "source"), fusion={"what": "task-vector", "alpha": 1.5})
    report = merge(recipe, tmp_path / "fused").to_dict()
    base, fused = weights(pair / "target"), weights(tmp_path / "fused")
    assert all(torch.equal(base[name], fused[name]) for name in base)
    assert any("task vector is zero" in note for note in report["notes"])
    assert report["source_base_model"] == report["source"]
    card = (tmp_path / "fused/README.md").read_text()
    assert f"| source_base | `source` | `{report['source']['commit']}` |" in card
    assert report["verdict"] == "no difference"


@pytest.mark.slow
def test_all_seven_projections_with_biases_and_a_fraction(tmp_path):
    save_pico("qwen2", tmp_path / "target", layers=2)
    save_pico("qwen2", tmp_path / "source", layers=3, seed=1, hidden_size=48)
    projections = ["q", "k", "v", "o", "gate", "up", "down"]
    recipe = recipe_for(tmp_path, fusion={"alpha": 0.5, "top_k": 0.5, "projections": projections})
    report = merge(recipe, tmp_path / "fused").to_dict()
    fused = report["fusion"]["projections"]
    assert list(fused) == projections
    assert fused["q"]["bias"] == "fused" and fused["o"]["bias"] == "none"
    assert fused["gate"]["neurons"] == fused["gate"]["of"] // 2
    base, merged = weights(tmp_path / "target"), weights(tmp_path / "fused")
    assert not torch.equal(base["model.layers.0.self_attn.q_proj.bias"], merged["model.layers.0.self_attn.q_proj.bias"])


def test_a_projection_that_one_side_lacks_is_skipped_and_named(pair, tmp_path):
    save_pico("gpt2", tmp_path / "source", layers=2, seed=3)
    recipe = recipe_for(pair, source=str(tmp_path / "source"), fusion={"projections": ["q", "gate", "down"]})
    report = merge(recipe, tmp_path / "fused").to_dict()
    assert report["projections"]["fused"] == ["q", "down"]
    assert "gate" in report["projections"]["skipped"]


@pytest.mark.slow
def test_same_model_on_both_sides_is_allowed_and_said(pair, tmp_path):
    report = merge(recipe_for(pair, source=str(pair / "target")), tmp_path / "fused").to_dict()
    assert report["same_model"] is True
    assert any("same model" in note for note in report["notes"])


def test_the_same_recipe_gives_the_same_bytes(pair, finished, tmp_path):
    merge(recipe_for(pair), tmp_path / "again")
    assert digest(tmp_path / "again") == digest(finished[0])


@pytest.mark.parametrize("stage", STAGES)
def test_a_run_stopped_in_any_stage_continues_to_the_same_bytes(pair, finished, tmp_path, stage):
    recipe, out = recipe_for(pair), tmp_path / "fused"
    seen = []

    def stop_inside(step):
        seen.append(step.stage)
        # The second step of the stage: something of it has been done, and nothing of it is finished.
        if step.stage == stage and (stage == "texts" or seen.count(stage) == 2):
            raise Cancelled("stopped by the test")

    with pytest.raises(Cancelled):
        merge(recipe, out, listener=stop_inside)
    assert not (out / "config.json").exists()
    again = []
    merge(recipe, out, listener=again.append)
    # Calibration and held-out scores of finished stages are not computed again.
    done = STAGES[: STAGES.index(stage)]
    reworked = {step.stage for step in again if step.unit != "models"}
    assert not reworked & set(done)
    assert digest(out) == digest(finished[0])


def test_a_killed_process_continues_to_the_same_bytes(pair, finished, tmp_path):
    recipe, out = recipe_for(pair), tmp_path / "fused"
    path = tmp_path / "recipe.yaml"
    path.write_text(recipe.to_yaml())
    code = (
        "import os, sys, torch\ntorch.set_num_threads(1)\n"
        "from tmerge import load_recipe, merge\n"
        "def kill(step):\n    if step.stage == 'transport' and step.done == 5: os.kill(os.getpid(), 9)\n"
        "merge(load_recipe(sys.argv[1]), sys.argv[2], listener=kill)\n"
    )
    killed = forked.run([path, out], code)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    merge(recipe, out)
    assert digest(out) == digest(finished[0])


def test_a_finished_run_is_recognised(pair, finished):
    folder, report, _ = finished
    steps = []
    again = merge(recipe_for(pair), folder, listener=steps.append).to_dict()
    assert again == report
    assert steps == []


@pytest.mark.slow
def test_another_model_in_the_same_place_is_not_taken_for_the_old_one(pair, tmp_path):
    for name in ("target", "source"):
        os.system(f"cp -r {pair / name} {tmp_path / name}")
    recipe = recipe_for(tmp_path)
    merge(recipe, tmp_path / "fused")
    before = digest(tmp_path / "fused")
    save_pico("qwen2", tmp_path / "source", layers=2, seed=9, hidden_size=48, intermediate_size=80)
    steps = []
    merge(recipe, tmp_path / "fused", listener=steps.append)
    assert "source" in {step.stage for step in steps}
    assert "texts" not in {step.stage for step in steps}
    assert digest(tmp_path / "fused") != before


def test_the_run_reads_back(finished):
    folder, report, _ = finished
    run = Run(folder)
    assert run.report().to_dict() == report
    assert run.recipe().fusion.alpha == 0.2
    assert "# " in (folder / "README.md").read_text()


def test_long_texts_from_a_file_are_cut_and_counted(pair, tmp_path):
    path = tmp_path / "texts.txt"
    path.write_text("\n".join(text * 3 for text in sample_texts("indonesian")[:60]))
    report = merge(recipe_for(pair, calibration={"dataset": str(path), "max_tokens": 16}), tmp_path / "fused").to_dict()
    assert report["calibration"]["dataset"] == "texts.txt"
    assert report["calibration"]["truncated"]["target"] == report["calibration"]["texts"]


def test_sharded_checkpoint_round_trip(pair, tmp_path):
    merge(recipe_for(pair, save={"max_shard_size": "50KB"}), tmp_path / "fused")
    assert (tmp_path / "fused" / "model.safetensors.index.json").exists()
    assert len(list((tmp_path / "fused").glob("model-*.safetensors"))) > 1
    AutoModelForCausalLM.from_pretrained(tmp_path / "fused")


def test_alpha_auto_and_the_descent_control(pair, tmp_path):
    recipe = recipe_for(
        pair,
        fusion={"alpha": "auto", "alphas": [0.1, 1.0]},
        calibration={"texts": 90, "choosing": 0.3},
        evaluation={"descent": 8},
    )
    report = merge(recipe, tmp_path / "fused").to_dict()
    calibration, choice = report["calibration"], report["fusion"]["choice"]
    assert calibration["texts"] + calibration["choosing"] + calibration["held_out_texts"] == 90
    assert choice["texts"] == min(12, calibration["choosing"])
    # Random weights have nothing to offer one another.
    assert set(choice["alpha"]) == set("qkvo") and choice["difference"]["value"] <= 0
    if not any(choice["alpha"].values()):
        assert report["verdict"] == "no difference" and any("unchanged" in note for note in report["notes"])
        base, fused = load_file(pair / "target" / "model.safetensors"), weights(tmp_path / "fused")
        assert all(torch.equal(base[name], fused[name]) for name in base)
    descent = report["evaluation"]["descent"]
    assert descent["texts"] == 8 and set(descent["projections"]) == set("qkvo")
    again = merge(recipe, tmp_path / "again").to_dict()
    assert again["fusion"]["choice"] == choice and digest(tmp_path / "again") == digest(tmp_path / "fused")
    # No text serves two purposes.
    texts = TextSet.load(tmp_path / "fused" / "tmerge" / "cache" / "calibration.json")
    assert len({*texts.texts, *texts.choosing, *texts.held_out}) == 90


@pytest.mark.slow
def test_a_run_in_turns_is_the_run_in_one(pair, tmp_path):
    recipe = recipe_for(pair)
    merge(recipe, tmp_path / "one")
    done = []
    for until in ("texts", "source", "fuse", "evaluate"):
        advance(recipe, tmp_path / "turns", until=until, listener=lambda step: done.append(step.stage))
        assert (tmp_path / "turns/tmerge/cache" / f"{until}.json").is_file()
        assert not (tmp_path / "turns/tmerge/report.json").exists()
    merge(recipe, tmp_path / "turns", listener=lambda step: done.append(step.stage))
    assert digest(tmp_path / "turns") == digest(tmp_path / "one")
    # Nothing was done twice, but for the models, which each turn loads anew.
    assert [name for name in dict.fromkeys(done) if name in STAGES] == list(STAGES)


def test_the_source_is_let_go_once_it_has_been_read(pair, tmp_path, monkeypatch, quick_collection):
    loaded, alive = [], {}
    plain = loading.load_model

    def remembered(reference, **options):
        found = plain(reference, **options)
        if reference == str(pair / "source"):
            loaded.append(weakref.ref(found.model))
        return found

    def look(step):
        if step.stage in ("source", "transport", "fuse", "evaluate", "save"):
            gc.collect()
            alive.setdefault(step.stage, []).append(any(model() is not None for model in loaded))

    monkeypatch.setattr(handles, "load_model", remembered)
    merge(recipe_for(pair), tmp_path / "fused", listener=look)
    assert len(loaded) == 1
    assert any(alive.pop("source")) and not any(any(found) for found in alive.values()) and len(alive) == 4


@pytest.mark.slow
def test_a_tokenizer_is_read_once_a_run(pair, tmp_path, monkeypatch):
    read = []
    plain = loading.read_tokenizer

    def counted(reference, *words, **options):
        read.append(reference.text)
        return plain(reference, *words, **options)

    monkeypatch.setattr(loading, "read_tokenizer", counted)
    merge(recipe_for(pair, calibration={"rows": "tokens"}), tmp_path / "fused")
    assert sorted(read) == sorted([str(pair / "source"), str(pair / "target")])


@pytest.mark.slow
def test_a_report_says_where_the_models_read_if_all_else_was_elsewhere(pair, tmp_path):
    recipe = recipe_for(pair)
    advance(recipe, tmp_path / "fused", until="source")
    note = tmp_path / "fused/tmerge/cache/target.json"
    data = json.loads(note.read_text())
    assert data["facts"]["device"] == "cpu"
    data["facts"]["device"] = "cuda"
    note.write_text(json.dumps(data))
    assert merge(recipe, tmp_path / "fused").device == "cuda (transport and fusion: cpu)"


@pytest.mark.slow
def test_a_pair_whose_relatedness_cannot_be_asked_is_merged_all_the_same(pair, tmp_path, monkeypatch):
    def refuse(*words, **options):
        raise NoSharedStructureError("what is read and what is written differ in width")

    monkeypatch.setattr("tmerge.stages.transport.relatedness", refuse)
    report = merge(recipe_for(pair), tmp_path / "fused").to_dict()
    assert report["transport"]["relatedness"] is None and not any("elatedness" in note for note in report["notes"])
    assert "elatedness" not in (tmp_path / "fused" / "README.md").read_text(encoding="utf-8")


def test_features_that_cannot_be_matched_at_all_are_not_taken_for_a_pair_that_cannot_be_asked(
    pair, tmp_path, monkeypatch
):
    def refuse(*words, **options):
        raise TransportError("features are not finite: run the models with dtype float32")

    monkeypatch.setattr("tmerge.stages.transport.relatedness", refuse)
    with pytest.raises(TransportError, match="not finite"):
        merge(recipe_for(pair), tmp_path / "fused")
