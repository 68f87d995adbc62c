// What the app's figures have beside those of a report page: clicks on layer pairs, a closer look at maps, downloads.
const { plotly, templates } = __SETTINGS__;
const root = element.querySelector(".tm-figure"), find = (name) => root.querySelector(name);
const plot = find(".tm-plot"), words = find(".tm-view"), fault = find(".tm-fault"), message = find(".tm-message");
let picture = null, asked = 0, timer = 0;

const say = (text) => { fault.textContent = text; fault.hidden = !text; };
const load = async () => {
  window.tmergePlotly ||= new Promise((onload, onerror) => {
    const src = ((window.gradio_config && window.gradio_config.root) || ".").replace(/[/]+$/, "") + plotly;
    document.head.append(Object.assign(document.createElement("script"), { src, onload, onerror }));
  });
  try { await window.tmergePlotly; } catch {
    window.tmergePlotly = null;
    say("The figure cannot be drawn: plotly.js did not load.");
  }
  return window.Plotly;
};

const cell = ({ points: [point] }) => {
  if (!picture.cells || !point) return;
  const { rows, columns, links } = picture.cells;
  const place = point.pointNumber ?? point.pointIndex ?? point.index;
  // Of a stream, which has two ends; a node has the outer ends of its streams.
  const link = links ? point.source && point.target && links[place] : Array.isArray(place) && [rows[place[0]], columns[place[1]]];
  if (link) trigger("cell", { target_layer: link[0], source_layer: link[1] });
};

// A map's view: colours as float32, and the words of every row and column.
const seen = (view, range) => {
  const values = new Float32Array(Uint8Array.from(atob(view.z), (letter) => letter.charCodeAt(0)).buffer);
  const wide = view.columns.length, [n, m] = picture.map.shape, density = picture.map.kind === "density";
  const z = view.rows.map((_, r) => Array.from(values.subarray(r * wide, (r + 1) * wide)));
  const customdata = z.map((line, r) => line.map((value, c) => {
    const height = view.y[r + 1] - view.y[r], width = view.x[c + 1] - view.x[c];
    if (!density) return [100 * value, Math.round(value * width), view.rows[r], view.columns[c]];
    const times = value > -90 ? 10 ** value : 0;
    return [times, (100 * times * height * width) / (n * m), view.rows[r], view.columns[c]];
  }));
  const { data: [trace], layout } = picture.figure, { x, y, low, high } = view;
  words.textContent = root.dataset.words = view.words;
  const axes = range && { xaxis: { ...layout.xaxis, range: range.x }, yaxis: { ...layout.yaxis, range: range.y } };
  const data = [{ ...trace, z, customdata, x, y, zmin: low, zmax: high }];
  return { ...picture, figure: { data, layout: { ...layout, ...axes } } };
};
const ranges = () => {
  const { xaxis, yaxis } = plot._fullLayout;
  return { x: xaxis.range.map(Number), y: yaxis.range.map(Number) };
};
const moved = (event) => {
  if (!picture.map || !Object.keys(event).some((key) => /^[xy]axis/.test(key))) return;
  const mine = ++asked;
  clearTimeout(timer);
  timer = setTimeout(async () => {
    const range = ranges(), view = await server.zoomed({ ...picture.map.ref, ...range });
    if (mine !== asked || !view) return;
    say(view.fault || "");
    if (!view.fault) figure.show(seen(view, range));
  }, 120);
};
const zoom = (what) => {
  if (!picture.map || !plot._fullLayout) return;
  const [n, m] = picture.map.shape, now = ranges();
  const next = (range, most, step) => {
    if (what === "all") return [0, most];
    const low = Math.min(...range), high = Math.max(...range), half = (high - low) / 2;
    const wide = Math.min(most, what === "in" ? Math.max(half, 4) : what === "out" ? 4 * half : 2 * half);
    const first = (low + high - wide) / 2 + step * half;
    const from = Math.min(Math.max(first, 0), most - wide);
    return [from, from + wide];
  };
  const [right, down] = { left: [-1, 0], right: [1, 0], up: [0, -1], down: [0, 1] }[what] || [0, 0];
  const update = { "xaxis.range": next(now.x, m, right) };
  if (picture.map.kind !== "share") update["yaxis.range"] = next(now.y, n, down).reverse();
  window.Plotly.relayout(plot, update);
};

const save = (download, href) => Object.assign(document.createElement("a"), { href, download }).click();
const png = async () => {
  const { data, layout } = figure.parts(), plain = (text) => text.replace(/&/g, "&amp;").replace(/</g, "&lt;");
  if (picture.map) ["x", "y"].forEach((axis) => { layout[`${axis}axis`] = { ...layout[`${axis}axis`], range: ranges()[axis] }; });
  const subtitle = { text: plain(picture.subtitle) };
  layout.title = { text: plain(picture.title), subtitle, y: 1, yref: "container", yanchor: "top" };
  layout.margin = { ...layout.margin, t: (layout.margin.t || 0) + 72 };
  // By itself a picture is looked at on paper, whose colour it has to bring.
  layout.paper_bgcolor = getComputedStyle(document.body).backgroundColor;
  const size = { width: Math.max(plot.clientWidth, 640), height: layout.height + 72 };
  Object.assign(layout, size);
  save(`${picture.file}.png`, await window.Plotly.toImage({ data, layout }, { format: "png", scale: 2, ...size }));
};
const csv = async () => {
  const found = await server.data_of(picture.ref);
  if (!found || found.fault) { say((found && found.fault) || "The data could not be read."); return; }
  const url = URL.createObjectURL(new Blob([found.text], { type: "text/csv" }));
  save(`${found.file}.csv`, url);
  setTimeout(() => URL.revokeObjectURL(url), 10000);
};

const figure = window.tmergeFigure(root, templates, { load, hears: { plotly_click: cell, plotly_relayout: moved } });
const take = () => {
  picture = props.value ? JSON.parse(props.value) : null;
  root.hidden = !picture;
  if (!picture) return;
  asked++;
  say("");
  words.textContent = root.dataset.words = "";
  find("figcaption").textContent = picture.caption || "";
  message.textContent = picture.message || "";
  message.hidden = !picture.message;
  find(".tm-tools").hidden = !picture.figure;
  find(".tm-zoom").hidden = !picture.map;
  for (const button of find(".tm-tools").children) {
    // What is read out begins with what is seen, so that it can be said to a computer that listens.
    const what = { png: "PNG: download as a picture", csv: "CSV: download as data" }[button.dataset.do];
    button.setAttribute("aria-label", `${what}, ${picture.title}`);
  }
  plot.classList.toggle("tm-clickable", Boolean(picture.cells));
  figure.show(picture.map ? seen(picture.map.view) : picture);
};

root.addEventListener("click", (event) => {
  const button = event.target.closest("button");
  if (!button || !picture || !picture.figure) return;
  if (button.dataset.zoom) zoom(button.dataset.zoom);
  const run = { png, csv }[button.dataset.do];
  if (run) run().catch((error) => say(`The download failed: ${error.message}.`));
});
watch("value", take);
take();
