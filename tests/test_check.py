"""What can be said from the configs alone, and what is refused before anything is read."""

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.models.pico_gguf import save_pico_gguf
from tests.pico import PICO_RARE, save_pico
from tests.reported import typed
from tmerge.calibration import sample_texts
from tmerge.errors import NotEnoughDiskError, NotEnoughMemoryError, UnsupportedModelError
from tmerge.evaluation import most_scorings
from tmerge.models import load_model, model_commit, read_facts, save_checkpoint
from tmerge.plots import norm_ratios
from tmerge.plots.data import norms_data
from tmerge.plots.words import ratio_rows
from tmerge.preflight.check import check, refuse_unfit
from tmerge.preflight.models import Models
from tmerge.preflight.speed import Timing
from tmerge.quantities import bytes_words
from tmerge.recipe import Recipe
from tmerge.stages.merge import merge
from tmerge.stages.training_set import TrainingSet
from tmerge.transport import feature_keys


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    for family in ("llama", "gpt2", "mixtral"):
        save_pico(family, folder / family)
    return folder


def recipe_for(models, target, source, **sections):
    return Recipe.from_mapping({"target": str(models / target), "source": str(models / source), **sections})


def test_matches_skips_and_what_is_left_alone(models):
    result = check(recipe_for(models, "llama", "gpt2", fusion={"projections": ["q", "gate", "up"]}))
    assert result.projections == ["q", "up"] and set(result.skipped) == {"gate"}
    assert any("experts" in line for line in check(recipe_for(models, "mixtral", "llama")).target_layout.left_alone)


def test_nothing_in_common_is_refused(models):
    with pytest.raises(UnsupportedModelError, match="share none"):
        check(recipe_for(models, "llama", "gpt2", fusion={"projections": ["gate"]}))


def test_weights_are_not_read(models, tmp_path):
    save_pico("llama", tmp_path / "target")
    weights = tmp_path / "target" / "model.safetensors"
    header = int.from_bytes(weights.read_bytes()[:8], "little") + 8
    body = bytearray(weights.read_bytes())
    body[header:] = b"\xff" * (len(body) - header)  # all NaN
    weights.write_bytes(body)
    check(Recipe(target=str(tmp_path / "target"), source=str(models / "gpt2")))


def test_a_source_base_of_another_shape_is_refused(models):
    sections = {"source_base": str(models / "llama"), "fusion": {"what": "task-vector"}}
    with pytest.raises(UnsupportedModelError, match="not of the source's shape"):
        check(recipe_for(models, "llama", "gpt2", **sections))


def test_a_source_base_is_counted_and_its_gate_said(models, tmp_path, monkeypatch):
    save_pico("gpt2", tmp_path / "base", seed=7)
    # One dtype on every machine; as it is held where bfloat16 products are slow, they are float32 all the same.
    alike = {"top_k": 16, "projections": ["q", "k"], "stream": False}
    plain = {"dtype": "float32", "fusion": alike}
    with_base = plain | {
        "source_base": str(tmp_path / "base"),
        "calibration": {"rows": "texts", "match_on": None},
        "transport": {"structure": "none"},
        "fusion": alike | {"what": "task-vector"},
    }
    hub = {"download_bytes": 1000, "gated": True, "licence": "mit"}
    # As facts of three repos; the machine of one known speed, and its memory does not move meanwhile.

    def facts_of(reference, **options):
        its = hub | ({"licence": "llama2"} if reference.endswith("base") else {})
        return replace(read_facts(reference, **options), **its)

    monkeypatch.setattr("tmerge.models.model.read_facts", facts_of)
    monkeypatch.setattr("tmerge.preflight.pieces.timing_of", lambda *words: Timing(1e-3, "2026-01-01", True))
    monkeypatch.setattr(
        "tmerge.preflight.estimate.psutil.Process", lambda: SimpleNamespace(memory_info=lambda: SimpleNamespace(rss=0))
    )
    two, three = (check(recipe_for(models, "llama", "gpt2", **sections)) for sections in (plain, with_base))
    assert two.base is None and three.base is not None and three.base.commit == model_commit(str(tmp_path / "base"))
    assert two.to_dict()["source_base"] is None
    assert three.to_dict()["source_base"]["parameters"] == three.base.parameters
    # The source before its fine-tuning is read from its files, tensor by tensor: it takes no memory, and no disk.
    assert three.estimate.memory_bytes == two.estimate.memory_bytes
    assert three.estimate.disk_bytes == two.estimate.disk_bytes
    assert (two.estimate.download_bytes, three.estimate.download_bytes) == (2000, 3000)
    assert not any("source_base" in note for note in two.notes)
    assert any(note.startswith("the source_base's repo is gated") for note in three.notes)
    assert two.licence.id == "mit" and not two.licence.refusals
    (refusal,) = three.licence.refusals
    assert refusal.startswith("The source_base's licence, Llama 2") and refusal in three.notes
    # One commit is fetched once, and said to be no task vector.
    same = check(recipe_for(models, "llama", "gpt2", source_base=str(models / "gpt2"), fusion=with_base["fusion"]))
    assert same.estimate.download_bytes == 2000
    assert "source and source_base are the same model: the task vector is zero" in same.notes


