"""The page of pictures holds everything, fetches nothing, and runs no name."""

# ruff: noqa: F811 - a fixture that is imported is named again as an argument
import base64
import copy
import json
import shutil
from html.parser import HTMLParser

import numpy as np
import plotly.graph_objects as go
import pytest
import torch

from tests.plotted import TARGET_LAYERS, WIDTHS, record, report  # noqa: F401 - two fixtures
from tests.reported import typed
from tmerge.plots import (
    TEMPLATES,
    page,
    plan_blocks,
    plan_entries,
    report_page,
    strongest_pairs,
)
from tmerge.plots.style import numbers
from tmerge.transport import SparsePlans


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
    text = report_page(typed(report), record, "fused")
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
    assert {f"{name}{part}" for name in pictures for part in ("", "-figure")} <= ids
    assert {f"choose-{name}" for name in ("projection", "which", "feature", "layer", "order")} <= ids
    body = " ".join(seen.text)
    for words in ("The merge hurts", "3.1000", "2.8500 to 2.9500", "apache-2.0", "not stated", "134,515,008", "a" * 40):
        assert words in body
    for words in ("95 of 96 converged", "gate was skipped: the source has no gate", "experts", "a note", "Figure 7"):
        assert words in body


def test_pages_figures_are_valid_and_hold_the_record(report, record):
    book = json.loads(Reader(report_page(typed(report), record)).scripts[0])
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
    clean = Reader(report_page(typed(report), record, "x"))
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
    seen = Reader(report_page(typed(hostile), record, bad))
    assert len(seen.scripts) == 3 and len(clean.scripts) == 3
    assert not [tag for tag, _ in seen.tags if tag == "img"]
    assert {name for _, attrs in seen.tags for name in attrs} == {name for _, attrs in clean.tags for name in attrs}
    assert sum(bad in piece for piece in seen.text) >= 10  # shown as it is
    book = json.loads(seen.scripts[0])
    assert any("&lt;script&gt;" in name for name in book["pictures"]["timing"]["figure"]["data"][0]["y"])


def test_page_of_a_large_model_thins_out_its_layers(report, record, monkeypatch):
    monkeypatch.setattr(page, "_PLAN_BYTES", 4 * 3 * 28_000)
    book = json.loads(Reader(report_page(typed(report), record)).scripts[0])
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
        pytest.skip("no chromium here to draw the page in; make browser installs it")
    (tmp_path / "report.html").write_text(report_page(typed(report), record, "fused"), encoding="utf-8")
    with sync_api.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-gpu"])
        for width, scheme in ((380, "dark"), (1600, "light")):
            context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme, offline=True)
            tab = context.new_page()
            tab.set_default_timeout(20_000)
            faults = []
            tab.on("pageerror", lambda error, faults=faults: faults.append(str(error)))
            tab.on("console", lambda line, faults=faults: faults.append(line.text))
            tab.goto((tmp_path / "report.html").as_uri())
            for name in ("scores", "norms", "mass", "timing", "coupling", "flow", "plan"):
                tab.locator(f"#{name}[data-drawn=tmerge-{name}] .main-svg").first.wait_for()
            assert tab.evaluate("document.documentElement.scrollWidth") <= width
            assert tab.locator("#coupling .hm image").count() == 1 and tab.locator("#flow .sankey-link").count() == 12
            titles = [tab.inner_text("#plan-figure h3"), tab.inner_text("#coupling-figure h3")]
            tab.select_option("#choose-feature", "o.post")
            tab.select_option("#choose-layer", "7")
            tab.select_option("#choose-order", "natural")
            tab.select_option("#choose-projection", "o")
            assert tab.inner_text("#plan-figure h3") == "Output of o: target layer 7 and source layer 5"
            assert titles != [tab.inner_text("#plan-figure h3"), tab.inner_text("#coupling-figure h3")]
            tab.locator("#plan[data-drawn=tmerge-plan]").wait_for()
            # A hand on the map's first cell.
            surface = tab.locator("#plan .nsewdrag").first
            surface.scroll_into_view_if_needed()
            box = surface.bounding_box()
            tab.mouse.move(box["x"] + 30, box["y"] + 30)
            tab.mouse.move(box["x"] + 2, box["y"] + 2)
            tab.locator("#plan .hoverlayer", has_text="target neurons 0").wait_for(state="attached", timeout=10_000)
            assert "Share" not in " ".join(
                tab.evaluate("[...document.querySelectorAll('.modebar-btn')].map(button => button.dataset.title)")
            )
            # Another width and the other colours, while it is out of sight.
            tab.evaluate("document.querySelector('main').style.display = 'none'")
            tab.set_viewport_size({"width": width - 40, "height": 900})
            other = "light" if scheme == "dark" else "dark"
            tab.emulate_media(color_scheme=other)
            tab.wait_for_timeout(300)
            tab.evaluate("document.querySelector('main').style.display = ''")
            wide = tab.locator("#scores").bounding_box()["width"]
            tab.locator(f"#scores .main-svg[width='{wide:.0f}']").first.wait_for()
            assert tab.evaluate("document.getElementById('scores')._fullLayout.font.color") == (
                TEMPLATES[other].layout.font.color
            )
            tab.locator("#scores").scroll_into_view_if_needed()
            box = tab.locator("#scores .main-svg").first.bounding_box()
            assert box["width"] > 250 and 0 <= box["x"] and box["x"] + box["width"] <= width - 40 and box["y"] < 900
            assert faults == []
            context.close()
        browser.close()
