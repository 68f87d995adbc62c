"""Maps that are zoomed into, the data behind pictures, and what the app's pictures need beyond the page's."""

import base64
import csv
import io

import numpy as np
import pytest
import torch

from tests.plotted import KEPT, SOURCE_LAYERS, TARGET_LAYERS, WIDTHS, record, report  # noqa: F401 - two fixtures
from tests.reported import typed
from tmerge.plots import (
    data,
    kept_layers,
    layer_coupling,
    map_figure,
    neurons_figure,
    neurons_view,
    pair_place,
    picture,
    plan_blocks,
    plan_entries,
    plan_orders,
    plan_view,
    stretch,
    top_mass,
    window_blocks,
)
from tmerge.transport import MASS_AT, TransportRecord


@pytest.fixture
def chosen(record):  # noqa: F811
    """The record with selected neurons, as a run's has them."""
    draw = np.random.default_rng(3)
    neurons = np.stack([np.sort(draw.choice(60, 12, replace=False)) for _ in TARGET_LAYERS])
    return TransportRecord(record.facts, record.tensors | {"neurons.q": torch.tensor(neurons, dtype=torch.int32)})


def rows_of(text):
    return list(csv.DictReader(io.StringIO(text)))


@pytest.mark.parametrize("order", ["structure", "natural"])
@pytest.mark.parametrize("size", [5, 16, 500])
def test_a_window_is_that_part_of_the_whole(record, order, size):  # noqa: F811
    """Whatever its size, a window's mass is that of the ordered plan between its ends."""
    entries = plan_entries(record.plans("q.post"), 2)
    rows, columns = plan_orders(entries, order)
    dense = record.plans("q.post").dense(2).double().numpy()[rows][:, columns] / 60
    blocks = window_blocks(entries, (rows, columns), (10, 33), (4, 71), size)
    assert blocks.mass.shape == (min(size, 23), min(size, 67))
    assert blocks.mass.sum() == pytest.approx(dense[10:33, 4:71].sum(), rel=1e-12)
    np.testing.assert_array_equal(np.concatenate(blocks.rows), rows[10:33])
    if size == 500:  # neuron by neuron
        np.testing.assert_allclose(blocks.mass, dense[10:33, 4:71], rtol=1e-12)


def test_a_view_of_the_whole_is_the_blocks(record):  # noqa: F811
    entries = plan_entries(record.plans("o.pre"), 1)
    view = plan_view(entries, plan_orders(entries, "structure"), size=16)
    blocks = plan_blocks(entries, 16)
    density = blocks.density
    np.testing.assert_allclose(10.0 ** view.z[density > 0].astype(float), density[density > 0], rtol=1e-5)
    assert (view.z[density == 0] < -90).all()
    assert (view.y[0], view.y[-1], view.x[0], view.x[-1]) == (0, 60, 0, 96)
    assert np.diff(view.y).tolist() == [len(group) for group in blocks.rows]
    assert "all 60 target neurons, all 96 source neurons; a cell is 3 or 4 neurons by 6 neurons" in view.words
    stored = np.frombuffer(base64.b64decode(view.to_dict()["z"]), "<f4").reshape(16, 16)
    np.testing.assert_array_equal(stored, view.z)


def test_zooming_reads_detail_that_the_whole_did_not_show(record):  # noqa: F811
    entries = plan_entries(record.plans("o.pre"), 1)
    orders = plan_orders(entries, "natural")
    view = plan_view(entries, orders, (12, 20), (30, 40), size=16)
    assert view.z.shape == (8, 10) and view.rows == [str(n) for n in range(12, 20)] and view.x[-1] == 40
    assert view.words == "8 of 60 target neurons, 10 of 96 source neurons; a cell is 1 neuron by 1 neuron"
    dense = record.plans("o.pre").dense(1).double().numpy()[12:20, 30:40] / 60
    np.testing.assert_allclose(10.0 ** view.z[dense > 0].astype(float), dense[dense > 0] * 60 * 96, rtol=1e-5)