def test_a_packed_source_takes_disk_for_what_is_fused_and_memory_while_it_is_read(models, tmp_path, monkeypatch):
    monkeypatch.setattr("tmerge.preflight.pieces.timing_of", lambda *words: Timing(1e-3, "2026-01-01", True))
    monkeypatch.setattr(
        "tmerge.preflight.estimate.psutil.Process", lambda: SimpleNamespace(memory_info=lambda: SimpleNamespace(rss=0))
    )
    save_pico_gguf(tmp_path / "source.gguf")
    (tmp_path / "source").mkdir()
    save_checkpoint(load_model(str(tmp_path / "source.gguf"), device="cpu"), tmp_path / "source")

    def estimated(source, **sections):
        asked = {"dtype": "float32", "fusion": {"projections": ["q", "k"], "top_k": 16}, **sections}
        return check(Recipe.from_mapping({"target": str(models / "llama"), "source": str(source), **asked})).estimate

    packed, plain = estimated(tmp_path / "source.gguf"), estimated(tmp_path / "source")
    # q of 64 by 64 and k of 32 by 64, in two layers, in float32.
    assert packed.disk_bytes - plain.disk_bytes == 2 * (64 + 32) * 64 * 4
    more, parameters = packed.memory_bytes - plain.memory_bytes, read_facts(str(tmp_path / "source")).parameters
    assert more == pytest.approx(1.1 * 4 * parameters, rel=0.01)


@pytest.mark.skipif("gemma4" not in PICO_RARE, reason="this transformers has no gemma4")
def test_projections_of_uneven_size_are_skipped_and_named(models, tmp_path):
    save_pico("gemma4", tmp_path / "source")
    recipe = Recipe(
        target=str(models / "llama"),
        source=str(tmp_path / "source"),
        fusion={"projections": ["q", "k", "v", "o", "up"]},
    )
    result = check(recipe)
    assert "different sizes" in result.skipped["q"] and "up" in result.projections


def test_the_estimate_names_bytes_that_a_run_then_takes(models, tmp_path, monkeypatch):
    sections = {
        "calibration": {"dataset": "samples:malay", "max_tokens": 32, "held_out": 0.3},
        "evaluation": {"bootstrap": 100},
    }
    recipe = recipe_for(models, "llama", "gpt2", **sections)
    estimate = check(recipe).estimate
    refuse_unfit(check(recipe), recipe, tmp_path / "fused")
    merge(recipe, tmp_path / "fused")
    taken = sum(path.stat().st_size for path in (tmp_path / "fused").rglob("*.safetensors"))
    # Continued, it needs room for what it has not written yet.
    usage = SimpleNamespace(free=estimate.disk_bytes - 1)
    monkeypatch.setattr("tmerge.preflight.check.shutil.disk_usage", lambda folder: usage)
    refuse_unfit(check(recipe), recipe, tmp_path / "fused")
    with pytest.raises(NotEnoughDiskError, match="lower calibration.texts"):
        refuse_unfit(check(recipe), recipe, tmp_path / "another")
    # Within a factor of three: headers, potentials and costs are not counted, and weigh on a pico model.
    assert estimate.disk_bytes / 3 < taken < estimate.disk_bytes * 3
    assert estimate.seconds > 0


def test_several_processes_on_a_machine_are_counted(models, tmp_path, monkeypatch):
    recipe = recipe_for(models, "llama", "gpt2", dtype="float32")
    monkeypatch.setattr("tmerge.preflight.check.available_memory", lambda device: 0)
    of_nothing(monkeypatch)

    def needed(processes):
        monkeypatch.setenv("WORLD_SIZE", str(processes))
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
        found = check(recipe)
        with pytest.raises(NotEnoughMemoryError) as caught:
            refuse_unfit(found, recipe, tmp_path)
        return found.estimate, str(caught.value)

    (one, said), (two, also) = needed(1), needed(2)
    assert one.memory_bytes == two.memory_bytes > 0
    assert "processes" not in said + one.assumes and "in each of 2 processes here" in two.assumes
    # The target is stored in float32 as it is held: its pages are there once.
    held = 4 * check(recipe).target.parameters
    assert f"needs about {bytes_words(one.memory_bytes)} on cpu, where" in said
    assert f"needs about {bytes_words(2 * one.memory_bytes - held)} on cpu in 2 processes, where" in also


def of_nothing(monkeypatch):
    """A process that takes nothing."""
    nothing = SimpleNamespace(memory_info=lambda: SimpleNamespace(rss=0))
    for part in ("estimate", "check"):
        monkeypatch.setattr(f"tmerge.preflight.{part}.psutil.Process", lambda: nothing)


