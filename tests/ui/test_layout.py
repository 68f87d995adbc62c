"""Every tab at three widths, light and dark: all can be read and is named, nothing overflows, nothing complains."""

from __future__ import annotations

import pytest

pytest.importorskip("playwright.sync_api", reason="playwright is not installed")

from playwright.sync_api import expect

from tests.ui.readable import assert_readable, outside

TABS = ("Choose", "Run", "Look", "Try", "Push")
# What tells that a tab is filled, and what a visitor reads there.
READY = {
    "Choose": "#start",
    "Run": "#run-map .main-svg",
    "Look": "#look .main-svg",
    "Try": "#try-prompt",
    "Push": "#push-markdown h1",
}
TEXTS = {
    "Choose": ("#masthead", "#target-model", "#expected", "#start"),
    "Run": ("#run-head", "#run-stages", "#run-log", "#run-result", "#run-files"),
    "Look": ("#look-head", "#look h2", "#look h3"),
    "Try": ("#try-prompt", "#try-go", "#try-target", "#try-scores"),
    "Push": (
        "#push-verdict",
        "#push-account",
        "#push-files",
        "#push-metadata",
        "#push-markdown h1",
        "#push-markdown p",
    ),
}

# What a screen reader would find without a name, and whether the page is wider than its window.
_UNNAMED = """() => {
  const named = (node) => node.getAttribute("aria-label") || node.getAttribute("aria-labelledby") || node.title
    || node.closest("label") || (node.id && document.querySelector(`label[for="${CSS.escape(node.id)}"]`))
    || (node.tagName === "BUTTON" && node.textContent.trim()) || node.placeholder || node.alt;
  return [...document.querySelectorAll("main button, main input, main textarea, main select")]
    .filter((node) => node.checkVisibility({ visibilityProperty: true }) && node.type !== "file" && !named(node))
    .map((node) => node.outerHTML.slice(0, 200));
}"""
_OVERFLOW = "() => document.documentElement.scrollWidth - document.documentElement.clientWidth"
# Text against what is behind it: the WCAG's contrast, of what is written in our own cards.
_CONTRAST = """() => {
  const parse = (colour) => (colour.match(/[0-9.]+/g) || []).map(Number);
  const light = ([r, g, b]) => [r, g, b].map((v) => v / 255)
    .map((v) => (v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4))
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  const behind = (node) => {
    for (let at = node; at; at = at.parentElement) {
      const colour = parse(getComputedStyle(at).backgroundColor);
      if (colour.length === 3 || colour[3] > 0.99) return colour;
    }
    return [255, 255, 255];
  };
  return [...document.querySelectorAll(".card *, .run-head *, .step *, .note")]
    .filter((node) => node.checkVisibility() && [...node.childNodes].some((n) => n.nodeType === 3 && n.data.trim()))
    .filter((node) => !node.closest(".later") && !node.closest(".unseen"))
    .map((node) => {
      const pair = [light(parse(getComputedStyle(node).color)), light(behind(node))].sort((a, b) => b - a);
      return [(pair[0] + 0.05) / (pair[1] + 0.05), node.textContent.trim().slice(0, 40)];
    })
    .filter(([ratio]) => ratio < 4.5);
}"""


@pytest.fixture(scope="module")
def run_id(served):
    found = served.context.store.start(served.recipe(evaluation={"bootstrap": 100, "descent": 4}), "layout")
    assert served.ended(found).state == "done"
    return found


def open_tab(page, name):
    tab = page.get_by_role("tab", name=name, exact=True)
    if not tab.is_visible():
        # Where there is no room for all of them, the rest is in a menu.
        page.locator(".overflow-menu > button").click()
        page.locator(".overflow-dropdown").get_by_text(name, exact=True).click()
        return
    tab.click()


@pytest.mark.parametrize(
    ("width", "theme"),
    [
        (380, "dark"),
        pytest.param(768, "light", marks=pytest.mark.slow),
        pytest.param(1440, "dark", marks=pytest.mark.slow),
    ],
)
def test_every_tab_is_read_and_named(visit, run_id, width, theme):
    page = visit(f"&run={run_id}", width=width, theme=theme)
    expect(page.locator("#run-head")).to_contain_text("Done", timeout=30_000)
    for name in TABS:
        open_tab(page, name)
        page.locator(READY[name]).first.wait_for()
        assert_readable(page, "main", *TEXTS[name])
        assert page.evaluate(_OVERFLOW) <= 0, name
        assert page.evaluate(_UNNAMED) == [], name
        assert page.evaluate(_CONTRAST) == [], name


@pytest.mark.parametrize(
    ("style", "why"),
    [
        ("", None),
        # As the card's preview was: a second column, beside a box that scrolls.
        ("max-height: 60px; overflow: auto; display: flex; flex-flow: column wrap; width: 200px", "beside"),
        ("width: 40px; overflow: hidden; white-space: nowrap", "beside"),
        ("height: 5px; overflow: hidden", "above or below"),
        ("height: 30px; overflow: auto", None),  # read by scrolling
        ("position: absolute; left: -200px; width: 150px", "beside the window"),
        ("visibility: hidden", "nothing to read"),
        ("font-size: 0", "nothing to read"),
    ],
)
def test_text_that_is_cut_off_is_told_from_text_that_can_be_read(browser, style, why):
    """What the assertion above is worth: Playwright calls a text visible that lies outside its box."""
    page = browser.new_page(viewport={"width": 800, "height": 600})
    words = "".join(f"<p style='margin: 0'>A line of words, the {number}.</p>" for number in range(6))
    page.set_content(f"<main><div id=box style='{style}'>{words}</div></main>")
    said = outside(page, "#box")
    page.close()
    assert (said == []) if why is None else (said and why in said[0]), said


@pytest.mark.parametrize(
    ("verdict", "icon"),
    [
        ("helps", "\u25b2"),
        pytest.param("better", "\u25b3", marks=pytest.mark.slow),
        pytest.param("hurts", "\u25bc", marks=pytest.mark.slow),
    ],
)
def test_a_verdict_has_its_icon(visit, verdict, icon):
    page = visit()
    page.evaluate(
        "(verdict) => document.querySelector('#masthead p').className = `verdict ${verdict}`",
        verdict,
    )
    content = page.evaluate("() => getComputedStyle(document.querySelector('#masthead p'), '::before').content")
    assert content == f'"{icon}\u00a0"'


def test_the_tabs_are_walked_with_the_keyboard(visit):
    page = visit()
    page.get_by_role("tab", name="Choose", exact=True).focus()
    page.keyboard.press("Tab")
    expect(page.get_by_role("tab", name="Run", exact=True)).to_be_focused()
    page.keyboard.press("Enter")
    expect(page.locator("#run-head")).to_be_visible()
