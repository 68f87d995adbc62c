"""Pictures hold the run's numbers, whatever they are; the page holds everything, fetches nothing, and runs no name."""

import base64
import copy
import json
import shutil
from html.parser import HTMLParser

import numpy as np
import plotly.graph_objects as go
import pytest
import torch

from tmerge.fusion import (
    MASS_AT,
    FeatureStatistics,
    SparsePlans,
    TransportRecord,
    coupling_tensors,
    couplings,
    layer_plans,
    mass_of_top,
    sparsify,
)
from tmerge.plots import (
    Entries,
    feature_transport,
    layer_coupling,
    layer_flow,
    norm_ratios,
    page,
    plan_blocks,
    plan_entries,
    report_page,
    scores,
    strongest_pairs,
    structure_order,
    timing,
    top_mass,
)
from tmerge.plots.style import BAD, GOOD, NEUTRAL, numbers
from tmerge.plots.words import findings
from tmerge.recipe import TransportSettings
from tmerge.transport import feature_plan, mutual_top, solve_features, standardise

WIDTHS = {"qkv.pre": (48, 64), "q.post": (60, 96), "o.pre": (60, 96), "o.post": (48, 64)}
TARGET_LAYERS, SOURCE_LAYERS = (0, 1, 2, 3, 4, 7), (0, 2, 3, 5)  # numbers that are not places
GROUPS, TEXTS, KEPT = 6, 80, 16


def planted_features(role, layers, depth):
    """(layer, key) -> (T, n): neurons of a few groups, each group's signal drifting along the depth."""
    draw = torch.Generator().manual_seed(7)
    signals = {key: torch.randn(2, TEXTS, GROUPS, generator=draw, dtype=torch.float64) for key in WIDTHS}
    draw.manual_seed(role)
    found = {}
    for place, layer in enumerate(layers):
        t = place / (depth - 1)
        for key, widths in WIDTHS.items():
            group = torch.arange(widths[role]) % GROUPS
            early, late = signals[key]
            noise = torch.randn(TEXTS, widths[role], generator=draw, dtype=torch.float64)
            found[layer, key] = ((1 - t) * early + t * late)[:, group] + 0.3 * noise
    return found


@pytest.fixture(scope="module")
def record():
    """A record as a run keeps it, from solved plans of planted features."""
    settings = TransportSettings(layers_kept=2, entries_kept=KEPT)
    features = (
        planted_features(0, TARGET_LAYERS, len(TARGET_LAYERS)),
        planted_features(1, SOURCE_LAYERS, len(SOURCE_LAYERS)),
    )
    plans = {
        key: solve_features(
            key,
            lambda layer, key=key: features[0][layer, key],
            lambda layer, key=key: features[1][layer, key],
            TARGET_LAYERS,
            SOURCE_LAYERS,
            epsilon=settings.epsilon,
        )
        for key in WIDTHS
    }
    layers = layer_plans(plans, settings)
    coupled = couplings(("q", "o"), plans, layers, settings.layers_kept)
    statistics = [
        {place: FeatureStatistics(x.mean(0), x.std(0), x.abs().mean(0)) for place, x in side.items()}
        for side in features
    ]
    tensors = coupling_tensors(plans, layers, coupled, {"target": statistics[0], "source": statistics[1]})
    for key, solved in plans.items():
        kept = coupled["q" if key in ("qkv.pre", "q.post") else "o"].kept
        pairs = [(row, int(column)) for row in range(len(TARGET_LAYERS)) for column in kept[row]]
        dense = [
            feature_plan(
                standardise(features[0][TARGET_LAYERS[row], key]),
                standardise(features[1][SOURCE_LAYERS[column], key]),
                solved.f[row, column],
                solved.g[row, column],
                solved.epsilon,
            )
            for row, column in pairs
        ]
        sparse = sparsify(dense, [mutual_top(plan, KEPT) for plan in dense])
        tensors |= {
            f"pairs.{key}": torch.tensor(pairs, dtype=torch.int32),
            f"f.{key}": torch.stack([solved.f[pair] for pair in pairs]),
            f"g.{key}": torch.stack([solved.g[pair] for pair in pairs]),
            f"mass.{key}": torch.stack([mass_of_top(plan) for plan in dense]),
            f"plan.{key}.offsets": sparse.offsets,
            f"plan.{key}.columns": sparse.columns,
            f"plan.{key}.values": sparse.values,
            f"plan.{key}.beyond": sparse.beyond,
        }
    return TransportRecord({"schema": 1, "projections": ["q", "o"], "keys": list(WIDTHS), "epsilon": 0.1}, tensors)


def interval(value, half, **more):
    return {"value": value, "ci95": [value - half, value + half], **more}


