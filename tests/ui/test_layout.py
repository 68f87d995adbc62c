"""Every tab at three widths, light and dark: all can be read and is named, has room, and nothing complains."""

from __future__ import annotations

import pytest

pytest.importorskip("playwright.sync_api", reason="playwright is not installed")

pytest.importorskip("axe_playwright_python", reason="axe-playwright-python is not installed")

from playwright.sync_api import expect

from tests.ui.axe import assert_accessible
from tests.ui.boxes import assert_roomy, crowded
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
_LARGE = """() => {
  for (const cell of document.querySelectorAll("#expected td")) cell.textContent = "28672 \u00d7 28672";
}"""
_OVERFLOW = "() => document.documentElement.scrollWidth - document.documentElement.clientWidth"
# Of a field or what is drawn around it.
_OUTLINE = """(node) => {
  for (let at = node; at && !at.matches(".form, main"); at = at.parentElement) {
    const style = getComputedStyle(at);
    if (style.outlineStyle !== "none" && parseFloat(style.outlineWidth) > 0) return parseFloat(style.outlineWidth);
  }
  return 0;
}"""
# Text against what is behind it: the WCAG's contrast, in our own cards and in the map, which axe does not judge.
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
  return [...document.querySelectorAll(".card *, .run-head *, .step *, .note, #run-map text")]
    .filter((node) => node.checkVisibility() && [...node.childNodes].some((n) => n.nodeType === 3 && n.data.trim()))
    .filter((node) => !node.closest("caption"))
    .map((node) => {
      const style = getComputedStyle(node);
      const ink = parse(node.closest("svg") ? style.fill : style.color);
      const pair = [light(ink), light(behind(node))].sort((a, b) => b - a);
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
    page.get_by_role("tab", name=name, exact=True).click()


@pytest.mark.parametrize(
    ("width", "themes"),
    [
        (380, ("dark",)),
        pytest.param(380, ("light",), marks=pytest.mark.slow),
        pytest.param(768, ("light", "dark"), marks=pytest.mark.slow),
        pytest.param(1440, ("light", "dark"), marks=pytest.mark.slow),
    ],
)
def test_every_tab_is_read_and_named_and_has_room(visit, run_id, width, themes):
    page = visit(f"&run={run_id}", width=width)
    # A colour on its way to another is none that anybody reads.
    page.emulate_media(reduced_motion="reduce")
    expect(page.locator("#run-head")).to_contain_text("Done", timeout=30_000)
    for name in TABS:
        open_tab(page, name)
        page.locator(READY[name]).first.wait_for()
        open_folds(page)
        if name == "Choose":
            # As large as models get.
            page.evaluate(_LARGE)
        for theme in themes:
            where = f"{name}, {width} px, {theme}"
            page.evaluate("(dark) => { document.body.classList.toggle('dark', dark); }", theme == "dark")
            assert_readable(page, "main", *TEXTS[name])
            assert_roomy(page, where)
            assert_accessible(page, where)
            assert page.evaluate(_OVERFLOW) <= 0, where
            assert page.evaluate(_UNNAMED) == [], where
            assert page.evaluate(_CONTRAST) == [], where


def test_tabs_without_a_run_are_as_they_should_be(visit):
    page = visit(width=380, theme="dark")
    page.emulate_media(reduced_motion="reduce")
    for name in TABS:
        open_tab(page, name)
        if name in ("Choose", "Run"):
            page.locator(READY[name]).first.wait_for()
        assert_readable(page, "main")
        assert_roomy(page, name)
        assert_accessible(page, name)


def open_folds(page):
    """All that a tab holds is there."""
    folds = page.locator("main button.label-wrap:visible:not(.open)")
    while folds.count():
        folds.first.click()
    page.wait_for_function("() => !document.querySelector('main button.label-wrap:not(.open)')?.checkVisibility()")


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
    ("body", "why"),
    [
        ("<div class=block style='width: 200px'><label>A name of a field <input type=text></label></div>", None),
        ("<div class=block style='width: 60px'><label>A name of a field</label></div>", "is crushed"),
        ("<div class=card style='width: 60px'><p style='width: 200px'>Words</p></div>", "crosses the side"),
        ("<div class=card style='height: 20px'><p style='height: 50px'>Words</p></div>", "crosses the end"),
        ("<div class=card style='margin-left: -20px'><p>Words</p></div>", "beside the window"),
        ("<div class=card>One</div><div class=card style='margin-top: -10px'>Two</div>", "lies over"),
        ("<p style='width: 40px; overflow-wrap: anywhere'>Unbroken</p>", "is broken"),
        ("<div style='width: 40px; overflow: auto'><b>Unbroken</b></div>", "is cut at its side"),
        ("<div class=scroll style='width: 40px; overflow: auto'><b>Unbroken</b></div>", None),
        ("<span class=overflow-menu><button>More</button></span>", "hidden in a menu"),
    ],
)
def test_what_has_no_room_is_found(browser, body, why):
    page = browser.new_page(viewport={"width": 400, "height": 300})
    page.set_content(f"<body style='margin: 0'><main>{body}</main></body>")
    said = crowded(page)
    page.close()
    assert (said == []) if why is None else any(why in line for line in said), said


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


# The keyboard comes to a box of choices, to one of many, to a name and to a number: each shows where it is.
def test_what_has_the_keyboard_is_outlined(visit):
    page = visit()
    for name in ("input[type=radio]:checked", "input[type=checkbox]", "#set-fusion-alpha input", "#target-model input"):
        field = page.locator(name).first
        assert field.evaluate(_OUTLINE) == 0, name
        field.focus()
        # To it as with the Tab key, and not with the mouse.
        page.keyboard.press("Shift+Tab")
        page.keyboard.press("Tab")
        expect(field).to_be_focused()
        assert field.evaluate(_OUTLINE) >= 2, name
