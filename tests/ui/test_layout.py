"""Every tab at the narrowest and the widest, light and dark: nothing overflows, all is named, nothing complains."""

from __future__ import annotations

import pytest

pytest.importorskip("playwright.sync_api", reason="playwright is not installed")

from playwright.sync_api import expect

TABS = ("Choose", "Run", "Look", "Try", "Push")

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


@pytest.mark.parametrize(("width", "theme"), [(380, "dark"), (1600, "light")])
def test_every_tab_fits_and_is_named(visit, run_id, width, theme):
    page = visit(f"&run={run_id}", width=width, theme=theme)
    expect(page.locator("#run-head")).to_contain_text("Done", timeout=30_000)
    ready = {"Look": "#look .main-svg", "Try": "#try-prompt", "Push": "#push-markdown h1", "Run": "#run-map .main-svg"}
    for name in TABS:
        open_tab(page, name)
        page.locator(ready.get(name, "#start")).first.wait_for()
        assert page.evaluate(_OVERFLOW) <= 0, name
        assert page.evaluate(_UNNAMED) == [], name
        assert page.evaluate(_CONTRAST) == [], name


def test_the_tabs_are_walked_with_the_keyboard(visit):
    page = visit()
    page.get_by_role("tab", name="Choose", exact=True).focus()
    page.keyboard.press("Tab")
    expect(page.get_by_role("tab", name="Run", exact=True)).to_be_focused()
    page.keyboard.press("Enter")
    expect(page.locator("#run-head")).to_be_visible()
