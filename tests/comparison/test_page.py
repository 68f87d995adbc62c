"""The comparison's page, from a comparison made by hand: it shows what others wrote, and runs none of it."""

# ruff: noqa: F811 - a fixture that is imported is named again as an argument
import html
import re
import shutil

import pytest

from tests.plotted import interval, report  # noqa: F401 - one is a fixture
from tmerge.comparison.result import Comparison
from tmerge.comparison.tables import ROW_HEADINGS, added_words, row_cells
from tmerge.plots.comparison import comparison_page
from tmerge.plots.style import TEMPLATES

ATTACK = "\"'><script>hacked</script>&amp;"


def comparison(report):
    """Two models, the base and two rows beside it, all named by someone who means ill."""

    def row(name, kind, **more):
        return {"name": name, "kind": kind, "tokens": 0, "steps": 0, "seconds": 1.0, "domains": {}, **more}

    made = {**interval(3.1, 0.05), "difference": interval(0.2, 0.02)}
    return Comparison.model_validate(
        {
            "schema": 1,
            "metric": "bits_per_byte",
            "texts": 20,
            "target": {**report["target"], "ref": ATTACK},
            "source": report["source"],
            "calibration": report["calibration"],
            "alpha": 0.1,
            "descent": {"texts": 2, "projections": {}},
            "adaptation": {},
            "rows": [
                row("base", "reference", **interval(2.9, 0.05)),
                row("fused", "still", **made),
                row(ATTACK, "source", of=ATTACK, **made),
            ],
            "added": [{"row": "fused+sft", "to": ATTACK, "seeds": [], **interval(-0.1, 0.05)}],
            "versions": {},
        }
    )


def test_page_shows_every_row_and_runs_no_name(report):
    found = comparison(report)
    page = comparison_page(found)
    assert "<script>hacked" not in page and page.startswith("<!DOCTYPE html>") and page.endswith("</html>\n")
    assert "default-src 'none'" in page
    # Plotly's own script holds HTML of its own.
    page = re.sub(r"<script.*?</script>", "", page, flags=re.DOTALL)
    cells = [
        re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row, re.DOTALL)
        for row in re.findall(r"<tr>(.*?)</tr>", page, re.DOTALL)
    ]
    rows = [[cell.strip() for cell in row] for row in cells]
    assert [[html.unescape(cell) for cell in row] for row in rows] == [
        list(ROW_HEADINGS),
        *(list(row_cells(row)) for row in found.rows),
    ]
    shown = [html.unescape(line) for line in re.findall(r"<(?:h1|title|p)>(.*?)</(?:h1|title|p)>", page)]
    title = f"{ATTACK} and someone/large: what helps"
    assert shown[:2] == [f"{title}: tmerge comparison", title] and f"{added_words(found.added[0])}." in shown


@pytest.mark.slow
@pytest.mark.parametrize(("width", "scheme"), [(380, "dark"), (1440, "light")])
def test_page_draws_in_a_browser(report, tmp_path, width, scheme):
    """Every figure in its place, offline, in the reader's colours; a button of one changes what it shows."""
    sync_api = pytest.importorskip("playwright.sync_api")
    chromium = shutil.which("chromium")
    if chromium is None:
        # It is no Python package; make browser, which the test commands call first, brings it.
        pytest.skip("no chromium here to draw the page in; make browser installs it")
    whole = comparison(report).model_dump(mode="json", by_alias=True)
    for row, value in zip(whole["rows"], (3.0, 2.8, 3.3), strict=True):
        row["domains"] = {"Malay": interval(value, 0.05)}
    whole["rows"].append({**whole["rows"][1], "name": "fused at 0.5", "kind": "sweep", "of": "fused", "alpha": 0.5})
    found = Comparison.model_validate(whole)
    (tmp_path / "compare.html").write_text(comparison_page(found), encoding="utf-8")
    with sync_api.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-gpu"])
        context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme, offline=True)
        tab = context.new_page()
        faults = []
        tab.on("pageerror", lambda error: faults.append(str(error)))
        tab.on("console", lambda line: faults.append(line.text))
        tab.goto((tmp_path / "compare.html").as_uri())
        for name in ("rows", "alphas", "domains", "sources", "descent"):
            tab.locator(f"#{name}[data-drawn=tmerge-{name}] .main-svg").first.wait_for()
            box = tab.locator(f"#{name} .main-svg").first.bounding_box()
            assert box["width"] > 250 and 0 <= box["x"] and box["x"] + box["width"] <= width
            assert tab.evaluate(f"document.getElementById('{name}')._fullLayout.font.color") == (
                TEMPLATES[scheme].layout.font.color
            )
        assert tab.evaluate("document.documentElement.scrollWidth") <= width
        tab.screenshot(path=tmp_path / "page.png", full_page=True)
        shown = "document.getElementById('domains').data.filter(trace => trace.visible).map(trace => trace.meta)"
        assert set(tab.evaluate(shown)) == {"z-score"}
        tab.locator("#domains .updatemenu-header").click()
        tab.locator("#domains .updatemenu-dropdown-button", has_text="min-max").click()
        assert set(tab.evaluate(shown)) == {"min-max"}
        assert faults == []
        browser.close()
