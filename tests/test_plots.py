"""Pictures hold the run's numbers, whatever they are."""

# ruff: noqa: F811 - a fixture that is imported is named again as an argument
import numpy as np
import pytest
import torch

from tests.plotted import GROUPS, SOURCE_LAYERS, TARGET_LAYERS, WIDTHS, interval, record, report  # noqa: F401 - two fixtures
from tests.reported import typed
from tmerge.plots import (
    Entries,
    feature_transport,
    layer_coupling,
    layer_flow,
    norm_ratios,
    plan_blocks,
    plan_entries,
    scores,
    strongest_pairs,
    structure_order,
    timing,
    top_mass,
)
from tmerge.plots.style import BAD, GOOD, NEUTRAL, numbers
from tmerge.plots.words import findings
from tmerge.transport import MASS_AT, sparsify


@pytest.mark.parametrize("which", ["effective", "pre", "post"])
def test_layer_coupling_shows_the_plan_and_the_kept_layers(record, which):
    figure = layer_coupling(record, "q", which)
    name = {"effective": "effective.q", "pre": "layer_plan.qkv.pre", "post": "layer_plan.q.post"}[which]
    plan = record.tensors[name].numpy()
    heat, dots = figure.data
    assert heat.x == tuple(str(layer) for layer in SOURCE_LAYERS)
    assert heat.y == tuple(str(layer) for layer in TARGET_LAYERS)
    shown = np.array([[cell[0] for cell in row] for row in heat.customdata])
    np.testing.assert_allclose(shown, plan * plan.size, atol=5e-5)  # rounded for the page's sake
    np.testing.assert_allclose(heat.z, np.maximum(np.log10(plan * plan.size), heat.zmin), rtol=1e-6, atol=1e-6)
    assert heat.zmax == pytest.approx(np.log10(plan.max() * plan.size))
    kept = {
        (str(TARGET_LAYERS[row]), str(SOURCE_LAYERS[column]))
        for row, columns in enumerate(record.tensors["kept.q.layers"].tolist())
        for column in columns
    }
    assert set(zip(dots.y, dots.x, strict=True)) == kept
    words = {
        (y, x): cell[1]
        for y, row in zip(heat.y, heat.customdata, strict=True)
        for x, cell in zip(heat.x, row, strict=True)
    }
    assert {place for place, text in words.items() if "kept" in text} == kept
    assert figure.layout.xaxis.title.text == "source layer"


def test_layer_coupling_follows_the_planted_depth(record):
    z = np.array(layer_coupling(record, "q").data[0].z)
    assert z[0].argmax() == 0 and z[-1].argmax() == len(SOURCE_LAYERS) - 1


def test_flow_gives_every_target_layer_its_weights(record):
    figure = layer_flow(record, "o")
    node, link = figure.data[0].node, figure.data[0].link
    names = [text.split()[-1] for text in node.customdata]
    flows = {}
    for start, end, value in zip(link.source, link.target, link.value, strict=True):
        assert node.customdata[start].startswith("source") and node.customdata[end].startswith("target")
        flows[int(names[end]), int(names[start])] = value
    weights = record.tensors["kept.o.weights"] / record.tensors["kept.o.weights"].sum(1, keepdim=True)
    expected = {
        (TARGET_LAYERS[row], SOURCE_LAYERS[int(column)]): float(weights[row, place])
        for row, columns in enumerate(record.tensors["kept.o.layers"])
        for place, column in enumerate(columns)
    }
    assert flows == pytest.approx(expected)
    assert all(0 < y < 1 for y in node.y)


@pytest.mark.parametrize("order", ["structure", "natural"])
@pytest.mark.parametrize("size", [1, 7, 12, 60, 500])
def test_blocks_conserve_mass_and_part_the_neurons(record, order, size):
    entries = plan_entries(record.plans("q.post"), 3)
    dense = record.plans("q.post").dense(3).double() / 60
    blocks = plan_blocks(entries, size, order)
    assert blocks.mass.shape == (min(size, 60), min(size, 96))
    assert blocks.mass.sum() == pytest.approx(float(dense.sum()), rel=1e-12)
    for groups, neurons in ((blocks.rows, 60), (blocks.columns, 96)):
        assert sorted(np.concatenate(groups)) == list(range(neurons))
        assert max(map(len, groups)) - min(map(len, groups)) <= 1
    row, column = blocks.mass.shape[0] // 2, blocks.mass.shape[1] // 3
    block = dense[blocks.rows[row]][:, blocks.columns[column]]
    assert blocks.mass[row, column] == pytest.approx(float(block.sum()), rel=1e-12)
    assert blocks.density[row, column] == pytest.approx(float(block.mean()) * 60 * 96, rel=1e-12)