@pytest.fixture
def report():
    layers = list(TARGET_LAYERS)
    model = {
        "commit": "a" * 40,
        "architecture": "llama",
        "parameters": 134515008,
        "layers": 8,
        "hidden_size": 48,
        "licence": "apache-2.0",
    }
    ratios = {"q": [0.004, 0.005, 0.006, 0.007, 0.008, 0.009], "o": [0.02, 0.03, 0.0, 0.05, 0.06, 0.07]}
    return {
        "schema": 1,
        "tmerge": "0.1.0",
        "verdict": "hurts",
        "target": {"ref": "someone/small@abc", **model},
        "source": {"ref": "someone/large", **model, "licence": None},
        "source_base": None,
        "same_model": False,
        "calibration": {
            "texts": 80,
            "dataset": "samples:indonesian",
            "tokens": {"target": 1200, "source": 900},
            "truncated": {"target": 0, "source": 1},
        },
        "transport": {
            "problems": 96,
            "converged": 95,
            "iterations": {"median": 6, "max": 9},
            "worst_marginal_violation": 9.6e-7,
            "epsilon": 0.1,
            "eta": 0.1,
            "layer_cost": "median-scaled",
            "layer_marginals": "balanced",
        },
        "projections": {"fused": ["q", "o"], "skipped": {"gate": "the source has no gate"}, "left_alone": ["experts"]},
        "fusion": {
            "what": "weights",
            "alpha": 0.1,
            "scale": "barycentric",
            "units": "none",
            "top_k": 16,
            "projections": {
                name: {"layers": layers, "norm_ratio": values, "neurons": 16, "of": 60, "bias": "none"}
                for name, values in ratios.items()
            },
        },
        "evaluation": {
            "metric": "bits_per_byte",
            "texts": 20,
            "bytes": 4321,
            "base": interval(2.9, 0.05),
            "fused": interval(3.1, 0.05),
            "source": interval(1.5, 0.04),
            "difference": interval(0.2, 0.02),
            "controls": {
                "shrink": interval(3.09, 0.05, difference=interval(0.19, 0.02)),
                "noise": interval(2.9, 0.05, difference=interval(0.001, 0.01)),
                "permuted": interval(3.3, 0.05, difference=interval(0.4, 0.02)),
            },
        },
        "stages": [
            {"name": "target", "seconds": 3.0, "forward_seconds": 2.5, "peak_rss_bytes": 1_500_000_000},
            {"name": "fuse", "seconds": 1.0, "forward_seconds": 0.0, "peak_rss_bytes": 1_600_000_000},
        ],
        "timing": {"total_seconds": 4.0, "forward_seconds": 2.5, "other_seconds": 1.5},
        "device": "cpu",
        "dtype": "float32",
        "seed": 0,
        "versions": {"torch": "2.13.0"},
        "notes": ["a note"],
    }


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
    figure = norm_ratios(report)
    q, o, equal = figure.data
    assert list(q.x) == list(TARGET_LAYERS) and list(q.y) == report["fusion"]["projections"]["q"]["norm_ratio"]
    assert list(o.y) == [0.02, 0.03, None, 0.05, 0.06, 0.07]
    assert list(equal.y) == [1, 1]
    assert figure.layout.yaxis.type == "log" and figure.layout.yaxis.ticktext[0] == "0.001"
    report["fusion"]["projections"]["q"]["norm_ratio"] = [1e-9] * 6
    assert norm_ratios(report).layout.yaxis.ticktext[0] == "1e-09"


def test_scores_show_values_intervals_and_judgements(report):
    figure = scores(report)
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
    assert next(trace for trace in scores(report).data if trace.xaxis == "x2").marker.color == GOOD


def test_scores_without_controls(report):
    report["evaluation"]["controls"] = {}
    assert len(scores(report).data) == 4


def test_timing_adds_up(report):
    figure = timing(report)
    assert sum(sum(trace.x) for trace in figure.data) == pytest.approx(4.0)
    assert list(figure.data[0].x) == [2.5, 0.0] and list(figure.data[1].x) == [0.5, 1.0]
    assert figure.data[0].customdata[0] == "1.50 GB"


def test_names_are_text_in_figures(report):
    report["stages"][0]["name"] = "<b>x</b>&"
    report["evaluation"]["controls"]["<i>"] = report["evaluation"]["controls"].pop("noise")
    assert timing(report).data[0].y[0] == "&lt;b&gt;x&lt;/b&gt;&amp;"
    assert "control: &lt;i&gt;" in [trace.y[0] for trace in scores(report).data]