@pytest.mark.parametrize(
    ("ends", "places"),
    [((3.2, 9.1), (3, 10)), ((9, 3), (3, 9)), ((-5, 400), (0, 60)), ((70, 90), (59, 60)), ((4, 4), (4, 5))],
)
def test_a_stretch_lies_within(ends, places):
    assert stretch(*ends, 60) == places


def test_a_stretch_of_nonsense_is_refused():
    with pytest.raises(ValueError, match="no stretch"):
        stretch(float("nan"), 3, 60)


def test_selected_neurons_by_layer(chosen):
    view = neurons_view(chosen, "q", size=20)
    neurons = chosen.tensors["neurons.q"].numpy()
    assert view.z.shape == (len(TARGET_LAYERS), 20) and view.rows == [str(layer) for layer in TARGET_LAYERS]
    np.testing.assert_allclose((view.z * np.diff(view.x)).sum(1), 12, rtol=1e-6)
    assert view.z[2, 4] == pytest.approx(np.isin([12, 13, 14], neurons[2]).mean())
    close = neurons_view(chosen, "q", (7, 19), size=20)
    expected = np.stack([np.isin(np.arange(7, 19), line) for line in neurons])
    np.testing.assert_array_equal(close.z, expected.astype(np.float32))
    frame = neurons_figure(chosen, "q")
    assert "12 of 60 neurons" in frame.layout.title.subtitle.text
    assert list(frame.layout.yaxis.ticktext) == [str(layer) for layer in TARGET_LAYERS]
    assert [row["neuron"] for row in rows_of(data.neurons_data(chosen, "q"))[:12]] == [str(n) for n in neurons[0]]


def test_mass_by_projection_is_the_mean_of_its_sides(record):  # noqa: F811
    figure = top_mass(record, "projection")
    lines = {trace.name: trace for trace in figure.data}
    means = {key: 100 * record.tensors[f"mass.{key}"].double().mean(0).numpy() for key in WIDTHS}
    expected = {"q": ("qkv.pre", "q.post"), "o": ("o.pre", "o.post")}
    for name, keys in expected.items():
        curve = np.mean([means[key] for key in keys], axis=0)
        np.testing.assert_allclose(lines[name].y, curve[: len(lines[name].y)], rtol=1e-6)
    overall = np.mean([lines["q"].y, lines["o"].y], axis=0)
    np.testing.assert_allclose(lines["mean over projections"].y, overall, rtol=1e-6)


def test_kept_layers_and_places(record):  # noqa: F811
    kept = kept_layers(record, "o")
    assert list(kept) == list(TARGET_LAYERS)
    columns, weights = record.tensors["kept.o.layers"], record.tensors["kept.o.weights"]
    for row, layer in enumerate(TARGET_LAYERS):
        assert [source for source, _ in kept[layer]] == [SOURCE_LAYERS[int(column)] for column in columns[row]]
        assert sum(share for _, share in kept[layer]) == pytest.approx(100)
        assert kept[layer][0][1] == pytest.approx(100 * float(weights[row, 0] / weights[row].sum()))
    assert pair_place(record, "o.post", 7, 3) == (5, 2)
    assert pair_place(record, "o.post", 5, 3) is None and pair_place(record, "o.post", 7, 1) is None


def test_coupling_of_an_input_that_more_layers_have(record):  # noqa: F811
    """Where layers reuse the keys and values of others, what enters is there in more of them than the projection."""
    fewer = dict(record.tensors)
    rows, columns = [0, 2, 5], [1, 2, 3]
    fewer["layers.target.q.post"] = record.tensors["layers.target.q.post"][rows]
    fewer["layers.source.q.post"] = record.tensors["layers.source.q.post"][columns]
    fewer["effective.q"] = record.tensors["effective.q"][rows][:, columns]
    fewer["kept.q.layers"] = torch.tensor([[0, 1], [2, 0], [1, 2]])
    fewer["kept.q.weights"] = torch.tensor([[0.3, 0.1], [0.3, 0.1], [0.3, 0.1]])
    heat, dots = layer_coupling(TransportRecord(record.facts, fewer), "q", "pre").data
    assert heat.y == tuple(map(str, TARGET_LAYERS))
    assert set(zip(dots.y, dots.x, strict=True)) == {
        ("0", "2"), ("0", "3"), ("2", "5"), ("2", "2"), ("7", "3"), ("7", "5"),
    }  # fmt: skip


