"""A task vector on the whole road, by the recipe's own defaults: solved, recorded, stopped, and fused from again."""

from __future__ import annotations

import copy
import json
import os
import shutil
import signal
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from tests import forked
from tests.calibration.test_positions import word_tokenizer
from tests.pico import PICO_VOCAB, pico_model, pico_tokenizer
from tmerge.calibration import FeatureStore, TextSet
from tmerge.errors import Cancelled, RecipeError
from tmerge.fusion import StoredNeurons
from tmerge.models import EMBEDDING, HEAD, shared_vocabulary
from tmerge.recipe import Recipe, load_recipe
from tmerge.stages.merge import STAGES, advance, merge
from tmerge.transport import TransportRecord

PROJECTIONS = ["q", "k", "v", "o", "gate", "up", "down"]


def _shaken(model, relative, seed):
    """Every parameter with noise of this size relative to its own."""
    other = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in other.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter += noise * (relative * parameter.norm() / noise.norm())
    return other


def _deeper(model, family="llama"):
    """The same function with one more layer, which adds nothing to the stream, between the first two."""
    deeper = pico_model(family, layers=3, seed=9)
    kept = deeper.model.layers[1]
    deeper.load_state_dict(
        {
            **deeper.state_dict(),
            **{name.replace("layers.1.", "layers.2."): values for name, values in model.state_dict().items()},
        }
    )
    with torch.no_grad():
        kept.self_attn.o_proj.weight.zero_()
        kept.mlp.down_proj.weight.zero_()
    return deeper


