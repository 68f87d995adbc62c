"""The Look tab in a browser: clicks, choices, zoom and downloads; and what its readers answer to nonsense."""

import contextlib
import csv
import io
import json
import re
import time
from dataclasses import asdict

import pytest

pytest.importorskip("gradio", reason="the app extra is not installed")

import gradio as gr

from tests.ui.looked import (
    KEPT,
    SOURCE_LAYERS,
    SOURCE_WIDE,
    TARGET_LAYERS,
    TARGET_WIDE,
    opened,
)
from tmerge.plots import TEMPLATES, kept_layers
from tmerge.plots.zoom import MAP_CELLS
from tmerge.recipe import Recipe
from tmerge.run import Run
from tmerge.transport import TransportRecord
from tmerge.ui.parts.figure import figure_box, figure_message
from tmerge.ui.parts.look_data import looked_at
from tmerge.ui.parts.look_pictures import FIGURES, Choice, data_of, picture_of, zoomed
from tmerge.ui.tabs import look

pytestmark = pytest.mark.filterwarnings("ignore")  # Gradio's own, from its server's threads


@pytest.fixture(scope="module")
def looked(run):
    store, run_id = run
    return looked_at(store.get(run_id).folder)


# Figures of reconstructions and of comparisons; and those of the merge that is looked at here.
OF_OTHERS = ("fit", "ways", "losses", "sweep")
OF_A_MERGE = [name for name in FIGURES if name not in OF_OTHERS]


def drawn(page, name, file=None):
    """Wait until a figure is there: any, or the one of that file name."""
    wanted = f'[data-drawn="{file}"]' if file else '[data-drawn]:not([data-drawn=""])'
    page.locator(f"#look-{name} .tm-plot{wanted} .main-svg").first.wait_for()


def title(page, name):
    return page.inner_text(f"#look-{name} h3")


def shown(page, name, path):
    return page.evaluate(f"() => document.querySelector('#look-{name} .tm-plot').{path}")


def click_cell(page, row, column):
    """Click the coupling where the cell is."""
    page.locator("#look-coupling .tm-plot").scroll_into_view_if_needed()
    box = page.locator("#look-coupling .nsewdrag").bounding_box()
    page.mouse.click(
        box["x"] + box["width"] * (column + 0.5) / SOURCE_LAYERS, box["y"] + box["height"] * (row + 0.5) / TARGET_LAYERS
    )


def words_of(target, source):
    return f"target layer {target} and source layer {source}"


def title_becomes(page, words):
    page.locator("#look-map h3", has_text=words).wait_for()


def test_a_click_on_a_cell_opens_that_layer_pair(visitors, url, run, looked):
    kept = kept_layers(looked.record, "q")
    target = 2
    source = kept[target][1][0]
    missing = next(layer for layer in range(SOURCE_LAYERS) if layer not in dict(kept[target]))
    with opened(visitors, url, run[1], "Look") as page:
        drawn(page, "coupling")
        click_cell(page, target, source)
        title_becomes(page, f"Output of q: target layer {target} and source layer {source}")
        drawn(page, "map", f"tmerge-map-q-post-target-{target}-source-{source}")
        assert page.locator("#look-target input").input_value() == str(target)
        assert page.locator("#look-source input").input_value().startswith(f"{source}: kept, ")
        # A pair that was not kept has no plan, and the page says which have.
        click_cell(page, target, missing)
        title_becomes(page, f"target layer {target} and source layer {missing}")
        said = page.inner_text("#look-map .tm-message")
        assert "is not stored" in said
        assert all(f"{layer} ({share:.1f} %)" in said for layer, share in kept[target]) and len(kept[target]) == KEPT
        assert not page.locator("#look-map .tm-plot").is_visible()
        # Where the coupling shows the inputs, a click opens the inputs.
        page.locator("#look-side").get_by_label("input (pre)").check()
        drawn(page, "coupling", "tmerge-coupling-q-pre")
        click_cell(page, target, source)
        title_becomes(page, f"Input of q, k and v: target layer {target} and source layer {source}")
        assert page.locator("#look-part").get_by_label("input (pre)").is_checked()