def test_neurons_in_words():
    assert numbers([5]) == "5"
    assert numbers([5, 6, 7]) == "5-7"
    assert numbers([7, 6, 5]) == "7, 6, 5"
    assert numbers([9, 1, 4, 2, 8]) == "9, 1, 4, 2, ... (5 in all)"


def test_findings_say_what_was_measured(report):
    verdict, held_out, controls, arrived = findings(report)
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
    assert "nothing arrives" in findings(report)[-1]
    report["fusion"]["what"] = "task-vector"
    assert findings(report)[-1].endswith("added to them, and nothing is taken away.")
    report |= {"verdict": "no difference", "same_model": True}
    report["evaluation"]["controls"] = {}
    found = findings(report)
    assert "no difference that these texts can show" in found[0] and "same model" in found[-1] and len(found) == 4


class Reader(HTMLParser):
    """Collects what a browser would see: tags with attributes, the text outside scripts, the scripts' text."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.text, self.scripts, self.inside = [], [], [], None
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self.inside = tag if tag in ("script", "style") else None
        if tag == "script":
            self.scripts.append("")

    def handle_endtag(self, tag):
        self.inside = None

    def handle_data(self, data):
        if self.inside == "script":
            self.scripts[-1] += data
        elif self.inside is None:
            self.text.append(data)


def test_page_is_whole_and_fetches_nothing(report, record):
    text = report_page(report, record, "fused")
    seen = Reader(text)
    names = [tag for tag, _ in seen.tags]
    assert not {"link", "iframe", "img", "a", "object", "base"} & set(names)
    assert not [attrs for _, attrs in seen.tags if {"src", "href", "action"} & set(attrs)]
    policy = next(attrs["content"] for tag, attrs in seen.tags if attrs.get("http-equiv"))
    assert "default-src 'none'" in policy
    assert [attrs.get("lang") for tag, attrs in seen.tags if tag == "html"] == ["en"]
    assert any(attrs.get("name") == "viewport" for tag, attrs in seen.tags)
    book, plotly, script = seen.scripts
    assert len(book) < 6_000_000 and "plotly.js v" in plotly[:200]
    assert "showSendToCloud: false" in script  # plotly.js 4 offers an upload otherwise
    # every element that the script looks for is there
    ids = {attrs["id"] for _, attrs in seen.tags if "id" in attrs}
    pictures = ["scores", "norms", "mass", "timing", "coupling", "flow", "plan"]
    assert {f"{name}{part}" for name in pictures for part in ("", "-title", "-subtitle")} <= ids
    assert {f"choose-{name}" for name in ("projection", "which", "feature", "layer", "order")} <= ids
    body = " ".join(seen.text)
    for words in ("The merge hurts", "3.1000", "2.8500 to 2.9500", "apache-2.0", "not stated", "134,515,008", "a" * 40):
        assert words in body
    for words in ("95 of 96 converged", "gate was skipped: the source has no gate", "experts", "a note", "Figure 7"):
        assert words in body


def test_pages_figures_are_valid_and_hold_the_record(report, record):
    book = json.loads(Reader(report_page(report, record)).scripts[0])
    pictures = [*book["pictures"].values(), *(item for side in book["coupling"].values() for item in side.values())]
    assert len(pictures) == 4 + 2 * 4
    for picture in [*pictures, *({"figure": frame} for frame in book["features"]["frames"].values())]:
        go.Figure(picture["figure"])  # plotly's own validation: every name and value of it
    assert book["coupling"]["q"]["pre"]["title"].startswith("Projection q")
    assert [item["key"] for item in book["features"]["list"]] == list(WIDTHS)
    for item in book["features"]["list"]:
        assert [pair["target"] for pair in item["pairs"]] == list(TARGET_LAYERS)
    pair = book["features"]["list"][1]["pairs"][2]
    index = record.pairs("q.post").index(strongest_pairs(record, "q.post")[2])
    for order in ("structure", "natural"):
        blocks = plan_blocks(plan_entries(record.plans("q.post"), index), page._PLAN_SIZE, order)
        drawn = pair[order]
        levels = np.frombuffer(base64.b64decode(drawn["levels"]), np.uint8).reshape(blocks.mass.shape).astype(float)
        assert (levels > 0).tolist() == (blocks.mass > 0).tolist()
        shown = drawn["low"] + (levels - 1) / 254 * (drawn["high"] - drawn["low"])
        inside = np.log10(np.maximum(blocks.density, 1e-9)) > drawn["low"]
        # a byte has 254 steps
        step = (drawn["high"] - drawn["low"]) / 254
        np.testing.assert_allclose(shown[inside], np.log10(blocks.density[inside]), atol=0.51 * step + 1e-4)
        assert drawn["rows"] == [numbers(group.tolist()) for group in blocks.rows]


def test_page_shows_hostile_names_as_text(report, record):
    bad = "<script>alert(1)</script><img src=x onerror=alert(2)>\"'&</title>"
    clean = Reader(report_page(report, record, "x"))
    hostile = copy.deepcopy(report)
    for role in ("target", "source"):
        hostile[role] |= {"ref": bad, "licence": bad, "architecture": bad, "commit": bad}
    hostile["calibration"]["dataset"] = bad
    hostile["notes"] = [bad]
    hostile["projections"] = {"fused": ["q"], "skipped": {bad: bad}, "left_alone": [bad]}
    hostile["stages"][0]["name"] = bad
    hostile["evaluation"]["controls"][bad] = hostile["evaluation"]["controls"]["noise"]
    hostile["versions"] = {bad: bad}
    hostile["device"] = hostile["tmerge"] = bad
    seen = Reader(report_page(hostile, record, bad))
    assert len(seen.scripts) == 3 and len(clean.scripts) == 3
    assert not [tag for tag, _ in seen.tags if tag == "img"]
    assert {name for _, attrs in seen.tags for name in attrs} == {name for _, attrs in clean.tags for name in attrs}
    assert sum(bad in piece for piece in seen.text) >= 10  # shown as it is
    book = json.loads(seen.scripts[0])
    assert any("&lt;script&gt;" in name for name in book["pictures"]["timing"]["figure"]["data"][0]["y"])


def test_page_of_a_large_model_thins_out_its_layers(report, record, monkeypatch):
    monkeypatch.setattr(page, "_PLAN_BYTES", 4 * 3 * 28_000)
    book = json.loads(Reader(report_page(report, record)).scripts[0])
    for item in book["features"]["list"]:
        drawn = [pair["target"] for pair in item["pairs"]]
        assert len(drawn) < len(TARGET_LAYERS) and drawn[0] == TARGET_LAYERS[0] and drawn[-1] == TARGET_LAYERS[-1]


def test_plan_entries_of_one_plan_among_many(record):
    plans = record.plans("o.post")
    for index in (0, 4, len(record.pairs("o.post")) - 1):
        entries = plan_entries(plans, index)
        dense = torch.zeros(plans.shape, dtype=torch.float64)
        dense[entries.rows, entries.columns] = torch.from_numpy(entries.mass)
        torch.testing.assert_close(dense, plans.dense(index).double() / plans.shape[0])
    none = torch.zeros(0)
    empty = SparsePlans(torch.zeros(4, dtype=torch.int64), none.short(), none, none.long(), (3, 5))
    assert plan_entries(empty, 0).mass.size == 0


@pytest.mark.slow
def test_page_draws_in_a_browser(report, record, tmp_path):
    """Every picture at two widths and in both schemes, offline; choices change what is drawn; hovering says numbers."""
    sync_api = pytest.importorskip("playwright.sync_api")
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("no chromium here")
    (tmp_path / "report.html").write_text(report_page(report, record, "fused"), encoding="utf-8")
    with sync_api.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-gpu"])
        for width, scheme in ((380, "dark"), (1600, "light")):
            context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme, offline=True)
            tab = context.new_page()
            faults = []
            tab.on("pageerror", lambda error, faults=faults: faults.append(str(error)))
            tab.on("console", lambda line, faults=faults: faults.append(line.text))
            tab.goto((tmp_path / "report.html").as_uri())
            tab.wait_for_function("document.querySelectorAll('.js-plotly-plot .main-svg').length >= 7")
            assert tab.evaluate("document.documentElement.scrollWidth") <= width
            assert tab.locator("#coupling .hm image").count() == 1 and tab.locator("#flow .sankey-link").count() == 12
            titles = [tab.inner_text("#plan-title"), tab.inner_text("#coupling-title")]
            tab.select_option("#choose-feature", "o.post")
            tab.select_option("#choose-layer", "7")
            tab.select_option("#choose-order", "natural")
            tab.select_option("#choose-projection", "o")
            assert tab.inner_text("#plan-title") == "Output of o: target layer 7 and source layer 5"
            assert titles != [tab.inner_text("#plan-title"), tab.inner_text("#coupling-title")]
            cell = tab.evaluate("Plotly.Fx.hover('plan', [{curveNumber: 0, pointNumber: [0, 0]}]) || 1")
            assert cell == 1 and "target neurons 0" in tab.locator("#plan .hoverlayer").inner_text()
            assert "Share" not in " ".join(
                tab.evaluate("[...document.querySelectorAll('.modebar-btn')].map(button => button.dataset.title)")
            )
            assert faults == []
            context.close()
        browser.close()
