"""Whether what is on the page has room: nothing beside the window or its card, over another thing, cut or crushed."""

from __future__ import annotations

import time
from typing import Any

__all__ = ["assert_roomy", "crowded"]

_PATIENCE = 10.0
# What is wide by nature scrolls sideways within its frame, and what a figure draws is its own affair.
_SIDEWAYS = ".scroll, .cm-scroller, table, pre, .tm-plot, .js-plotly-plot"
# What a visitor sees as one thing; none of it lies within another of them.
_THINGS = (
    ".card, .block:not(:has(.block)):not(:has(.card)):not(.hide-container), .tm-figure, button:not(.block *), .step, "
    "main h1, main h2, main h3:not(.tm-figure *)"
)
# What has to lie within the card or the field that it is part of, and what is worked with there.
_FRAMES = ".card, .block, .form"
_PARTS = "input:not([type=file]), textarea, button, label, table, dl, ul, p, figure, .bar, .cm-editor, .wrap-inner"
# Names that may break anywhere.
_BREAKABLE = ".break, code, pre, .cm-editor, svg, a, .pairname, .log, caption, .sr-only, #push-markdown td"

_CROWDED = """([sideways, things, frames, parts, breakable]) => {
  const said = [], slack = 1.5, wide = document.documentElement.clientWidth;
  const seen = (node) => {
    const box = node.getBoundingClientRect();
    return box.width > 1 && box.height > 1 && !node.closest("caption, .sr-only, .visually-hidden, [aria-hidden=true]")
      && node.checkVisibility({ visibilityProperty: true, opacityProperty: true });
  };
  const name = (node) => `${node.tagName.toLowerCase()}${node.id ? "#" + node.id : ""} `
    + JSON.stringify((node.textContent || node.getAttribute("aria-label") || "").trim().slice(0, 40));
  const all = (selector) => [...document.querySelectorAll("main")]
    .flatMap((main) => [...main.querySelectorAll(selector)]).filter(seen);
  const scrolled = (node) => {
    const at = node.parentElement.closest(sideways);
    return at && at.closest("main");
  };

  for (const node of all(`${things}, ${parts}`)) {
    const box = node.getBoundingClientRect();
    if (scrolled(node)) continue;
    if (box.left < -slack || box.right > wide + slack) said.push(`${name(node)} lies beside the window`);
    const frame = node.parentElement.closest(frames);
    if (!frame || !frame.closest("main")) continue;
    const around = frame.getBoundingClientRect(), scrolls = getComputedStyle(frame).overflowY === "auto";
    if (box.left < around.left - slack || box.right > around.right + slack) {
      said.push(`${name(node)} crosses the side of ${name(frame)}`);
    }
    if (!scrolls && !node.closest(".tall, .log, .cm-scroller") && box.bottom > around.bottom + slack) {
      said.push(`${name(node)} crosses the end of ${name(frame)}`);
    }
  }

  const boxes = all(things).filter((node) => !node.parentElement.closest(sideways))
    .map((node) => [node, node.getBoundingClientRect()]);
  for (const [i, [node, a]] of boxes.entries()) {
    for (const [other, b] of boxes.slice(i + 1)) {
      if (node.contains(other) || other.contains(node)) continue;
      const x = Math.min(a.right, b.right) - Math.max(a.left, b.left);
      const y = Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top);
      if (x > slack && y > slack) said.push(`${name(node)} lies over ${name(other)}`);
    }
  }

  // A field narrower than this has no room for its words, nor for what is typed in it.
  for (const node of all(".block:has(label, [data-testid=block-info]):not(:has(.block))")) {
    if (node.getBoundingClientRect().width < 140) said.push(`${name(node)} is crushed`);
  }
  // What sticks out of a frame that hides it, or scrolls where nobody would look for it.
  for (const node of all("*")) {
    const style = getComputedStyle(node);
    if (node.matches(sideways) || node.closest("svg") || node.matches("input, textarea") || scrolled(node)) continue;
    if (style.textOverflow === "ellipsis") continue;
    if (style.overflowX !== "visible" && node.scrollWidth > node.clientWidth + slack) {
      said.push(`${name(node)} is cut at its side`);
    }
    if (style.overflowY === "hidden" && node.scrollHeight > node.clientHeight + slack) {
      said.push(`${name(node)} is cut at its end`);
    }
  }
  // The words of a figure.
  for (const node of all("svg text")) {
    const frame = node.closest(".block, .tm-figure"), box = node.getBoundingClientRect();
    if (!frame) continue;
    const around = frame.getBoundingClientRect();
    if (box.left < around.left - slack || box.right > around.right + slack) {
      said.push(`${name(node)} crosses the side of its figure`);
    }
  }
  if (all(".overflow-menu").length) said.push("tabs are hidden in a menu");
  // A word in several rectangles is broken in its midst.
  const walker = document.createTreeWalker(document.querySelector("main"), NodeFilter.SHOW_TEXT);
  for (let text = walker.nextNode(); text; text = walker.nextNode()) {
    if (!text.data.trim() || text.parentElement.closest(breakable) || !seen(text.parentElement)) continue;
    for (const word of text.data.matchAll(/[\\p{L}\\p{N}]+/gu)) {
      // As long as a digest, it has to break somewhere.
      if (word[0].length > 24) continue;
      const range = document.createRange();
      range.setStart(text, word.index);
      range.setEnd(text, word.index + word[0].length);
      const lines = new Set([...range.getClientRects()].map((rect) => Math.round(rect.top)));
      if (lines.size > 1) said.push(`${JSON.stringify(word[0])} is broken, in ${name(text.parentElement)}`);
    }
  }
  return said;
}"""


def assert_roomy(page: Any, where: str) -> None:
    """Everything that is shown has its room, soon: a figure is fitted once it is shown.

    Args:
        page: Of Playwright.
        where: Said with what has not.
    """
    until = time.monotonic() + _PATIENCE
    while (faults := crowded(page)) and time.monotonic() < until:
        page.wait_for_timeout(200)
    assert faults == [], f"{where}: " + "\n".join(faults)


def crowded(page: Any) -> list[str]:
    """What has no room, each with why."""
    return page.evaluate(_CROWDED, [_SIDEWAYS, _THINGS, _FRAMES, _PARTS, _BREAKABLE])
