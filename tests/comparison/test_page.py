"""The comparison's page, from a comparison made by hand: it shows what others wrote, and runs none of it."""

# ruff: noqa: F811 - a fixture that is imported is named again as an argument
import html
import re

from tests.plotted import interval, report  # noqa: F401 - one is a fixture
from tmerge.comparison.result import Comparison
from tmerge.comparison.tables import ROW_HEADINGS, added_words, row_cells
from tmerge.plots.comparison import comparison_page

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
    assert "<script>hacked" not in page and page.startswith("<!doctype html>") and page.endswith("</html>\n")
    # Plotly's own script holds HTML of its own.
    page = re.sub(r"<script.*?</script>", "", page, flags=re.DOTALL)
    rows = [re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row) for row in re.findall(r"<tr>(.*?)</tr>", page)]
    assert [[html.unescape(cell) for cell in row] for row in rows] == [
        list(ROW_HEADINGS),
        *(list(row_cells(row)) for row in found.rows),
    ]
    shown = [html.unescape(line) for line in re.findall(r"<(?:h1|title|p)>(.*?)</(?:h1|title|p)>", page)]
    title = f"{ATTACK} and someone/large: what helps"
    assert shown[:2] == [title, title] and shown[-1] == f"{added_words(found.added[0])}."
