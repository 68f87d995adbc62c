"""The same rows, in the same words, wherever a run's scores are shown."""

import html
import re

import pytest
from rich.console import Console

import tmerge.cli.show
from tests.plotted import interval, record, report  # noqa: F401 - two fixtures
from tests.reported import adaptation, typed
from tmerge.hub import card_text
from tmerge.plots import report_page
from tmerge.quantities import bytes_words, duration_words, number_words
from tmerge.recipe import Recipe
from tmerge.report import interval_words, score_rows
from tmerge.ui.parts.progress import result_cards
from tmerge.ui.server.visitor_run import VisitorRun
from tmerge.ui.tabs.try_out import _scores


@pytest.fixture
def trained(report):  # noqa: F811
    report["adaptation"] = adaptation()
    better = interval(2.7, 0.05)
    change = interval(-0.2, 0.03)
    report["evaluation"]["adapted"] = {"score": better, "difference": change, "difference_to_fused": change}
    return typed(report)


def cells_of(page):
    """Rows of HTML tables as texts."""
    rows = re.findall(r"<tr>(.*?)</tr>", page, re.DOTALL)
    return [[html.unescape(cell) for cell in re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row)] for row in rows]


def test_rows_are_in_their_order_and_say_what_they_are(trained):
    rows = score_rows(trained)
    assert [row.label for row in rows] == [
        "target, unchanged",
        "fused",
        "fused and trained",
        "control: shrink",
        "control: noise",
        "control: permuted",
        "source",
    ]
    assert rows[0].cells == ("2.9000", "2.8500 to 2.9500", "", "")
    assert rows[2].cells == ("2.7000", "2.6500 to 2.7500", "-0.2000", "-0.2300 to -0.1700")
    assert [row.is_result for row in rows] == [False, True, True, False, False, False, False]


def test_terminal_card_page_and_app_show_the_same_rows(trained, record, monkeypatch, tmp_path):  # noqa: F811
    rows = score_rows(trained)
    wide = Console(width=200, record=True, file=open("/dev/null", "w"))  # noqa: SIM115 - its text is asked for
    monkeypatch.setattr(tmerge.cli.show, "Console", lambda **options: wide)
    tmerge.cli.show.show_report(trained, "fused")
    lines = [[cell.strip() for cell in line.split("│")[1:-1]] for line in wide.export_text().splitlines()]
    recipe = Recipe(target="someone/small", source="someone/large")
    card = [[cell.strip(" *") for cell in line.split("|")[1:-1]] for line in card_text(trained, recipe).splitlines()]
    run = VisitorRun("id", recipe, tmp_path, "me", state="done", report=trained)
    app, page, beside = cells_of(result_cards(run)), cells_of(report_page(trained, record)), cells_of(_scores(trained))
    for row in rows:
        for shown in (lines, card):
            assert [row.label, *row.cells] in shown
        change = f"{row.change_words}<small>{row.change_interval_words}</small>" if row.difference else ""
        small = [f"{row.name}<small>{row.explained}</small>", f"{row.value_words}<small>{row.interval_words}</small>"]
        for shown in (page, app, beside):
            assert [*small, change] in shown


def test_numbers_in_words(trained):
    assert interval_words(trained.evaluation.base) == "2.8500 to 2.9500"
    assert interval_words(trained.evaluation.difference, signed=True) == "+0.1800 to +0.2200"
    assert [bytes_words(count) for count in (999, 1500, 2_345_678, 451e6, 1.5e9, 123.4e9)] == [
        "999 B",
        "1.5 kB",
        "2.35 MB",
        "451 MB",
        "1.5 GB",
        "123 GB",
    ]
    assert [duration_words(seconds) for seconds in (12.2, 185, 7800)] == ["12 s", "3 min 5 s", "2 h 10 min"]
    assert [number_words(value) for value in (None, 12345, 1.2e6, 1.2e9)] == ["not stated", "12,345", "1.2 M", "1.2 B"]