def save_all(folder, **models):
    """Models in folders by their names, each with the tokenizer."""
    for name, model in models.items():
        model.save_pretrained(folder / name)
        pico_tokenizer(folder / name)
    return folder


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A target of two layers; a deeper relative of one vocabulary, and what that one has learned since."""
    folder = tmp_path_factory.mktemp("models")
    target = pico_model("llama")
    base = _shaken(_deeper(target), 0.02, 1)
    return save_all(folder, target=target, base=base, source=_shaken(base, 0.05, 2))


def recipe_for(models, **sections):
    data = {
        "target": str(models / "target"),
        "source": str(models / "source"),
        "source_base": str(models / "base"),
        "dtype": "float32",
        "calibration": {
            "dataset": "samples:english",
            "texts": 60,
            "max_tokens": 48,
            "held_out": 0.3,
            "token_rows": 200,
            **sections.pop("calibration", {}),
        },
        # All else is the task vector's own default.
        "fusion": {"what": "task-vector", "alpha": 1.0, **sections.pop("fusion", {})},
        "evaluation": {"texts": 12, "bootstrap": 200},
    }
    return Recipe.from_mapping({**data, **sections})


@pytest.fixture(scope="module")
def finished(models, tmp_path_factory):
    """A run, and what is left of it when it has been pushed: no cache."""
    folder = tmp_path_factory.mktemp("run")
    steps = []
    report = merge(recipe_for(models), folder / "fused", listener=steps.append).to_dict()
    shutil.copytree(folder / "fused", folder / "pushed", ignore=shutil.ignore_patterns("cache"))
    return folder, report, steps


def run(recipe, out, listener=None):
    """Everything but the report and its pictures."""
    advance(recipe, out, until="save", listener=listener)
    return out


def noted(folder, stage):
    return json.loads((folder / "tmerge" / "cache" / f"{stage}.json").read_text())["facts"]


def weights(folder):
    return (folder / "model.safetensors").read_bytes()


def record_of(folder):
    return TransportRecord.load(folder / "tmerge" / "transport.safetensors")


def swept(finished, out, *settings, **overrides):
    plan = finished[0] / "pushed"
    recipe = load_recipe(str(plan / "tmerge" / "recipe.yaml"), {"plan": str(plan), **overrides}, settings)
    steps = []
    run(recipe, out, steps.append)
    return steps


# -- what comes out ------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_everything_is_fused_from_single_tokens(models, finished):
    folder, report, _ = finished
    assert report["projections"]["fused"] == PROJECTIONS and report["fusion"]["alpha"] == 1.0
    base, fused = (load_file(of / "model.safetensors") for of in (models / "target", folder / "fused"))
    assert base.keys() == fused.keys()
    # Every tensor of the model, embeddings and norms too.
    assert not [name for name, values in base.items() if values.equal(fused[name])]
    stores = [FeatureStore(folder / "fused" / "tmerge" / "cache" / "features" / role) for role in ("target", "source")]
    texts = TextSet.load(folder / "fused" / "tmerge" / "cache" / "calibration.json")
    assert stores[0].texts == stores[1].texts == sum(map(len, texts.ends)) >= 200
    # The neurons were matched on English samples; what is counted as calibration are the dataset's own.
    assert report["calibration"]["texts"] == len(texts.texts) and report["calibration"]["other"] == len(texts.ends)


def test_the_report_says_whether_the_models_are_related(finished):
    _, report, _ = finished
    transport = report["transport"]
    found = transport["relatedness"]
    # Two per cent of noise lie between them.
    assert found["value"] > 0.9 and found["permuted"] < 0.2 and 0 < found["rows"] <= 200
    weights = found["weights"]
    assert weights["clear"] and weights["moved_layers"] == 0 and weights["paired"] > 0.99 > weights["chance"] + 0.3
    assert any(f"Relatedness {found['value']:.2f}" in note for note in report["notes"])
    assert (transport["structure"], transport["matching"], transport["rows"]) == ("shared", "one-to-one", "tokens")
    assert transport["problems"] == transport["converged"] == 1 + 2 * 7
    assert transport["worst_marginal_violation"] == 0 and transport["iterations"] == {"median": 0, "max": 0}


def test_the_record_is_of_a_shared_structure(finished):
    folder, _, _ = finished
    record = record_of(folder / "fused")
    assert record.facts["structure"] == "shared" and record.projections == PROJECTIONS
    assert not [name for name in record.tensors if name.startswith(("f.", "g."))]
    stream = [record.plans(key) for key in ("qkv.pre", "mlp.pre", "o.post", "down.post")]
    for index in range(2):
        for plans in stream:
            # One correspondence for all: neurons in their own order, as nothing was permuted.
            assert plans.dense(index).equal(torch.eye(64))
    for key in record.keys:
        # The layer that adds nothing is no target layer's.
        assert record.pairs(key) == [(0, 0), (1, 2)]


def test_the_listener_hears_of_layers_matching_and_relatedness(finished):
    _, _, steps = finished
    assert [stage for stage in STAGES if stage in {step.stage for step in steps}] == list(STAGES)
    said = [step.what for step in steps if step.stage == "transport"]
    assert {"matching heads and neurons", "relatedness"} <= set(said)
    rows = [step.row for step in steps if step.row is not None]
    assert len(rows) == 2 * 11 and all(costs.shape == (3,) for _, _, costs in rows)


def test_what_arrives_is_what_was_learned(models, finished):
    """The layers are found and no neuron is permuted, so that the task vector is known."""
    folder = finished[0] / "fused"
    source, base, fused, target = (
        load_file(of / "model.safetensors") for of in (models / "source", models / "base", folder, models / "target")
    )
    for name, values in fused.items():
        other = name.replace("layers.1.", "layers.2.")
        learned = source[other] - base[other]
        # Rounded once as a difference, and once more as a sum of this size.
        torch.testing.assert_close(values - target[name], learned, rtol=1e-4, atol=3e-7, msg=lambda m, n=name: n + m)


# -- again ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_another_alpha_from_the_plan_gives_the_bytes_of_a_fresh_run(models, finished, tmp_path):
    """One to one, entries are 1 and -1: what 16 bits keep of a plan is all of it."""
    fresh = run(recipe_for(models, fusion={"alpha": 0.5}), tmp_path / "fresh")
    steps = swept(finished, tmp_path / "swept", "fusion.alpha=0.5")
    assert weights(tmp_path / "swept") == weights(fresh) != weights(finished[0] / "fused")
    assert noted(tmp_path / "swept", "evaluate")["scores"] == noted(fresh, "evaluate")["scores"]
    assert not {step.what for step in steps if step.stage == "transport"}
    # And the plan it took can be taken from it again.
    mine, theirs = (record_of(tmp_path / name) for name in ("swept", "fresh"))
    assert mine.facts["structure"] == "shared" and mine.tensors.keys() == theirs.tensors.keys()
    assert all(values.equal(theirs.tensors[name]) for name, values in mine.tensors.items())


def test_fewer_projections_without_the_stream_from_the_plan(models, finished, tmp_path):
    swept(finished, tmp_path / "swept", "fusion.stream=false", "fusion.projections=[v, down]")
    whole = {(item.layer, item.projection): item for item in _transported(finished[0] / "fused")}
    found = {(item.layer, item.projection): item for item in _transported(tmp_path / "swept")}
    assert found.keys() == {(layer, name) for layer in range(2) for name in ("v", "down")}
    assert all(item.weight.equal(whole[place].weight) for place, item in found.items())


def _transported(folder):
    return StoredNeurons(folder / "tmerge" / "cache" / "transported")


def _stopped(models, out, stage):
    """Run it until the second step of a stage; which stages did some work."""
    seen = []

    def stop_inside(step):
        seen.append((step.stage, step.unit))
        # Something of the stage has been done, and nothing of it is finished.
        worked = [of for of, unit in seen if unit != "models" and of == stage]
        if step.stage == stage and (stage == "texts" or len(worked) == 2):
            raise Cancelled("stopped by the test")

    with pytest.raises(Cancelled):
        run(recipe_for(models), out, stop_inside)
    return {of for of, unit in seen if unit not in ("models", "notes")}


@pytest.mark.slow
def test_a_run_that_is_stopped_and_killed_again_and_again_comes_to_the_same_bytes(models, finished, tmp_path):
    out, path = tmp_path / "fused", tmp_path / "recipe.yaml"
    path.write_text(recipe_for(models).to_yaml())
    _stopped(models, out, "texts")
    # What was finished at the last stop is not done again.
    assert "texts" in _stopped(models, out, "target")
    code = (
        "import os, sys, torch\ntorch.set_num_threads(1)\n"
        "from tmerge import load_recipe\nfrom tmerge.stages.merge import advance\n"
        "def kill(step):\n    if step.what == 'relatedness' and step.done == 2: os.kill(os.getpid(), 9)\n"
        "advance(load_recipe(sys.argv[1]), sys.argv[2], until='save', listener=kill)\n"
    )
    killed = forked.run([path, out], code)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert (out / "tmerge" / "cache" / "structure.safetensors").exists()
    assert _stopped(models, out, "fuse") == {"transport", "fuse"}
    assert _stopped(models, out, "save") == {"fuse", "evaluate", "save"}
    run(recipe_for(models), out)
    assert _same(out, finished[0] / "fused")


def _same(out, wanted):
    names = ["model.safetensors", os.path.join("tmerge", "transport.safetensors")]
    return all((out / name).read_bytes() == (wanted / name).read_bytes() for name in names)


@pytest.mark.slow
def test_another_tokenizer_of_the_source_has_both_models_read_again(models, tmp_path):
    """In the same place and of the same texts: where both tokenizations agree is elsewhere, for the target as well."""
    for name in ("target", "base", "source"):
        shutil.copytree(models / name, tmp_path / name)
    recipe = recipe_for(tmp_path)

    def stop(step):
        if step.stage == "transport":
            raise Cancelled("stopped by the test")

    with pytest.raises(Cancelled):
        run(recipe, tmp_path / "fused", stop)
    word_tokenizer().save_pretrained(tmp_path / "source")
    steps = []
    run(recipe, tmp_path / "fused", steps.append)
    assert {"texts", "target", "source"} <= {step.stage for step in steps if step.unit != "models"}
    cache = tmp_path / "fused" / "tmerge" / "cache"
    texts = TextSet.load(cache / "calibration.json")
    assert FeatureStore(cache / "features" / "target").texts == sum(map(len, texts.ends))
    # Their vocabularies are not one, so that embeddings and head stay.
    assert not {EMBEDDING, HEAD} & {item.projection for item in _transported(tmp_path / "fused")}


# -- variants ------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("transport", "fusion"),
    [
        ({"map": "procrustes"}, {}),
        ({"map": "ridge", "structure": "none"}, {"top_k": 16, "projections": ["v", "up"]}),
        ({"matching": "entropic", "epsilon": 0.02, "signed": True}, {}),
    ],
    ids=["procrustes", "ridge-apart", "entropic"],
)
def test_rivals_and_regularised_plans_run_the_whole_road(models, finished, tmp_path, transport, fusion):
    out = run(recipe_for(models, transport=transport, fusion=fusion), tmp_path / "fused")
    assert noted(out, "transport")["relatedness"]["value"] > 0.8
    record = record_of(out)
    assert record.facts["structure"] == transport.get("structure", "shared")
    found = {(item.layer, item.projection): item.weight for item in _transported(out)}
    wanted = {(item.layer, item.projection): item.weight for item in _transported(finished[0] / "fused")}
    if "projections" in fusion:
        assert found.keys() == {(layer, name) for layer in range(2) for name in ("v", "up")}
        return
    if "map" in transport:  # a fitted map is another one for every layer, and the stream has none
        wanted = {place: weight for place, weight in wanted.items() if place[1] in PROJECTIONS}
    assert found.keys() == wanted.keys()
    likeness = {
        place: float(torch.cosine_similarity(found[place].flatten(), wanted[place].flatten(), dim=0))
        for place in wanted
    }
    # All of them find nearly the same neurons; an orthogonal map mixes a little of each with all.
    assert min(likeness.values()) > (0.3 if "map" in transport else 0.99), likeness


@pytest.mark.slow
def test_alpha_auto_chooses_for_the_stream_as_well(models, finished, tmp_path):
    calibration = {"choosing": 0.4, "texts": 90}
    out = run(
        recipe_for(models, fusion={"alpha": "auto", "alphas": [0.5]}, calibration=calibration), tmp_path / "fused"
    )
    choice = noted(out, "choose")["choice"]
    assert set(choice["alpha"]) == {*PROJECTIONS, "stream"} and set(choice["alpha"].values()) <= {0, 0.5}
    assert ["stream"] in [trial["group"] for trial in choice["trials"]]
    before, after = (load_file(of / "model.safetensors") for of in (models / "target", out))
    for name, values in before.items():
        group = next((part for part in PROJECTIONS if f".{part}_proj." in name), "stream")
        assert values.equal(after[name]) == (choice["alpha"][group] == 0), name


def test_a_plan_is_no_plan_for_a_rival(finished, tmp_path):
    with pytest.raises(RecipeError, match=r"transport\.map is procrustes, which a recorded plan does not hold") as why:
        swept(finished, tmp_path / "refused", "transport.map=procrustes")
    assert "\n" not in str(why.value) and not (tmp_path / "refused").exists()


@pytest.mark.slow
def test_weights_are_matched_too(models, tmp_path):
    """The structure is not the task vector's own: only its default there."""
    data = {
        **recipe_for(models).model_dump(mode="json"),
        "source_base": None,
        "transport": {"structure": "shared"},
        "fusion": {"alpha": 0.1},
    }
    out = run(Recipe.from_mapping(data), tmp_path / "fused")
    assert {item.projection for item in _transported(out)} == set("qkvo")
    assert record_of(out).facts["structure"] == "shared" and record_of(out).projections == ["q", "k", "v", "o"]
    assert noted(out, "transport")["relatedness"]["value"] > 0.9


