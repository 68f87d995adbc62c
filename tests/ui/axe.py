"""axe-core on a page: the rules that are on by default, and two more that we have broken before."""

from __future__ import annotations

from importlib.resources import files
from typing import Any

__all__ = ["EXCEPTED", "assert_accessible"]

EXCEPTED: dict[tuple[str, str], str] = {
    ("target-size", "a.download-link"): "Gradio puts a button of 26 px into a link, and the button alone can be met: "
    "axe calls the link covered, as it is",
}
"""Rule and selector -> why it cannot be mended from here."""

_RUN = """async (excepted) => {
  const rules = { "label-content-name-mismatch": { enabled: true }, "target-size": { enabled: true } };
  const found = await axe.run(document, { elementRef: true, resultTypes: ["violations"], rules });
  const ours = (rule) => (node) => !excepted.some(([other, where]) => rule === other && node.element.matches(where));
  return found.violations.flatMap(({ id, nodes }) => nodes.filter(ours(id))
    .map((node) => `${id}: ${node.html.slice(0, 160)}: ${node.failureSummary.replace(/\\s+/g, " ").slice(0, 240)}`));
}"""


def assert_accessible(page: Any, where: str) -> None:
    """Nothing on the page breaks a rule, as it is now.

    Args:
        page: Of Playwright.
        where: Said with what does.
    """
    if not page.evaluate("() => 'axe' in window"):
        page.evaluate((files("axe_playwright_python") / "axe.min.js").read_text(encoding="utf-8"))
    faults = page.evaluate(_RUN, list(EXCEPTED))
    assert faults == [], f"{where}: " + "\n".join(faults)
