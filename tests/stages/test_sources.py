"""Several sources on the whole road: carried by one matching, joined, chosen, scored alone, stopped, gone on with."""

from __future__ import annotations

import copy
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

from tests.fusion.test_joining import ties_by_the_paper
from tests.pico import pico_model
from tests.pico_adapter import merged_by_peft, save_adapter
from tests.stages.test_task_vector import _deeper, _shaken, noted, recipe_for, save_all, weights
from tmerge.comparison.reproduce import reproduce
from tmerge.errors import AdaptationError, Cancelled, ModelNotFoundError
from tmerge.fusion import Join, JoinedNeurons, SourcePart, StoredNeurons
from tmerge.hub.card import card_data, card_text, merge_licence
from tmerge.models import PROJECTIONS
from tmerge.preflight.check import check
from tmerge.recipe import Recipe, load_recipe
from tmerge.run import Run
from tmerge.stages.adapt import adapt_run
from tmerge.stages.merge import advance, merge
from tmerge.stages.several import neurons_of_report
from tmerge.transport import TransportRecord


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A target; a deeper relative; two models and two adapters that are made from that; the sum of the two models."""
    folder = tmp_path_factory.mktemp("models")
    target = pico_model("llama")
    base = _shaken(_deeper(target), 0.02, 1)
    first, second = _shaken(base, 0.05, 2), _shaken(base, 0.03, 3)
    both = copy.deepcopy(base)
    with torch.no_grad():
        for sums, *others in zip(*(model.parameters() for model in (both, first, second, base)), strict=True):
            sums.copy_((others[0].double() + others[1].double() - others[2].double()).float())
    save_all(folder, target=target, base=base, first=first, second=second, both=both)
    options = {"size": 0.05}
    save_adapter(folder / "base", folder / "lora", target_modules=["q_proj", "v_proj", "down_proj"], **options)
    save_adapter(folder / "base", folder / "other", target_modules=["q_proj", "up_proj"], seed=5, **options)
    merged_by_peft(folder / "base", folder / "lora").save_pretrained(folder / "lora-merged")
    return folder


def several(models, *sources, **sections):
    """The recipe of some sources, by names of folders; with weights where they are pairs."""
    named = []
    for source in sources:
        name, weight = source if isinstance(source, tuple) else (source, 1.0)
        key = "adapter" if (models / name / "adapter_config.json").is_file() else "source"
        named.append({key: str(models / name), "weight": weight})
    fusion = sections.pop("fusion", {})
    data = recipe_for(models, **sections).model_dump(mode="json", exclude={"source"})
    return Recipe.from_mapping({**data, "fusion": {**data["fusion"], **fusion}, "sources": named})


def joined(out, recipe):
    """What a run of some sources fused, by layer and projection; and what was carried of each."""
    neurons, alpha = neurons_of_report(out / "tmerge/cache", recipe, Run(out).report())
    assert alpha == 1.0
    each = [StoredNeurons(out / f"tmerge/cache/sources/{number}/transported") for number in (1, 2)]
    return {(item.layer, item.projection): item for item in neurons.transported}, [
        {(item.layer, item.projection): item for item in items} for items in each
    ]


@pytest.fixture(scope="module")
def finished(models, tmp_path_factory):
    """Two models by their sum, on the whole road."""
    folder, recipe = tmp_path_factory.mktemp("run") / "fused", several(models, "first", "second")
    return folder, recipe, merge(recipe, folder)


# -- what comes out ------------------------------------------------------------------------------------------------


def test_what_arrives_is_the_sum_of_what_each_has_learned(models, finished):
    """The layers are found and no neuron is permuted, so that both task vectors are known."""
    first, second, base, fused, target = (
        load_file(of / "model.safetensors")
        for of in (models / "first", models / "second", models / "base", finished[0], models / "target")
    )
    for name, values in fused.items():
        other = name.replace("layers.1.", "layers.2.")
        learned = (first[other] - base[other]) + (second[other] - base[other])
        torch.testing.assert_close(values - target[name], learned, rtol=1e-4, atol=5e-7, msg=lambda m, n=name: n + m)


def test_it_is_what_carrying_the_sum_gives(models, finished, tmp_path):
    advance(recipe_for(models, source=str(models / "both")), tmp_path / "both", until="fuse")
    found, _ = joined(finished[0], finished[1])
    for item in StoredNeurons(tmp_path / "both/tmerge/cache/transported"):
        torch.testing.assert_close(found[item.layer, item.projection].weight, item.weight, rtol=1e-4, atol=5e-7)


@pytest.mark.parametrize(
    ("source", "alone", "alpha", "fusion"),
    [
        ("first", {"source": "first"}, 0.3, {}),
        ("first", {"source": "first"}, 1.0, {"join": "ties", "density": 1.0}),
        ("lora", {"source": "base", "adapter": "lora"}, 0.7, {}),
    ],
)
def test_one_source_is_the_merge_of_one_source_to_the_bit(models, source, alone, alpha, fusion, tmp_path):
    advance(several(models, source, fusion={"alpha": alpha, **fusion}), tmp_path / "several", until="save")
    named = {key: str(models / name) for key, name in alone.items()}
    advance(recipe_for(models, **named, fusion={"alpha": alpha}), tmp_path / "one", until="save")
    assert weights(tmp_path / "several") == weights(tmp_path / "one") != weights(models / "target")
    scores = [noted(tmp_path / name, "evaluate")["scores"] for name in ("several", "one")]
    assert scores[0]["fused"] == scores[1]["fused"]
    # A control's size is measured with alpha in it, or multiplied by it: they differ in the last bits.
    for name, control in scores[0].items():
        assert control["bits"] == pytest.approx(scores[1][name]["bits"], rel=1e-6)


@pytest.mark.parametrize("how", ["sum", "ties", "dare"])
def test_adapters_and_models_are_joined_as_what_is_carried_of_each(models, how, tmp_path):
    recipe = several(models, ("first", 2.0), ("lora", 0.5), fusion={"join": how, **_DENSITY[how], "alpha": 0.8})
    report, out = merge(recipe, tmp_path / "fused"), tmp_path / "fused"
    found, (first, lora) = joined(out, recipe)
    # The adapter's is what carrying it alone gives.
    data = recipe_for(models, source=str(models / "base"), adapter=str(models / "lora")).model_dump(mode="json")
    advance(Recipe.from_mapping(data), tmp_path / "lora", until="fuse")
    for item in StoredNeurons(tmp_path / "lora/tmerge/cache/transported"):
        assert torch.equal(lora[item.layer, item.projection].weight, item.weight)
    assert not lora[0, "k"].weight.any() and first[0, "k"].weight.any() and found.keys() == first.keys()
    fused, target = (load_file(of / "model.safetensors") for of in (out, models / "target"))
    for (layer, name), item in found.items():
        tensors = [each[layer, name].weight for each in (first, lora)]
        if how == "sum":
            expected = 0.8 * 2.0 * tensors[0].double() + 0.8 * 0.5 * tensors[1].double()
        elif how == "ties":
            expected = ties_by_the_paper(tensors, [2.0, 0.5], [0.8, 0.8], 0.3)
        else:
            kept = [(item.weight != 0) & (tensor != 0) for tensor in tensors]
            # Of what only the first has, each entry is dropped or divided by the density.
            only = kept[0] & (tensors[1] == 0)
            expected = torch.where(only, 0.8 * 2.0 * tensors[0].double() / 0.5, item.weight.double())
        torch.testing.assert_close(item.weight.double(), expected, rtol=1e-4, atol=1e-8, msg=lambda m, n=name: n + m)
        if name in PROJECTIONS:
            stored = _parameter(layer, name)
            torch.testing.assert_close(fused[stored] - target[stored], item.weight, rtol=1e-3, atol=1e-6)
    assert (report.fusion.join, report.fusion.density) == (how, _DENSITY[how].get("density"))
    assert [(each.name, each.weight, each.strength) for each in report.sources] == [
        ("source 1", 2.0, 0.8),
        ("source 2", 0.5, 0.8),
    ]


_DENSITY = {"sum": {}, "ties": {"density": 0.3}, "dare": {"density": 0.5}}


def _parameter(layer, name):
    place = "self_attn" if name in "qkvo" else "mlp"
    return f"model.layers.{layer}.{place}.{name}_proj.weight"


def test_the_matching_is_of_their_base_and_is_solved_once(models, finished):
    folder, _, report = finished
    record = report.transport
    assert record.problems == 1 + 2 * 7 and report.source.ref == report.source_base == str(models / "base")
    assert report.source_base_model.commit == report.source.commit
    # From its record another join of other sources is fused, and nothing is read again.
    recipe = several(models, "second", "lora", fusion={"join": "ties"}, plan=str(folder))
    steps = []
    merge(recipe, folder.with_name("swept"), listener=steps.append)
    assert not {step.what for step in steps if step.stage == "transport"}


@pytest.mark.parametrize("how", ["sum", "ties"])
def test_where_their_base_is_the_target_it_is_what_joining_without_a_transport_gives(models, how, tmp_path):
    """The plain merge of fine-tuned models: every tensor is that of the papers' definitions, on the files' own."""
    recipe = several(models, "first", "second", fusion={"join": how, **_DENSITY[how], "stream": False, "alpha": 0.5})
    recipe = Recipe.from_mapping(recipe.model_dump(mode="json") | {"target": str(models / "base")})
    report = merge(recipe, tmp_path / "fused")
    assert not report.same_model and not any("same model" in note for note in report.notes)
    first, second, base, fused = (
        load_file(of / "model.safetensors")
        for of in (models / "first", models / "second", models / "base", tmp_path / "fused")
    )
    for name, values in fused.items():
        if "_proj" not in name:
            assert torch.equal(values, base[name])
            continue
        learned = [of[name] - base[name] for of in (first, second)]
        expected = 0.5 * (learned[0].double() + learned[1].double())
        if how == "ties":
            expected = ties_by_the_paper(learned, [1.0, 1.0], [0.5, 0.5], 0.3)
        found = (values - base[name]).double()
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=5e-7, msg=lambda m, n=name: n + m)


# -- what is told --------------------------------------------------------------------------------------------------


def test_each_source_alone_is_a_row(models, finished):
    folder, _, report = finished
    scores = report.evaluation
    assert set(scores.alone) == {"source 1", "source 2"} and set(scores.controls) == {"shrink", "noise", "permuted"}
    # At the same strength a source alone is the merge of one, score by score.
    one = folder.with_name("alone")
    advance(recipe_for(models, source=str(models / "second")), one, until="evaluate")
    own = noted(one, "evaluate")["scores"]["fused"]
    assert noted(folder, "evaluate")["scores"]["source 2"] == own
    base = scores.base.value
    for alone in scores.alone.values():
        assert alone.difference.value == pytest.approx(alone.value - base, abs=1e-12)
        assert alone.fused_minus_alone.value == pytest.approx(scores.fused.value - alone.value, abs=1e-12)
        assert alone.difference.low <= alone.difference.value <= alone.difference.high
    told = [name for name, alone in scores.alone.items() if not alone.fused_minus_alone.high < 0]
    (note,) = [note for note in report.notes if "the sources joined do better" in note.replace("The", "the")]
    assert [name for name in scores.alone if name in note] == told
    for each in report.sources:
        assert set(each.norm_ratio) == set(report.fusion.projections)
        assert each.norm_ratio["q"] != report.fusion.projections["q"].norm_ratio
    # And the report that is read back is the same.
    assert Run(folder).report() == report


def test_the_ratio_is_that_of_all_joined(finished):
    folder, recipe, report = finished
    found, _ = joined(folder, recipe)
    target = load_file(folder.parent / "fused" / "model.safetensors")
    own = target[_parameter(0, "gate")] - found[0, "gate"].weight
    ratio = float(found[0, "gate"].weight.norm() / own.norm())
    assert report.fusion.projections["gate"].norm_ratio[0] == pytest.approx(ratio, rel=1e-4)


def test_the_card_names_all_and_what_each_did(models, finished):
    folder, _, report = finished
    text = (folder / "README.md").read_text()
    for words in ("# target merged with first and second", "source 1 alone, first at strength 1", "source_base"):
        assert words in text, words
    for alone in report.evaluation.alone.values():
        assert f"| {alone.value:.4f} |" in text
    assert str(models) not in text.partition("## Recipe")[0]
    assert "| source 2 | `second` | 1.0 | 1.0 |" in text


def test_the_page_and_the_app_name_all(finished):
    from tmerge.plots import report_page

    folder, _, report = finished
    text = report_page(report, TransportRecord.load(folder / "tmerge/transport.safetensors"), "fused")
    assert "target merged with first and second" in text and "source 2 alone" in text
    assert "second, strength 1; licence not stated" in text
    assert "what source 1 (first), source 2 (second) learned since" in text
    look = pytest.importorskip("tmerge.ui.tabs.look", reason="the app's extra is not installed")
    from tmerge.ui.parts.look_data import looked_at

    assert "first and second" in look._head(looked_at(folder))


def test_licences_of_all_are_asked(models, finished, tmp_path):
    for name in ("base", "first", "second", "target", "lora"):
        shutil.copytree(models / name, tmp_path / name)
        licence = {"second": "cc-by-nc-4.0", "lora": "gpl-3.0"}.get(name, "apache-2.0")
        (tmp_path / name / "README.md").write_text(f"---\nlicense: {licence}\n---\n")
    found = check(several(tmp_path, "first", "second", "lora"))
    assert [model.licence for model in found.document().sources] == ["apache-2.0", "cc-by-nc-4.0", "apache-2.0"]
    assert found.document().sources[2].adapter.licence == "gpl-3.0"
    said = " ".join([found.licence.why, *found.licence.refusals])
    assert "source 2's" in said and "source 3's adapter's" in said and "source 1's" not in said
    # A card makes the same of a report.
    stated = {
        role: getattr(finished[2], role).model_copy(update={"licence": "apache-2.0"})
        for role in ("target", "source", "source_base_model")
    }
    report = finished[2].model_copy(
        update={
            **stated,
            "sources": tuple(
                each.model_copy(update={"model": each.model.model_copy(update={"licence": licence})})
                for each, licence in zip(finished[2].sources, ("mit", "gpl-3.0"), strict=True)
            ),
        }
    )
    assert "Source 2's GNU GPL 3.0 asks for more than" in merge_licence(report).why
    on_hub = report.model_copy(
        update={
            "target": report.target.model_copy(update={"ref": "a/target", "commit": "1" * 40}),
            "sources": tuple(
                each.model_copy(update={"model": each.model.model_copy(update={"ref": ref, "commit": "2" * 40})})
                for each, ref in zip(report.sources, ("b/first", "b/second"), strict=True)
            ),
        }
    )
    assert card_data(on_hub, finished[1]).base_model == ["a/target", "b/first", "b/second"]
    assert "[`b/first`](https://huggingface.co/b/first)" in card_text(on_hub, finished[1])


def test_what_it_takes_grows_with_the_sources(models):
    one, two = (check(several(models, *names)).estimate for names in (["first"], ["first", "second"]))
    assert two.disk_bytes > one.disk_bytes and two.stages["fuse"] > 1.5 * one.stages["fuse"]
    assert two.memory_bytes <= 1.1 * one.memory_bytes
    assert two.score_operations > one.score_operations  # each alone


# -- again ---------------------------------------------------------------------------------------------------------


def test_a_run_that_is_stopped_while_the_second_is_carried_goes_on_to_the_same_bytes(models, finished, tmp_path):
    recipe, out = finished[1], tmp_path / "fused"

    def stop(step):
        if step.stage == "fuse" and step.what.endswith("source 2"):
            raise Cancelled("stopped by the test")

    with pytest.raises(Cancelled):
        merge(recipe, out, listener=stop)
    steps = []
    merge(recipe, out, listener=steps.append)
    assert not {step.stage for step in steps if step.unit != "notes"} & {"texts", "target", "source", "transport"}
    # Nor is the first carried again.
    assert {step.what for step in steps if step.unit == "layers"} == {"transporting weights of source 2"}
    assert weights(out) == weights(finished[0])
    assert noted(out, "evaluate")["scores"] == noted(finished[0], "evaluate")["scores"]
    measured = {"seconds": None, "peak_rss_bytes": None}
    assert noted(out, "fuse") | measured == noted(finished[0], "fuse") | measured
    records = [(folder / "tmerge/transport.safetensors").read_bytes() for folder in (out, finished[0])]
    assert records[0] == records[1]


def test_another_source_in_the_same_place_is_carried_again(models, tmp_path):
    for name in ("target", "base", "first", "second"):
        shutil.copytree(models / name, tmp_path / name)
    recipe, out = several(tmp_path, "first", "second"), tmp_path / "fused"
    advance(recipe, out, until="save")
    before, key = weights(out), Run(out).key("fuse")
    shutil.copy(models / "both/model.safetensors", tmp_path / "second/model.safetensors")
    steps = []
    advance(recipe, out, until="save", listener=steps.append)
    assert Run(out).key("fuse") != key and weights(out) != before
    assert "source" not in {step.stage for step in steps if step.unit not in ("notes", "models")}


def test_it_is_reproduced_and_another_source_is_refused(models, finished, tmp_path):
    found = reproduce(str(finished[0]), tmp_path / "again")
    assert found.same
    pinned = load_recipe(str(finished[0] / "tmerge/recipe.yaml"))
    assert [source.source for source in pinned.sources] == [str(models / "first"), str(models / "second")]
    shutil.copytree(finished[0], tmp_path / "run")
    report = json.loads((tmp_path / "run/tmerge/report.json").read_text())
    report["sources"][1]["model"]["commit"] = "sha256:" + "0" * 64
    (tmp_path / "run/tmerge/report.json").write_text(json.dumps(report))
    with pytest.raises(ModelNotFoundError, match="second here is not the source 2 that"):
        reproduce(str(tmp_path / "run"), tmp_path / "other")


def test_the_order_in_which_they_are_named_changes_no_byte(models, tmp_path):
    fusion = {"join": "dare", "alpha": 0.6}
    for name, order in (("there", ("first", "lora")), ("back", ("lora", "first"))):
        advance(several(models, *order, fusion=fusion), tmp_path / name, until="save")
    assert weights(tmp_path / "there") == weights(tmp_path / "back")


def test_by_blocks_it_is_the_same_to_the_bit(models, finished, tmp_path):
    advance(several(models, "first", "second", memory="blocks"), tmp_path / "fused", until="save")
    assert weights(tmp_path / "fused") == weights(finished[0])


def test_their_sum_is_written_as_an_adapter_of_their_ranks_together(models, tmp_path):
    fusion = {"stream": False, "rank": 3, "alpha": 0.6}
    recipe = several(models, "first", "lora", fusion=fusion)
    report = merge(
        Recipe.from_mapping(recipe.model_dump(mode="json") | {"save": {"form": "adapter"}}), tmp_path / "out"
    )
    assert report.saved_adapter.rank == 6 and (tmp_path / "out/adapter_config.json").is_file()
    merge(recipe, tmp_path / "whole")
    loaded = merged_by_peft(models / "target", tmp_path / "out").state_dict()
    for name, values in load_file(tmp_path / "whole/model.safetensors").items():
        torch.testing.assert_close(loaded[name], values, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: n + m)


def test_it_is_trained_on_top_of_and_not_drawn_to_one_of_them(finished, tmp_path):
    words = {"steps": 2, "objective": "sft", "batch_size": 2, "max_tokens": 32}
    report = adapt_run(finished[0], tmp_path / "adapted", words)
    assert report.evaluation.adapted is not None and report.adaptation.alpha == {"source 1": 1.0, "source 2": 1.0}
    assert weights(tmp_path / "adapted") != weights(finished[0])
    with pytest.raises(AdaptationError, match="objective is distill, which has one source to draw to"):
        adapt_run(finished[0], tmp_path / "drawn", {**words, "objective": "distill"})


def test_a_join_of_what_lies_on_the_disk_reads_an_item_at_a_time(finished):
    """Its places are known without one being joined."""
    parts = [
        SourcePart(f"source {n}", str(n), 1.0, StoredNeurons(finished[0] / f"tmerge/cache/sources/{n}/transported"))
        for n in (1, 2)
    ]
    whole = JoinedNeurons(parts, Join("sum", 1.0, 0), {"source 1": 1.0, "source 2": 1.0})
    assert len(whole) == len(parts[0].neurons) and whole.places() == parts[0].neurons.places()
    assert [(item.layer, item.projection) for item in whole] == whole.places()