def test_an_even_plan_has_density_one_everywhere():
    n, m = 10, 14
    plans = sparsify([torch.full((n, m), 1 / (n * m))], [torch.ones(n, m, dtype=torch.bool)])
    for order in ("structure", "natural"):
        density = plan_blocks(plan_entries(plans, 0), 4, order).density
        np.testing.assert_allclose(density, 1.0, rtol=1e-3)  # the record keeps float16


def test_structure_order_finds_the_planted_groups(record):
    """Neurons are numbered round-robin over groups; in order, a group's neurons lie side by side on both sides."""
    entries = plan_entries(record.plans("q.post"), 0)
    rows, columns = structure_order(entries)
    assert sorted(rows) == list(range(60)) and sorted(columns) == list(range(96))
    for order in (rows, columns):
        group = order % GROUPS
        assert (np.diff(group) != 0).sum() == GROUPS - 1
    # and in the same order on both sides, so that the picture is a diagonal of blocks
    assert list(dict.fromkeys(rows % GROUPS)) == list(dict.fromkeys(columns % GROUPS))


def test_structure_order_copes_with_neurons_that_kept_nothing():
    entries = Entries(np.array([1, 1, 30]), np.array([2, 3, 4]), np.array([0.1, 0.2, 0.3]), (40, 50))
    rows, columns = structure_order(entries)
    assert sorted(rows) == list(range(40)) and sorted(columns) == list(range(50))
    nothing = Entries(*(np.zeros(0, dtype=np.int64),) * 2, np.zeros(0), (40, 50))
    assert plan_blocks(nothing, 8).mass.sum() == 0


@pytest.mark.parametrize("order", ["structure", "natural"])
def test_feature_transport_shows_the_plan(record, order):
    row, column = record.pairs("o.pre")[5]
    figure = feature_transport(record, "o.pre", row, column, size=20, order=order)
    heat = figure.data[0]
    density, mass = np.moveaxis(np.asarray(heat.customdata, dtype=np.float64), 2, 0)
    dense = record.plans("o.pre").dense(5)
    assert mass.sum() / 100 == pytest.approx(float(dense.sum()) / 60, rel=1e-5)  # float32 in the figure
    if order == "natural":
        blocks = dense.reshape(20, 3, 96).sum(1) / 60
        np.testing.assert_allclose(mass.sum(1) / 100, blocks.sum(1), rtol=1e-5)
        assert heat.y[0] == "0-2" and heat.x[0] == "0-4" and heat.x[-1] == "92-95"
    np.testing.assert_allclose(10.0 ** np.asarray(heat.z)[density > 1], density[density > 1], rtol=1e-5)
    assert (
        str(TARGET_LAYERS[row]) in figure.layout.title.text and str(SOURCE_LAYERS[column]) in figure.layout.title.text
    )
    assert len(set(heat.x)) == 20 and len(set(heat.y)) == 20


def test_feature_transport_names_the_kept_pairs_when_asked_for_another(record):
    row = 0
    missing = next(column for column in range(len(SOURCE_LAYERS)) if (row, column) not in record.pairs("q.post"))
    with pytest.raises(ValueError, match=rf"q\.post: the pair \(row 0, column {missing}\).*keeps columns \["):
        feature_transport(record, "q.post", row, missing)


def test_strongest_pairs(record):
    plan = record.tensors["layer_plan.o.post"]
    for row, column in strongest_pairs(record, "o.post"):
        kept = [pair[1] for pair in record.pairs("o.post") if pair[0] == row]
        assert plan[row, column] == max(plan[row, other] for other in kept)
    assert [row for row, _ in strongest_pairs(record, "o.post")] == list(range(len(TARGET_LAYERS)))


def test_top_mass_is_the_records_mean_over_pairs_and_features(record):
    figure = top_mass(record)
    lines = {trace.name: trace for trace in figure.data[: len(WIDTHS) + 1]}
    means = {key: 100 * record.tensors[f"mass.{key}"].mean(0).numpy() for key in WIDTHS}
    for key, name in (("qkv.pre", "input of q, k and v"), ("q.post", "output of q"), ("o.pre", "input of o")):
        trace, width = lines[name], WIDTHS[key][1]
        assert list(trace.x) == [k for k in MASS_AT if k < width] + [width]
        np.testing.assert_allclose(trace.y[:-1], means[key][: len(trace.y) - 1], rtol=1e-5)
        assert trace.y[-1] == 100
        np.testing.assert_allclose(trace.customdata, 100 * np.array(trace.x) / width)
        assert trace.y[0] > trace.customdata[0]  # planted structure: more than an even plan
    overall = lines["mean over features"]
    np.testing.assert_allclose(overall.y, np.mean(list(means.values()), 0)[: len(overall.y)], rtol=1e-5)
    evens = figure.data[len(WIDTHS) + 1 :]
    assert [trace.x[-1] for trace in evens] == [64, 96]
    assert figure.layout.xaxis.type == "log"