@pytest.mark.slow
def test_a_click_on_a_stream_opens_its_layer_pair(visitors, url, run):
    from playwright.sync_api import TimeoutError as TooLate

    with opened(visitors, url, run[1], "Look") as page:
        drawn(page, "flow")
        streams = page.locator("#look-flow .sankey-link")
        assert streams.count() == KEPT * TARGET_LAYERS
        for place in (0, KEPT * TARGET_LAYERS - 1):
            words = streams.nth(place).evaluate("stream => stream.__data__.link.customdata")
            target, source = re.search(r"target layer (\d+) .* source layer (\d+)", words).groups()
            opened_pair = page.locator("#look-map h3", has_text=words_of(target, source))
            for _ in range(3):  # a click that meets a figure as it is drawn again is lost
                streams.nth(place).dispatch_event("click")
                with contextlib.suppress(TooLate):
                    opened_pair.wait_for(timeout=5000)
                    break
            title_becomes(page, words_of(target, source))


@pytest.mark.slow
def test_the_keyboard_opens_a_layer_pair(visitors, url, run, looked):
    kept = kept_layers(looked.record, "q")
    with opened(visitors, url, run[1], "Look") as page:
        drawn(page, "map")
        page.locator("#look-target input").focus()
        page.keyboard.press("Control+A")
        page.keyboard.type("3")
        page.keyboard.press("Enter")
        title_becomes(page, "target layer 3 and source layer")
        page.locator("#look-source input").focus()
        page.keyboard.press("Control+A")
        page.keyboard.type(f"{kept[3][1][0]}: kept")
        page.keyboard.press("Enter")
        title_becomes(page, f"target layer 3 and source layer {kept[3][1][0]}")


@pytest.mark.slow
def test_a_large_map_is_reduced_and_zooming_shows_its_detail(visitors, url, run):
    with opened(visitors, url, run[1], "Look") as page:
        page.locator("#look-projection").get_by_label("gate", exact=True).check()
        title_becomes(page, "Output of gate")
        page.locator("#look-order").get_by_label("the models' own").check()
        page.locator("#look-map .tm-plot .main-svg").first.wait_for()
        page.wait_for_function(
            "() => document.querySelector('#look-map .tm-plot').layout?.xaxis?.title?.text?.includes('own order')"
        )
        assert shown(page, "map", "data[0].z.length") == MAP_CELLS
        assert f"all {TARGET_WIDE} target neurons, all {SOURCE_WIDE} source" in page.inner_text("#look-map .tm-view")
        page.locator("#look-map .nsewdrag").scroll_into_view_if_needed()
        box = page.locator("#look-map .nsewdrag").bounding_box()
        page.mouse.move(box["x"] + box["width"] * 0.25, box["y"] + box["height"] * 0.25)
        page.mouse.down()
        page.mouse.move(box["x"] + box["width"] * 0.5, box["y"] + box["height"] * 0.5, steps=4)
        page.mouse.up()
        page.locator("#look-map .tm-view", has_text="a cell is 1 neuron by 1 neuron").wait_for()
        rows, columns = shown(page, "map", "data[0].z.length"), shown(page, "map", "data[0].z[0].length")
        assert 140 < rows < 160 and 120 < columns < 140  # a quarter of either side
        # Neuron by neuron, the colours are the stored entries.
        x, y = shown(page, "map", "data[0].x[0]"), shown(page, "map", "data[0].y[0]")
        assert shown(page, "map", "data[0].customdata[3][5].slice(2)") == [str(y + 3), str(x + 5)]
        # By buttons, as the keyboard reaches them: all of it, in, and to the side.
        page.locator("#look-map [data-zoom=all]").press("Enter")
        page.locator("#look-map .tm-view", has_text=f"all {TARGET_WIDE} target").wait_for()
        page.locator("#look-map [data-zoom=in]").press("Enter")
        page.locator("#look-map .tm-view", has_text=f"{TARGET_WIDE // 2} of {TARGET_WIDE} target").wait_for()
        page.locator("#look-map [data-zoom=right]").press("Enter")
        page.wait_for_function(f"() => document.querySelector('#look-map .tm-plot').data[0].x.at(-1) === {SOURCE_WIDE}")
        # The selected neurons are a map as well.
        page.locator("#look-neurons [data-zoom=in]").click()
        page.locator("#look-neurons .tm-view", has_text=f"{TARGET_WIDE // 2} of {TARGET_WIDE}").wait_for()


