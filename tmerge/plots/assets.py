"""Style sheet and script of the report page. The script draws what the page's JSON holds, and fetches nothing."""

from __future__ import annotations

__all__ = ["SCRIPT", "STYLE"]

STYLE = """
:root { color-scheme: light dark; --ink: #24292f; --soft: #57606a; --paper: #ffffff; --card: #f6f8fa; --line: #d8dee4;
  --good: #0072b2; --bad: #b84a00; --none: #6e7781; }
@media (prefers-color-scheme: dark) { :root { --ink: #d6dae0; --soft: #9aa4af; --paper: #14171c; --card: #1c2128;
  --line: #363c45; --good: #56b4e9; --bad: #f0883e; --none: #9aa4af; } }
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; }
body { margin: 0; background: var(--paper); color: var(--ink); line-height: 1.5;
  font-family: system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
main { max-width: 1440px; margin: 0 auto; padding: 24px clamp(12px, 3vw, 40px) 64px; }
h1 { font-size: clamp(1.35rem, 1rem + 1.6vw, 2rem); line-height: 1.25; margin: 0 0 4px; overflow-wrap: anywhere; }
h2 { font-size: 1.25rem; margin: 48px 0 8px; padding-top: 12px; border-top: 1px solid var(--line); }
h3 { font-size: 1rem; margin: 0; }
p { margin: 6px 0; max-width: 80ch; }
code { font-family: ui-monospace, Menlo, Consolas, monospace; font-size: .9em; overflow-wrap: anywhere; }
.soft, figcaption, .subtitle { color: var(--soft); }
.subtitle { font-size: .875rem; margin: 0 0 4px; }
figcaption { font-size: .875rem; max-width: 90ch; margin-top: 4px; }
figure { margin: 16px 0; min-width: 0; }
.verdict { border: 1px solid var(--line); border-left: 8px solid var(--tone); background: var(--card);
  border-radius: 6px; padding: 14px 18px; margin: 18px 0; }
.verdict p { max-width: 110ch; }
.verdict .word { font-size: 1.35rem; font-weight: 700; color: var(--tone); margin: 0; }
.helps { --tone: var(--good); } .hurts { --tone: var(--bad); } .better, .none { --tone: var(--none); }
.side { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 480px), 1fr)); gap: 8px 32px;
  align-items: start; }
.side > * { min-width: 0; }
.scroll { overflow-x: auto; margin: 12px 0; }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; }
caption { text-align: left; font-weight: 600; padding: 4px 0; }
th, td { text-align: left; padding: 5px 20px 5px 0; border-bottom: 1px solid var(--line); vertical-align: top; }
td { overflow-wrap: anywhere; min-width: 9ch; }
thead th { color: var(--soft); font-weight: 600; }
tbody th { font-weight: 500; }
small { display: block; color: var(--soft); font-weight: 400; }
.choices { display: flex; flex-wrap: wrap; gap: 8px 16px; margin: 10px 0; }
.choices label { display: flex; flex-direction: column; font-size: .8rem; color: var(--soft); max-width: 100%; }
select { font: inherit; font-size: .95rem; color: var(--ink); background: var(--card); border: 1px solid var(--line);
  border-radius: 6px; padding: 6px 8px; max-width: 100%; }
select:focus-visible { outline: 2px solid var(--good); outline-offset: 1px; }
ul { padding-left: 1.2em; max-width: 90ch; }
noscript p { border: 1px solid var(--line); padding: 8px 12px; }
@media print { .choices { display: none; } }
"""

