(() => {
  "use strict";
  const { book, draw } = tmergePage();
  const chosen = {};

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
  fill("projection", Object.keys(book.coupling).map((name) => [name, name]));
  fill("which", [["effective", "both (effective weight)"], ["pre", "input (pre)"], ["post", "output (post)"]]);
  fill("feature", book.features.list.map((feature) => [feature.key, `${feature.name} (${feature.key})`]));
  fill("order", [["structure", "grouped by likeness"], ["natural", "the models' own"]]);
  for (const [name, redraw] of Object.entries({
    projection: drawCoupling, which: drawCoupling, feature: drawPlan, layer: drawPlan, order: drawPlan,
  })) {
    select(name).addEventListener("change", () => { chosen[name] = select(name).value; redraw(); });
  }
  drawCoupling();
  drawPlan();
})();