@pytest.mark.slow
def test_switches_and_downloads(visitors, url, run, looked):
    with opened(visitors, url, run[1], "Look") as page:
        drawn(page, "coupling")
        page.locator("#look-projection").get_by_label("o", exact=True).check()
        page.locator("#look-side").get_by_label("output (post)").check()
        drawn(page, "coupling", "tmerge-coupling-o-post")
        # Another projection's map is of a pair that this one kept.
        assert (
            page.locator("#look-map .tm-plot").is_visible()
            and "kept, " in page.locator("#look-source input").input_value()
        )
        assert title(page, "flow").startswith("Projection o") and title(page, "neurons").startswith("Projection o")
        assert [trace["name"] for trace in shown(page, "mass", "data.map(trace => ({name: trace.name}))")][:3] == [
            "q", "o", "gate",
        ]  # fmt: skip
        page.locator("#look-lines").get_by_label("by input and output").check()
        page.wait_for_function(
            "() => document.querySelector('#look-mass .tm-plot').data[0].name === 'input of q, k and v'"
        )
        with page.expect_download() as waited:
            page.locator("#look-coupling [data-do=csv]").press("Enter")
        assert waited.value.suggested_filename == "tmerge-coupling-o-post.csv"
        rows = list(csv.DictReader(io.StringIO(waited.value.path().read_text())))
        plan = looked.record.tensors["layer_plan.o.post"]
        assert len(rows) == plan.numel()
        assert float(rows[7]["weight"]) == pytest.approx(float(plan.flatten()[7]), rel=1e-6)
        with page.expect_download() as waited:
            page.locator("#look-map [data-do=png]").click()
        assert waited.value.suggested_filename.startswith("tmerge-map-o-post-target-")
        assert waited.value.suggested_filename.endswith(".png")
        assert waited.value.path().read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("width", "dark"),
    [(380, True), pytest.param(800, False, marks=pytest.mark.slow), pytest.param(1600, True, marks=pytest.mark.slow)],
)
def test_every_figure_fits_and_follows_the_theme(visitors, url, run, width, dark):
    touch = {"has_touch": True, "is_mobile": True} if width == 380 else {}
    with opened(visitors, url, run[1], "Look", width, dark, **touch) as page:
        assert not page.locator("#look-fitted").is_visible()  # it is no reconstruction
        assert not page.locator("#look-compared").is_visible()  # nor a comparison
        for name in OF_A_MERGE:
            drawn(page, name)
            assert page.locator(f"#look-{name} .tm-plot").get_attribute("aria-label")
            template = TEMPLATES["dark" if dark else "light"].layout.font.color
            assert shown(page, name, "_fullLayout.font.color") == template
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        assert page.evaluate("[...document.querySelectorAll('#look button')].every(b => b.innerText || b.ariaLabel)")
        # Another theme, with no reload.
        page.evaluate("document.body.classList.toggle('dark')")
        other = TEMPLATES["light" if dark else "dark"].layout.font.color
        page.wait_for_function(
            f"() => document.querySelector('#look-scores .tm-plot')._fullLayout.font.color === '{other}'"
        )


def test_a_tab_out_of_sight_is_right_when_it_is_shown_again(visitors, url, run):
    with opened(visitors, url, run[1], "Look") as page:
        drawn(page, "scores")
        page.get_by_role("tab", name="Try").click()
        page.locator("#look").wait_for(state="hidden")
        page.set_viewport_size({"width": 1000, "height": 900})
        page.evaluate("document.body.classList.add('dark')")
        page.wait_for_timeout(300)  # what would be drawn out of sight is drawn by then
        page.get_by_role("tab", name="Look").click()
        box = page.locator("#look-scores .tm-plot")
        box.scroll_into_view_if_needed()
        place = box.bounding_box()
        page.locator(f"#look-scores .main-svg[width='{place['width']:.0f}']").first.wait_for()
        assert shown(page, "scores", "_fullLayout.font.color") == TEMPLATES["dark"].layout.font.color
        assert place["width"] > 300 and place["x"] + place["width"] <= 1000 and 0 <= place["y"] < 900


def test_nothing_of_a_run_without_its_id(browser, url):
    context = browser.new_context()
    page = context.new_page()
    page.goto(f"{url}/?run=another")
    page.get_by_role("tab", name="Look").click()
    page.get_by_text("Nothing to look at yet").wait_for()
    assert not page.locator("#look").is_visible()
    context.close()


# -- without a browser -------------------------------------------------------------------------------------------------


class App:
    """What the readers need of the app."""

    def __init__(self, store):
        self.store = store

    def finished(self, run_id):
        from tmerge.run import Run

        found = self.store.get(run_id)
        return None if found is None else Run(found.folder)


def choice(run_id, **changes):
    return Choice(**{
        "run": run_id, "projection": "q", "side": "effective", "target": 0, "source": 0, "part": "post",
        "order": "structure", "lines": "projection",
    } | changes)  # fmt: skip