@pytest.mark.parametrize("which", ["effective", "pre", "post"])
def test_coupling_data_are_the_weights(record, which):  # noqa: F811
    name = {"effective": "effective.q", "pre": "layer_plan.qkv.pre", "post": "layer_plan.q.post"}[which]
    weights = record.tensors[name].double()
    rows = rows_of(data.coupling_data(record, "q", which))
    assert len(rows) == weights.numel()
    for row in rows:
        place = TARGET_LAYERS.index(int(row["target_layer"])), SOURCE_LAYERS.index(int(row["source_layer"]))
        assert float(row["weight"]) == pytest.approx(float(weights[place]), rel=1e-6)
        assert float(row["times_even_share"]) == pytest.approx(float(weights[place]) * weights.numel(), rel=1e-4)
    kept = {(row["target_layer"], row["source_layer"]): float(row["percent_fused"]) for row in rows if row["kept_rank"]}
    expected = {
        (str(layer), str(source)): share
        for layer, sources in kept_layers(record, "q").items()
        for source, share in sources
    }
    assert kept == pytest.approx(expected, rel=1e-4)
    flow = {
        (row["target_layer"], row["source_layer"]): float(row["percent_fused"])
        for row in rows_of(data.flow_data(record, "q"))
    }
    assert flow == pytest.approx(expected, rel=1e-4)


def test_plan_and_mass_data_are_whole(record):  # noqa: F811
    entries = plan_entries(record.plans("q.post"), 4)
    rows = rows_of(data.plan_data(entries))
    dense = torch.zeros(60, 96)
    for row in rows:
        dense[int(row["target_neuron"]), int(row["source_neuron"])] = float(row["share_of_target_neuron"])
    torch.testing.assert_close(dense, record.plans("q.post").dense(4), rtol=1e-3, atol=1e-6)  # four digits are written
    assert len(rows) <= 60 * KEPT
    mass = rows_of(data.mass_data(record))
    assert {row["feature"] for row in mass} == set(WIDTHS)
    first = next(row for row in mass if row["feature"] == "o.pre" and row["k"] == "8")
    mean = 100 * float(record.tensors["mass.o.pre"][:, MASS_AT.index(8)].double().mean())
    assert float(first["percent_of_mass"]) == pytest.approx(mean, rel=1e-4)


def test_report_data(report):  # noqa: F811
    norms = rows_of(data.norms_data(typed(report)))
    assert [float(row["norm_ratio"]) for row in norms[:6]] == report["fusion"]["projections"]["q"]["norm_ratio"]
    scores = {row["model"]: row for row in rows_of(data.scores_data(typed(report)))}
    assert scores["fused"]["difference"] == "0.2" and scores["target"]["difference"] == ""
    assert float(scores["control: shrink"]["bits_per_byte"]) == 3.09
    means = {"mean": -0.05, "standard_error": 0.15, "noise_mean": 0.01, "noise_standard_error": None}
    lists = {"layers": [0, 7], "cosine": [0.1, -0.2], "noise": [0.0, 0.01], "noise_sd": [0.02, 0.03]}
    report["evaluation"]["descent"] = {"texts": 8, "projections": {"q": {**lists, "draws": 16, **means}}}
    assert [row["cosine"] for row in rows_of(data.descent_data(typed(report).evaluation.descent))] == ["0.1", "-0.2"]


def test_a_picture_gives_its_title_as_text(record):  # noqa: F811
    shown = picture(map_figure("natural", (60, 96), "a < b", "c & d"))
    assert (shown["title"], shown["subtitle"]) == ("a < b", "c & d")
    assert "template" not in shown["figure"]["layout"] and "title" not in shown["figure"]["layout"]
    assert shown["figure"]["layout"]["yaxis"]["range"] == [60, 0]