@pytest.mark.slow
def test_a_side_head_is_said_in_report_and_card_and_a_zero_block_has_no_norm_ratio(models, tmp_path):
    target = save_pico("llama", tmp_path / "target")
    tensors = load_file(target / "model.safetensors")
    tensors["v_head.summary.weight"] = torch.ones(1, 64)
    # As blocks that were added to a model begin.
    tensors["model.layers.1.self_attn.o_proj.weight"].zero_()
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    sections = {
        "calibration": {"dataset": "samples:malay", "max_tokens": 32, "held_out": 0.3},
        "evaluation": {"bootstrap": 100, "controls": []},
        "fusion": {"projections": ["v", "o"], "alpha": 0.1, "stream": False},
    }
    recipe = Recipe.from_mapping({"target": str(target), "source": str(models / "gpt2"), **sections})
    report = merge(recipe, tmp_path / "fused").to_dict()
    side = "the target's files hold a value head (v_head.summary.weight), which a merge leaves out"
    assert side in report["notes"]
    card = (tmp_path / "fused" / "README.md").read_text()
    assert r"a value head (v\_head.summary.weight), which a merge leaves out" in card
    ratios = report["fusion"]["projections"]["o"]["norm_ratio"]
    assert ratios[1] is None and ratios[0] > 0
    assert any("o neurons are all zero in layer 1: " in note for note in report["notes"])

    def refuse(word):
        raise AssertionError(word)

    written = json.loads((tmp_path / "fused" / "tmerge" / "report.json").read_text(), parse_constant=refuse)
    assert written["fusion"]["projections"]["o"]["norm_ratio"] == ratios and "undefined" not in written
    assert norms_data(typed(report)).count("o,1,,") == 1
    assert [row[2] for row in ratio_rows(typed(report))][1].endswith(f"to {ratios[0]:.2g}")
    norm_ratios(typed(report))


def test_feature_keys_are_shared():
    assert feature_keys(["q", "k", "v"]) == ["qkv.pre", "q.post", "k.post", "v.post"]
    assert len(feature_keys(["q", "k", "v", "o", "gate", "up", "down"])) == 11


def test_choosing_alpha_is_part_of_the_estimate(models, monkeypatch):
    # A machine of one known speed: what is left are the operations counted.
    monkeypatch.setattr("tmerge.preflight.pieces.timing_of", lambda *words: Timing(1e-3, "2026-01-01", True))

    def estimated(**fusion):
        sections = {"fusion": fusion, "evaluation": {"controls": []}}
        return check(recipe_for(models, "llama", "gpt2", **sections)).estimate

    fixed = estimated(alpha=0.1)
    one, two, five = (
        estimated(alpha="auto", alphas=alphas) for alphas in ([0.1], [0.1, 0.3], [0.01, 0.03, 0.1, 0.3, 1.0])
    )
    assert fixed.seconds < one.seconds < two.seconds < five.seconds
    texts = len(sample_texts("english"))
    choosing = round((texts - round(0.2 * texts)) * 0.2)
    raced = [most_scorings(count, choosing) for count in (1, 2, 5)]
    assert raced[0] == 1 and raced[2] < 3.2  # of five alphas, half drop out after each round
    one, two, five = (estimate.score_operations for estimate in (one, two, five))
    assert (five - one) / (two - one) == pytest.approx((raced[2] - raced[0]) / (raced[1] - raced[0]))


def test_a_recipe_that_is_pinned_to_commits_trusts_what_it_did_before(tmp_path, monkeypatch):
    commit = "1" * 40
    asked: dict[str, list[bool]] = {}

    def stop(name):
        def called(reference, *, trust_remote_code, **_):
            asked.setdefault(name, []).append(trust_remote_code)
            raise UnsupportedModelError("far enough")

        return called

    recipe = Recipe(target=f"user/code@{commit}", source=f"user/other@{commit}", trust_remote_code=["user/code"])
    swapped = recipe.model_copy(update={"target": recipe.source, "source": recipe.target})

    def found(reference, revision, trust_remote_code, adapter, base, revisions):
        asked.setdefault("place", []).append(trust_remote_code)
        return SimpleNamespace(revisions={})

    monkeypatch.setattr("tmerge.models.model.find_place", found)
    monkeypatch.setattr("tmerge.models.model.read_facts", stop("check"))
    monkeypatch.setattr("tmerge.models.model.load_model", stop("model"))
    monkeypatch.setattr("tmerge.models.model.load_tokenizer", stop("tokenizer"))
    calibrated = SimpleNamespace(texts=(), prompts=(), held_out=())
    for pinned in (recipe, swapped):
        target = Models.of(pinned, {"target": commit}).target
        for action in (
            lambda pinned=pinned: check(pinned),
            lambda target=target: target.load(),
            lambda target=target: target.tokenizer,
            lambda pinned=pinned, target=target: TrainingSet.of_dataset(pinned, "user/data", calibrated, target),
        ):
            with pytest.raises(UnsupportedModelError, match="far enough"):
                action()
    # The tokenizer is asked for alone, and to read other texts.
    asked["adapted"] = asked["tokenizer"][1::2]
    asked["tokenizer"] = asked["tokenizer"][::2]
    places = asked.pop("place")
    assert set(places[: len(places) // 2]) == {True} and set(places[len(places) // 2 :]) == {False}
    assert asked == dict.fromkeys(("check", "model", "tokenizer", "adapted"), [True, False])