# -- vocabularies --------------------------------------------------------------------------------------------------


def _vocabulary(mine, theirs, sizes):
    models = [
        SimpleNamespace(
            tokenizer=SimpleNamespace(get_vocab=lambda tokens=tokens: {token: n for n, token in enumerate(tokens)}),
            vocabulary_rows=rows,
        )
        for tokens, rows in zip((mine, theirs), sizes, strict=True)
    ]
    return shared_vocabulary(*models)


def test_tokens_are_shared_by_what_they_are():
    tokens = [f"t{place}" for place in range(100)]
    same = list(range(100))
    assert _vocabulary(tokens, tokens, (100, 100)).tolist() == [same, same]
    # Rows that pad an embedding to a round number; rows that it lacks.
    assert _vocabulary(tokens, tokens, (128, 104)).tolist() == [same, same]
    assert _vocabulary(tokens, tokens, (100, 97)).tolist() == [same[:97], same[:97]]
    # One that differs, wherever it stands; more tokens before or behind the shared ones; another order; a part of them.
    assert _vocabulary(tokens, ["other", *tokens[1:]], (100, 100)).tolist() == [same[1:], same[1:]]
    assert _vocabulary(tokens, ["more", *tokens], (100, 101)).tolist() == [same, list(range(1, 101))]
    assert _vocabulary([*tokens, "more"], tokens, (101, 100)).tolist() == [same, same]
    assert _vocabulary(tokens, tokens[::-1], (100, 100)).tolist() == [same, same[::-1]]
    assert _vocabulary(tokens[40:60], tokens, (20, 100)).tolist() == [list(range(20)), list(range(40, 60))]
    # Two vocabularies that have many words in common are not one.
    assert _vocabulary(tokens, [*tokens[:80], *(f"o{place}" for place in range(20))], (100, 100)) is None
    assert _vocabulary(tokens, ["a", "b"], (100, 2)) is None


def test_the_same_tokenizer_is_one_vocabulary(finished):
    items = {item.projection: item for item in _transported(finished[0] / "fused")}
    assert len(items[EMBEDDING].weight) == len(items[HEAD].weight) == PICO_VOCAB