SCRIPT = r"""
(() => {
  "use strict";
  const book = JSON.parse(document.getElementById("book").textContent);
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const narrow = matchMedia("(max-width: 640px)");
  // plotly.js shows a button that uploads the picture unless it is told not to.
  const offline = { showSendToCloud: false, plotlyServerURL: "" };
  const config = { ...offline, responsive: true, displaylogo: false, modeBarButtonsToRemove: ["select2d", "lasso2d"] };
  const chosen = {};

  // A colour bar beside the picture takes a quarter of a phone's width: there it lies on top.
  const fitted = (trace) => {
    if (!narrow.matches || !trace.colorbar) return trace;
    const place = { x: 0.5, xanchor: "center", y: 1, yref: "container", yanchor: "top" };
    const bar = { orientation: "h", thickness: 10, title: { text: "" }, ...place };
    return { ...trace, colorbar: { ...trace.colorbar, ...bar } };
  };

  const draw = (id, picture) => {
    const slot = document.getElementById(id);
    const template = book.templates[dark.matches ? "dark" : "light"];
    const data = picture.figure.data.map(fitted);
    const layout = { ...picture.figure.layout, template };
    if (data.some((trace) => trace.colorbar && trace.colorbar.orientation)) layout.margin = { ...layout.margin, t: 60 };
    const toImageButtonOptions = { filename: `tmerge-${id}`, scale: 2 };
    Plotly.react(slot, data, layout, { ...config, toImageButtonOptions });
    slot.setAttribute("aria-label", `${picture.title}. ${picture.subtitle}`);
    document.getElementById(`${id}-title`).textContent = picture.title;
    document.getElementById(`${id}-subtitle`).textContent = picture.subtitle;
  };

  const select = (name) => document.getElementById(`choose-${name}`);
  const fill = (name, options) => {
    const box = select(name);
    const before = chosen[name];
    box.replaceChildren(...options.map(([value, text]) => new Option(text, value)));
    if (options.some(([value]) => value === before)) box.value = before;
    chosen[name] = box.value;
  };

  // Colours come as bytes between the ends of their scale.
  const plan = (pair, order) => {
    const { levels, low, high, rows, columns } = pair[order];
    const bytes = Uint8Array.from(atob(levels), (letter) => letter.charCodeAt(0));
    const [n, m] = pair.shape;
    // Blocks of one side differ by one neuron where their number does not divide the neurons': the first are larger.
    const size = (all, parts, place) => Math.floor(all / parts) + (place < all % parts ? 1 : 0);
    const z = [], customdata = [];
    for (let r = 0; r < rows.length; r++) {
      const line = Array.from(bytes.subarray(r * columns.length, (r + 1) * columns.length));
      z.push(line.map((level) => low + (Math.max(level - 1, 0) / 254) * (high - low)));
      const height = size(n, rows.length, r) / n;
      customdata.push(line.map((level, c) => {
        const times = level ? 10 ** z[r][c] : 0;
        return [times, 100 * times * height * size(m, columns.length, c) / m];
      }));
    }
    const frame = book.features.frames[order];
    const trace = { ...frame.data[0], z, customdata, x: columns, y: rows, zmin: low, zmax: high };
    return { ...pair, figure: { data: [trace], layout: frame.layout } };
  };

  const drawCoupling = () => {
    const pictures = book.coupling[chosen.projection];
    draw("coupling", pictures[chosen.which]);
    draw("flow", pictures.flow);
  };
  const drawPlan = () => {
    const feature = book.features.list.find((item) => item.key === chosen.feature);
    const words = (pair) => `${pair.target} (with source layer ${pair.source})`;
    fill("layer", feature.pairs.map((pair) => [String(pair.target), words(pair)]));
    draw("plan", plan(feature.pairs[select("layer").selectedIndex], chosen.order));
  };
  const drawAll = () => {
    for (const [id, picture] of Object.entries(book.pictures)) draw(id, picture);
    drawCoupling();
    drawPlan();
  };

  fill("projection", Object.keys(book.coupling).map((name) => [name, name]));
  fill("which", [["effective", "both (effective weight)"], ["pre", "input (pre)"], ["post", "output (post)"]]);
  fill("feature", book.features.list.map((feature) => [feature.key, `${feature.name} (${feature.key})`]));
  fill("order", [["structure", "grouped by likeness"], ["natural", "the models' own"]]);
  for (const [name, redraw] of Object.entries({
    projection: drawCoupling, which: drawCoupling, feature: drawPlan, layer: drawPlan, order: drawPlan,
  })) {
    select(name).addEventListener("change", () => { chosen[name] = select(name).value; redraw(); });
  }
  dark.addEventListener("change", drawAll);
  narrow.addEventListener("change", drawAll);
  drawAll();
})();
"""
