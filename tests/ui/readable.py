"""Whether text can be read where it is: within its box, within what clips it, and within the window.

Playwright's `to_be_visible` asks only for a box that is not empty: it accepts what is clipped away, or lies in a second
column outside its frame. Here the rectangles of the words themselves are held against every ancestor that cuts them.
"""

from __future__ import annotations

from typing import Any

__all__ = ["assert_readable"]

# Downwards a reader scrolls; sideways only where the content is wide by nature.
_SIDEWAYS = ".scroll, .cm-scroller, table, pre, .tm-scroll"
# What frames its text without clipping it: a word that sticks out of one of these lies on something else.
_FRAMES = ".card, .block, .column, button, td, th"
# For screen readers alone, no words, or Gradio's own turned triangle beside a fold's name.
_SKIPPED = "caption, .sr-only, style, script, svg, [aria-hidden=true], .label-wrap > .icon"

_OUTSIDE = """([selector, sideways, frames, skipped]) => {
  const said = [];
  const name = (node) => node.tagName.toLowerCase() + (node.id ? `#${node.id}` : "")
    + (typeof node.className === "string" && node.className.trim() ? "." + node.className.trim().split(/ +/)[0] : "");
  // Half a letter's overhang is no loss.
  const slack = 2;

  const fault = (node, rect) => {
    let { left, right, top, bottom } = rect;
    let position = getComputedStyle(node).position;
    for (let at = node; at && at !== document.body; at = at.parentElement) {
      const style = getComputedStyle(at);
      // What is placed absolutely is cut by what it is placed in, and by nothing between the two.
      const passes = at !== node && position === "absolute" && style.position === "static";
      if (at !== node && !passes) position = style.position;
      if (position === "fixed") break;
      if (passes || style.display === "inline" || style.display === "contents") continue;
      const box = at.getBoundingClientRect();
      const cutX = style.overflowX !== "visible", cutY = style.overflowY !== "visible";
      const scrollsX = ["auto", "scroll"].includes(style.overflowX);
      const scrollsY = ["auto", "scroll"].includes(style.overflowY);
      if (cutX && scrollsX && at.matches(sideways)) {
        [left, right] = [box.left, box.right];
      } else if (cutX && style.textOverflow === "ellipsis") {
        // Shortened on purpose, and shown to be: its beginning is there.
        if (left < box.left - slack || left > box.right) return `begins outside ${name(at)}`;
        [left, right] = [Math.max(left, box.left), Math.min(right, box.right)];
      } else if ((cutX || at.matches(frames)) && (left < box.left - slack || right > box.right + slack)) {
        return `beside ${name(at)}: ${Math.round(left)} to ${Math.round(right)} px, `
          + `the box ${Math.round(box.left)} to ${Math.round(box.right)}`;
      }
      if (cutY && scrollsY) {
        const from = getComputedStyle(at).flexDirection === "column-reverse"
          ? at.clientHeight - at.scrollHeight : 0;
        const above = top - box.top + at.scrollTop, below = bottom - box.top + at.scrollTop;
        if (above < from - slack || below > from + at.scrollHeight + slack) return `beyond what ${name(at)} scrolls`;
        [top, bottom] = [Math.max(top, box.top), Math.min(bottom, box.bottom)];
        if (top > bottom) [top, bottom] = [box.top, box.bottom];
      } else if ((cutY || at.matches(frames)) && (top < box.top - slack || bottom > box.bottom + slack)) {
        return `above or below ${name(at)}: ${Math.round(top)} to ${Math.round(bottom)} px, `
          + `the box ${Math.round(box.top)} to ${Math.round(box.bottom)}`;
      }
    }
    if (left < -slack || right > document.documentElement.clientWidth + slack) {
      return `beside the window: ${Math.round(left)} to ${Math.round(right)} px`;
    }
    if (top + window.scrollY < -slack) return "above the page";
    return null;
  };

  const roots = [...document.querySelectorAll(selector)]
    .filter((root) => root.checkVisibility({ visibilityProperty: true, opacityProperty: true }));
  let words = 0;
  for (const root of roots) {
    const walker = document.createTreeWalker(root, NodeFilter.SHOW_TEXT);
    for (let text = walker.nextNode(); text; text = walker.nextNode()) {
      const node = text.parentElement;
      if (!text.data.trim() || node.closest(skipped)) continue;
      if (!node.checkVisibility({ visibilityProperty: true, opacityProperty: true })) continue;
      const range = document.createRange();
      range.selectNodeContents(text);
      for (const rect of range.getClientRects()) {
        if (rect.width < 1 || rect.height < 1) continue;
        words += 1;
        const why = fault(node, rect);
        if (why) { said.push(`${JSON.stringify(text.data.trim().slice(0, 40))} lies ${why}`); break; }
      }
    }
  }
  if (!words) said.push(`nothing to read in ${selector}`);
  return said;
}"""


def assert_readable(page: Any, *selectors: str) -> None:
    """Every word of some parts of the page can be read, and in each part there is one.

    Args:
        page: Of Playwright.
        selectors: CSS; of each, all elements that are shown.
    """
    faults = [f"{selector}: {line}" for selector in selectors for line in outside(page, selector)]
    assert faults == [], "\n".join(faults)


def outside(page: Any, selector: str) -> list[str]:
    """The texts of a part that lie where nobody can read them, each with why; a line if there is no text at all."""
    return page.evaluate(_OUTSIDE, [selector, _SIDEWAYS, _FRAMES, _SKIPPED])