@pytest.mark.parametrize(
    "changes",
    [
        {"figure": "nothing"},
        {"projection": "../../etc/passwd"},
        {"projection": "k"},
        {"side": "both"},
        {"part": "x"},
        {"order": None},
        {"target": "a"},
        {"target": [1]},
        {"target": 99},
        {"x": ["a", 2]},
        {"x": [1]},
        {"x": [1e400, 2]},
        {"y": None},
    ],
)
def test_readers_answer_nonsense_with_one_line(run, changes):
    store, run_id = run
    good = {"figure": "map", **vars(choice(run_id, **pair_of(store, run_id))), "x": [0, 9], "y": [0, 9]}
    read = look._reader(App(store), zoomed)
    assert "z" in read(good)
    assert read(good | changes) == {"fault": "there is no such figure; choose again"}


def test_readers_of_strangers_get_nothing(run):
    read = look._reader(App(run[0]), data_of)
    for ref in (None, [], "x", {}, {"run": ""}, {"run": "guess", "figure": "map"}):
        assert set(read(ref)) == {"fault"}


def pair_of(store, run_id):
    record = looked_at(store.get(run_id).folder).record
    return {"target": 1, "source": kept_layers(record, "q")[1][0][0]}


def test_every_figure_has_its_data(run, looked):
    chosen = choice(run[1], **pair_of(*run))
    read = look._reader(App(run[0]), data_of)
    for name in OF_OTHERS:
        assert picture_of(name, looked, chosen) == ""
        assert set(read({"figure": name, **asdict(chosen)})) == {"fault"}
    for name in OF_A_MERGE:
        value = json.loads(picture_of(name, looked, chosen))
        assert value["title"] and value["caption"] and value["figure"]["data"]
        found = data_of(looked, value["ref"])
        assert found["file"] == value["file"]
        assert len(found["text"].splitlines()) > 1


def fit_of(chosen):
    return {"figure": "fit", **asdict(chosen)}


@pytest.mark.slow
def test_a_reconstruction_shows_how_well_it_was_fitted(run, visitors, url):
    store, first = run
    folder = store.get(first).folder
    recipe = Run(folder).recipe().model_dump(mode="json")
    made = {name: recipe[name] for name in ("target", "source", "dtype", "calibration")}
    made["calibration"] |= {"rows": "tokens", "match_on": None, "texts": 60}
    made |= {"fusion": {"what": "reconstruct", "alpha": 0.5, "keep": None}, "evaluation": {"texts": 8, "controls": []}}
    run_id = store.start(Recipe.from_mapping(made), "another")
    end = time.monotonic() + 120
    while store.get(run_id).state not in ("done", "failed"):
        assert time.monotonic() < end
        time.sleep(0.1)
    assert store.get(run_id).state == "done", store.get(run_id).error
    found = looked_at(store.get(run_id).folder)
    errors, text = found.report.fusion.fit.errors, data_of(found, fit_of(choice(run_id)))["text"]
    cells = [line.split(",") for line in text.splitlines()[1:]]
    assert len(cells) == sum(map(len, errors.values()))
    for name, layer, before, after in cells:
        place = found.report.fusion.projections[name].layers.index(int(layer))
        assert (float(before), float(after)) == pytest.approx(errors[name][place], rel=1e-6)
    with opened(visitors, url, run_id, "Look") as page:
        drawn(page, "fit")
        box = page.locator("#look-fit .tm-plot")
        box.scroll_into_view_if_needed()
        shown_at = box.bounding_box()
        assert shown_at["width"] > 300 and shown_at["height"] > 200
        assert 0 <= shown_at["y"] < page.viewport_size["height"]


def test_a_run_without_descent_says_how_to_have_it(run, looked):
    evaluation = looked.report.evaluation.model_copy(update={"descent": None})
    report = looked.report.model_copy(update={"evaluation": evaluation})
    without = type(looked)(looked.folder, report, looked.record)
    value = json.loads(picture_of("descent", without, choice(run[1])))
    assert "figure" not in value and "evaluation.descent" in value["message"]


def test_records_are_read_as_they_are_needed(looked):
    whole = TransportRecord.load(looked.folder / "tmerge" / "transport.safetensors")
    assert len(looked.record.tensors) < len(whole.tensors)
    for name in ("cost.q.post", "plan.gate.post.values"):
        assert looked.record.tensors[name].equal(whole.tensors[name])


def test_texts_of_a_figure_are_json_and_its_page_names_no_folder(run, looked):
    hostile = "</script><img src=x onerror=alert(1)>"
    assert json.loads(figure_message(hostile, hostile)) == {"title": hostile, "message": hostile}
    with gr.Blocks() as blocks:
        figure_box("x")
    text = json.dumps(blocks.config, default=str)
    assert str(looked.folder) not in text and "site-packages" not in text and "cdn" not in text