def test_norm_ratios(report):
    figure = norm_ratios(typed(report))
    q, o, equal = figure.data
    assert list(q.x) == list(TARGET_LAYERS) and list(q.y) == report["fusion"]["projections"]["q"]["norm_ratio"]
    assert list(o.y) == [0.02, 0.03, None, 0.05, 0.06, 0.07]
    assert list(equal.y) == [1, 1]
    assert figure.layout.yaxis.type == "log" and figure.layout.yaxis.ticktext[0] == "0.001"
    report["fusion"]["projections"]["q"]["norm_ratio"] = [1e-9] * 6
    assert norm_ratios(typed(report)).layout.yaxis.ticktext[0] == "1e-09"


def test_scores_show_values_intervals_and_judgements(report):
    figure = scores(typed(report))
    upper = {trace.y[0]: trace for trace in figure.data if trace.xaxis == "x"}
    lower = {trace.y[0]: trace for trace in figure.data if trace.xaxis == "x2"}
    assert {name: trace.x[0] for name, trace in upper.items()} == {
        "target, unchanged": 2.9,
        "fused": 3.1,
        "control: shrink": 3.09,
        "control: noise": 2.9,
        "control: permuted": 3.3,
        "source": 1.5,
    }
    assert {name: trace.x[0] for name, trace in lower.items()} == {
        "fused": 0.2,
        "control: shrink": 0.19,
        "control: noise": 0.001,
        "control: permuted": 0.4,
    }
    bar = lower["fused"].error_x
    assert bar.array[0] == pytest.approx(0.02) and bar.arrayminus[0] == pytest.approx(0.02)
    assert lower["fused"].marker.color == BAD and lower["control: noise"].marker.color == NEUTRAL
    assert "+0.1800 to +0.2200" in lower["fused"].hovertemplate
    low, high = figure.layout.xaxis2.range
    assert low < 0 < high and high > 0.42
    report["evaluation"]["difference"] = interval(-0.2, 0.02)
    assert next(trace for trace in scores(typed(report)).data if trace.xaxis == "x2").marker.color == GOOD


def test_scores_without_controls(report):
    report["evaluation"]["controls"] = {}
    assert len(scores(typed(report)).data) == 4


def test_timing_adds_up(report):
    figure = timing(typed(report))
    assert sum(sum(trace.x) for trace in figure.data) == pytest.approx(4.0)
    assert list(figure.data[0].x) == [2.5, 0.0] and list(figure.data[1].x) == [0.5, 1.0]
    assert figure.data[0].customdata[0] == "1.5 GB"


def test_names_are_text_in_figures(report):
    report["stages"][0]["name"] = "<b>x</b>&"
    report["evaluation"]["controls"]["<i>"] = report["evaluation"]["controls"].pop("noise")
    assert timing(typed(report)).data[0].y[0] == "&lt;b&gt;x&lt;/b&gt;&amp;"
    assert "control: &lt;i&gt;" in [trace.y[0] for trace in scores(typed(report)).data]


def test_neurons_in_words():
    assert numbers([5]) == "5"
    assert numbers([5, 6, 7]) == "5-7"
    assert numbers([7, 6, 5]) == "7, 6, 5"
    assert numbers([9, 1, 4, 2, 8]) == "9, 1, 4, 2, ... (5 in all)"


def test_findings_say_what_was_measured(report):
    verdict, held_out, controls, arrived = findings(typed(report))
    assert verdict.startswith("The merge hurts")
    assert "3.1000 bits per byte" in held_out and "+0.2000 (95 % interval +0.1800 to +0.2200" in held_out
    assert controls.endswith(
        "The merge is better than permuted, and the merge is worse than noise, "
        "and it cannot be told from shrink by these intervals."
    )
    assert "0 to 0.07 times" in arrived and "most of what fusing with alpha 0.1 does is to shrink them" in arrived


def test_findings_of_other_runs(report):
    for item in report["fusion"]["projections"].values():
        item["norm_ratio"] = [1e-9] * 6
    assert "nothing arrives" in findings(typed(report))[-1]
    report["fusion"]["what"] = "task-vector"
    assert findings(typed(report))[-1].endswith("added to them, and nothing is taken away.")
    report |= {"verdict": "no difference", "same_model": True}
    report["evaluation"]["controls"] = {}
    found = findings(typed(report))
    assert "no difference that these texts can show" in found[0] and "same model" in found[-1] and len(found) == 4
